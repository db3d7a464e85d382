"""What the plans of the rungs' tile tables may keep in local memory: nothing, with the exceptions
that READMEs name."""

from __future__ import annotations

from typing import Any

from cute_fa.blocks.plan import launch_registers
from cute_fa.build import Compiled


def assert_no_spills(compiled: Compiled) -> None:
    """Of ``compiled`` by a rung's own plan, no field of it overridden; and that roles that trade
    registers find as many as the plan counts on."""
    resources, allowed = compiled.resources, _allowed_bytes(compiled.generation, compiled.config)
    assert resources.spill_store_bytes <= allowed, (compiled.label, resources)
    assert allowed or not resources.spills, (compiled.label, resources)
    if compiled.generation in ("fa3", "fa4"):
        # setmaxnreg shares out what the CTA was launched with; with less it would wait for ever.
        assert resources.registers == launch_registers(compiled.config.num_threads)


def _allowed_bytes(generation: str, config: Any) -> int:
    has_window = config.has_window_left or config.has_window_right
    if generation == "fa1" and config.padded_d == 64 and has_window:
        return 16
    if generation == "fa4" and config.has_block_descales and config.has_softcap:
        return 40
    return 0
