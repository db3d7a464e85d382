"""Every barrier and every cp.async group of FA1 is needed: leaving one out is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa import sim
from cute_fa.fa1.config import pick_fwd
from cute_fa.fa1.fwd import Fa1Fwd, fake_arguments
from cute_fa.problem import AttentionProblem
from cute_fa.target import TARGETS
from cute_fa.testing.faults import faults
from tests.faults import assert_survivors_are_redundant, dense_call, run_survey

# Several blocks on both sides and three chunks of O: every barrier's two sides are both reached.
PROBLEM = AttentionProblem(1, 70, 130, 1, 1, 32, 96, "float16", causal=True)
PICKED = pick_fwd(PROBLEM.variant, TARGETS["sm_80"])
CONFIG = replace(PICKED, tile_m=32, tile_n=64, tile_dv=32)
# One group of copies per step, and per step the four barriers of the class docstring and the one
# between chunks of columns.
EXPECTED = ["commit", "wait", *["barrier"] * 5]


@pytest.fixture(scope="module")
def program():
    device = sim.Device("sm_80", workers=1)
    return device.compile(Fa1Fwd(CONFIG), *fake_arguments(CONFIG), options="--enable-tvm-ffi")


def test_synchronisation_is_as_documented(program):
    assert [fault.kind for fault in faults(program.ptx)] == EXPECTED


def test_every_deletion_is_reported(program, monkeypatch):
    """A race between warps for a barrier; bytes that are not there yet for a group of copies."""
    calls = [dense_call(program, CONFIG, PROBLEM)]
    found = run_survey(monkeypatch, "sm_80", calls, policies=[("late", 0)])
    assert_survivors_are_redundant(found)
    rules = {verdict.fault.kind: verdict.rule for verdict in found.verdicts}
    assert rules["barrier"] == "shared-race"
    assert rules["commit"] == rules["wait"] == "read-before-arrival"
