"""Every barrier and every cp.async group of FA1 is needed: taking one out is reported."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch

from cute_fa import sim
from cute_fa.fa1.config import pick_fwd
from cute_fa.fa1.fwd import Fa1Fwd, fake_arguments
from cute_fa.problem import AttentionProblem
from cute_fa.target import TARGETS
from cute_fa.testing.inputs import normal_inputs

SYNCHRONISATION = re.compile(r"\s*(bar\.sync|cp\.async\.(commit|wait)_group)")
# Several blocks on both sides and three chunks of O: every barrier's two sides are both reached.
PROBLEM = AttentionProblem(1, 70, 130, 1, 1, 32, 96, "float16", causal=True)
CONFIG = pick_fwd(PROBLEM.variant, TARGETS["sm_80"]).with_tiles(32, 64)
# One group of copies per step, and per step the four barriers of the class docstring and the one
# between chunks of columns.
EXPECTED = ["cp.async.commit_group", "cp.async.wait_group", *["bar.sync"] * 5]


@cache
def _program():
    device = sim.Device("sm_80", workers=1)
    arguments = fake_arguments(CONFIG)
    return device.compile(Fa1Fwd(CONFIG), *arguments, options="--enable-tvm-ffi")


def _hazards(ptx: str) -> set[str]:
    """Rules that were broken by a run in which copies complete as late as they may."""
    device = sim.Device("sm_80", workers=1, completion="late", strict=False)
    q, k, v = normal_inputs(PROBLEM)[:3]
    out = torch.full((1, 70, 1, 96), math.nan, dtype=q.dtype)
    lse = torch.full((1, 1, 70), math.nan)
    workspace = [torch.full(w.shape, math.nan) for w in CONFIG.workspace(1, 70, 1)]
    run = device.bind(_program().compiled, ptx)
    run(q, k, v, out, lse, *workspace, PROBLEM.scale, 0.0, -1, -1)
    return {hazard.rule for hazard in device.launches[0].hazards}


def _synchronising_lines() -> list[int]:
    lines = _program().ptx.splitlines()
    return [i for i, line in enumerate(lines) if SYNCHRONISATION.match(line)]


def test_synchronisation_is_as_documented():
    lines = _program().ptx.splitlines()
    found = [lines[i].split()[0].rstrip(";") for i in _synchronising_lines()]
    assert found == EXPECTED
    assert _hazards(_program().ptx) == set()


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_deletion_is_reported(index):
    lines = _program().ptx.splitlines()
    position = _synchronising_lines()[index]
    deleted = lines[position]
    lines[position] = ""
    rules = _hazards("\n".join(lines))
    if "bar.sync" in deleted:
        assert rules == {"shared-race"}
    else:
        assert "read-before-arrival" in rules
