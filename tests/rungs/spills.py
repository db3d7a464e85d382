"""What the plans of the rungs' tile tables may keep in local memory: nothing, with the exceptions
that READMEs name."""

from __future__ import annotations

from typing import Any

from cute_fa.build import Compiled


def assert_no_spills(compiled: Compiled) -> None:
    """``compiled`` by a rung's own plan, no field of it overridden."""
    resources, allowed = compiled.resources, _allowed_bytes(compiled.generation, compiled.config)
    assert resources.spill_store_bytes <= allowed, (compiled.label, resources)
    assert allowed or not resources.spills, (compiled.label, resources)


def _allowed_bytes(generation: str, config: Any) -> int:
    has_window = config.has_window_left or config.has_window_right
    if generation == "fa1" and config.padded_d == 64 and has_window:
        return 16
    if generation == "fa4" and config.has_block_descales and config.has_softcap:
        return 40
    return 0
