"""Running a kernel under every fault of its synchronisation, and counting what is noticed.

A fault is *caught* if, on some problem and under some completion policy, the simulator reports a
hazard or a deadlock, or the results differ from the sound kernel's in any bit. One that is never
caught *survives*: either the instruction is redundant, or the simulator misses something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cute_fa.sim.device import Device
from cute_fa.sim.hazards import HazardError
from cute_fa.target import Target
from cute_fa.testing.faults import KINDS, Fault, faults

if TYPE_CHECKING:
    from cute_fa.sim.execute import Launch

Call = Callable[[Device], Sequence[Tensor]]

POLICIES: tuple[tuple[str, int], ...] = (
    ("late", 0),
    ("eager", 0),
    *(("random", seed) for seed in range(6)),
)
"""Completion policy and seed of each try, in order; the first that notices a fault is the last."""

OUTCOMES = ("hazard", "deadlock", "wrong result", "survived")


class FaultyDevice(Device):
    """A simulated device on which every kernel that is bound to it has one fault.

    Args:
        transform: the PTX that runs, from the PTX that was compiled.
        others: as for ``Device``.
    """

    def __init__(self, arch: str | Target, transform: Callable[[str], str], **others: Any) -> None:
        super().__init__(arch, workers=1, **others)
        self.transform = transform
        self.text = ""

    def bind(self, host_function: Any, ptx_text: str | Sequence[str]) -> Callable[..., Any]:
        (self.text,) = [ptx_text] if isinstance(ptx_text, str) else ptx_text
        return super().bind(host_function, self.transform(self.text))


@dataclass(frozen=True)
class Verdict:
    """What became of one fault.

    Attributes:
        outcome: one of ``OUTCOMES``.
        rule: of the hazard, if there was one.
        tries: runs until it was caught, or all.
    """

    fault: Fault
    outcome: str
    rule: str = ""
    tries: int = 0

    @property
    def caught(self) -> bool:
        return self.outcome != "survived"


@dataclass(frozen=True)
class _Sound:
    """A call on the kernel as compiled: results, and what ran."""

    call: Call
    results: tuple[Tensor, ...]
    executed: frozenset[int]


@dataclass(frozen=True)
class Survey:
    """The verdicts on all faults of one kernel.

    Attributes:
        unreached: faults in instructions that none of the calls executes; they have no verdict.
    """

    verdicts: tuple[Verdict, ...]
    unreached: tuple[Fault, ...]

    @property
    def survivors(self) -> list[Fault]:
        return [verdict.fault for verdict in self.verdicts if not verdict.caught]

    @property
    def caught(self) -> int:
        return sum(verdict.caught for verdict in self.verdicts)

    def table(self) -> str:
        """Faults by kind and outcome, as text."""
        counts = Counter((verdict.fault.kind, verdict.outcome) for verdict in self.verdicts)
        lines = [f"{'fault':<12}{'number':>8}" + "".join(f"{name:>14}" for name in OUTCOMES)]
        for kind in (*KINDS, "all"):
            row = [
                sum(n for (of, what), n in counts.items() if what == name and kind in (of, "all"))
                for name in OUTCOMES
            ]
            if any(row):
                lines.append(f"{kind:<12}{sum(row):>8}" + "".join(f"{n:>14}" for n in row))
        return "\n".join(lines)


def survey(
    arch: str | Target,
    calls: Sequence[Call],
    *,
    only: Callable[[Fault], bool] = lambda fault: True,
    policies: Iterable[tuple[str, int]] = POLICIES,
    checks: bool | frozenset[str] = True,
) -> Survey:
    """Try every fault of the kernel that the calls run.

    Args:
        calls: each runs the kernel once on the device that it is given and returns its results;
            together they should execute every instruction. A fault is tried on those that do
            execute its instruction.
        only: which faults to try.
        policies: (completion, seed) of each try.
        checks: as for ``Device``; strict rules have to be named.

    Raises:
        HazardError: the kernel has a hazard as it is.
    """
    tries = tuple(policies)
    sound, text, traces = [], "", []
    for call in calls:
        device = FaultyDevice(arch, lambda text: text, trace=True, checks=checks)
        results = tuple(result.clone() for result in call(device))
        launch = _only_launch(device)
        assert launch.trace is not None
        sound.append(_Sound(call, results, launch.trace.executed()))
        traces.append(launch.trace)
        if text and device.text != text:
            raise ValueError("the calls run different kernels: one survey is of one PTX text")
        text = device.text
    addresses: dict[int, dict[str, tuple[int, ...]]] = {}
    for trace in traces:
        for index, places in trace.shared_addresses().items():
            known = addresses.setdefault(index, {})
            for what, used in places.items():
                known[what] = tuple(sorted({*known.get(what, ()), *used}))
    listed = [fault for fault in faults(text, launch.kernel, addresses=addresses) if only(fault)]
    reached = [any(fault.index in one.executed for one in sound) for fault in listed]
    verdicts = [
        judge(arch, fault, sound, tries, checks)
        for fault, runs in zip(listed, reached, strict=True)
        if runs
    ]
    unreached = [fault for fault, runs in zip(listed, reached, strict=True) if not runs]
    return Survey(tuple(verdicts), tuple(unreached))


def judge(
    arch: str | Target,
    fault: Fault,
    sound: Sequence[_Sound],
    policies: Sequence[tuple[str, int]],
    checks: bool | frozenset[str] = True,
) -> Verdict:
    """Run the calls that execute the fault's instruction until one shows it."""
    tries = 0
    for completion, seed in policies:
        for one in sound:
            if fault.index not in one.executed:
                continue
            tries += 1
            device = FaultyDevice(
                arch, fault.apply, completion=completion, seed=seed, checks=checks
            )
            try:
                results = one.call(device)
            except HazardError as error:
                rule = error.hazard.rule
                outcome = "deadlock" if rule in ("deadlock", "livelock") else "hazard"
                return Verdict(fault, outcome, rule, tries)
            rules = [hazard.rule for hazard in _only_launch(device).hazards]
            if rules:
                return Verdict(fault, "hazard", rules[0], tries)
            if any(not _same(a, b) for a, b in zip(results, one.results, strict=True)):
                return Verdict(fault, "wrong result", "", tries)
    return Verdict(fault, "survived", "", tries)


def _only_launch(device: Device) -> Launch:
    (launch,) = device.launches
    return launch


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, where no result is NaN unless the kernel has left it out."""
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
