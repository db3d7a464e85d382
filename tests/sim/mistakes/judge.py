"""What the tests of these programs ask: the mistake's rule under every policy, and a clean twin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cutlass.cute as cute
import torch
from cutlass.cute.runtime import from_dlpack

from cute_fa.sim.device import Device
from cute_fa.sim.execute import Launch

POLICIES = (("eager", 0), ("late", 0), ("random", 1))

FOUND_AT_THE_END = ("mbarrier-transactions", "copy-never-awaited", "tmem-leak")
"""Rules about what a CTA leaves behind, which is no warp's."""

Data = tuple[torch.Tensor, ...]  # inputs, then one output


@dataclass(frozen=True)
class Mistake:
    """A program with a mistake, and what reports it.

    Attributes:
        program: a class; ``program(bug)`` is the ``@cute.jit`` function.
        rules: the rules of which one has to report it.
        policies: under which it has to be reported. Not all, if what happens is right by chance.
    """

    program: type
    bug: str
    rules: tuple[str, ...]
    policies: tuple[str, ...] = ("eager", "late", "random")

    def __str__(self) -> str:
        return f"{self.program.__name__}: {self.bug}"


def cute_tensor(tensor: torch.Tensor) -> Any:
    return from_dlpack(tensor, assumed_align=16)


@lru_cache(maxsize=1)
def compiled(arch: str, program: type, bug: str, make: Callable[[], Data]) -> Any:
    """The program as the DSL compiles it, with line information."""
    with Device(arch, workers=1):
        arguments = map(cute_tensor, make())
        return cute.compile(program(bug), *arguments, options="--generate-line-info")


def launches(
    arch: str, program: type, bug: str, make: Callable[[], Data], **options: Any
) -> list[tuple[str, Data, Launch]]:
    """(policy, tensors after the launch, launch) of one launch under each policy."""
    run = compiled(arch, program, bug, make)
    out = []
    for completion, seed in POLICIES:
        data = make()
        with Device(arch, workers=1, completion=completion, seed=seed, **options) as device:
            run(*map(cute_tensor, data))
        out.append((completion, data, device.launches[-1]))
    return out


def assert_sound(
    arch: str, program: type, make: Callable[[], Data], expected: Callable[..., torch.Tensor]
) -> None:
    """The twin: right results, and nothing to report under any policy."""
    for completion, (*inputs, out), launch in launches(arch, program, "", make):
        assert launch.hazards == [], completion
        assert torch.equal(out, expected(*inputs)), completion


def assert_reported(arch: str, mistake: Mistake, make: Callable[[], Data]) -> None:
    """One of the rules reports the mistake under every policy: where, and by whom."""
    file = sys.modules[mistake.program.__module__].__file__
    for completion, _, launch in launches(arch, mistake.program, mistake.bug, make, strict=False):
        found = [hazard for hazard in launch.hazards if hazard.rule in mistake.rules]
        if completion not in mistake.policies:
            continue
        everything = "\n".join(map(str, launch.hazards)) or "nothing is reported"
        assert found, f"{completion}: {everything}"
        first = found[0]
        assert first.ptx_line and first.ptx_text, first
        assert first.source and file and file.split("/")[-1] in first.source, first
        assert first.cta is not None, first
        assert first.warp is not None or first.rule in FOUND_AT_THE_END, first
