"""Fault surveys of the rungs' kernels: the calls that ``cute_fa.testing.fault_survey`` makes, and
the judgement that every survivor has to be argued for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.sim.device import Device, Program
from cute_fa.testing.fault_survey import Call, Survey
from cute_fa.testing.faults import Fault
from cute_fa.testing.inputs import normal_inputs

if TYPE_CHECKING:
    from tests.surveys import KernelSurvey


@dataclass(frozen=True)
class Redundant:
    """Faults that must survive, because what they remove or change orders nothing.

    Attributes:
        kind, form: of the faults; ``form`` is a regular expression for ``Fault.form``.
        at_most: how many of these survive; others of the same form may be needed.
        why: the argument.
    """

    kind: str
    form: str
    at_most: int
    why: str

    def covers(self, fault: Fault) -> bool:
        return self.kind == fault.kind and re.fullmatch(self.form, fault.form) is not None


def dense_call(program: Program, config: Any, problem: AttentionProblem) -> Call:
    """One forward of a dense problem, with outputs and workspace full of NaN."""
    inputs = normal_inputs(problem)
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    window = [-1 if b is None else b for b in (problem.window_left, problem.window_right)]

    def call(device: Device) -> Sequence[torch.Tensor]:
        out = torch.full((*rows, problem.head_dim_v), math.nan, dtype=inputs.q.dtype)
        lse = torch.full((rows[0], rows[2], rows[1]), math.nan)
        workspace = [
            torch.full(w.shape, math.nan, dtype=getattr(torch, w.dtype))
            for w in config.workspace(*rows)
        ]
        arguments = (inputs.q, inputs.k, inputs.v, out, lse, *workspace)
        run = device.bind(program.compiled, program.ptx)
        run(*arguments, problem.scale, problem.softcap, *window)
        return out, lse

    return call


def every(step: int) -> Callable[[Fault], bool]:
    """Chooses the first of each ``step`` faults of a kind."""
    seen: Counter[str] = Counter()

    def choose(fault: Fault) -> bool:
        seen[fault.kind] += 1
        return (seen[fault.kind] - 1) % step == 0

    return choose


def run_survey(monkeypatch: pytest.MonkeyPatch, kernel: KernelSurvey, **how: Any) -> Survey:
    """``kernel.run(**how)``, with the faulty kernels' code kept out of the cache on disk."""
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    return kernel.run(**how)


def assert_survivors_are_redundant(found: Survey, redundant: Sequence[Redundant] = ()) -> None:
    """Every fault is in an instruction that runs, and is caught unless it is argued for."""
    assert found.verdicts, "no fault was tried"
    assert not found.unreached, [str(fault) for fault in found.unreached]
    unexplained = [f for f in found.survivors if not any(r.covers(f) for r in redundant)]
    assert not unexplained, "\n".join(map(str, [*unexplained, found.table()]))
    for argument in redundant:
        survived = [str(fault) for fault in found.survivors if argument.covers(fault)]
        assert len(survived) <= argument.at_most, (argument, survived)


def assert_arguments_have_survivors(found: Survey, redundant: Sequence[Redundant]) -> None:
    """Of a survey of every fault: an argument for what is caught is out of date."""
    stale = [r for r in redundant if not any(map(r.covers, found.survivors))]
    assert not stale, f"these are caught: {stale}"
