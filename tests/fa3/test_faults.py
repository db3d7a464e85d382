"""FA3's synchronisation is needed, all of it: whatever is left out or changed, it shows.

The survey of every fault takes about a minute and is marked slow. What runs by default is a fixed
part of it: every fourth fault of each kind, and all that are expected to survive.
"""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.testing.faults import faults
from tests.faults import (
    POLICIES,
    Redundant,
    assert_survivors_are_redundant,
    dense_call,
    every,
    run_survey,
)

# Masked and unmasked blocks, more of each than the rings have slots, for tiles that end at
# different blocks; and a negative scale, because only then do threads write to Q.
PROBLEM = AttentionProblem(1, 200, 600, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2)

REDUNDANT = (
    Redundant(
        "wait",
        r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\], 1, 10000000",
        1,
        "The producer's wait for the first empty slot, peeled off its loop: a literal 1 is the "
        "parity of the phase before the first, which a fresh mbarrier counts as complete.",
    ),
    Redundant(
        "stage",
        r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\], 1, 10000000",
        1,
        "The same wait at another slot's barrier, which is as fresh.",
    ),
    Redundant(
        "barrier",
        r"bar\.sync %r, 128",
        1,
        "The strip's barrier before O takes Q's place: a warp comes there when the last product is "
        "complete. Groups of a warpgroup complete as a whole and in order, so S = Q Kᵀ, which "
        "reads Q for all four warps, was complete before.",
    ),
)


@pytest.fixture
def calls(fa3):
    config = fa3.config(PROBLEM)
    return [dense_call(fa3.program(config), config, PROBLEM)]


def test_part_of_the_faults(calls, monkeypatch):
    chosen = every(4, REDUNDANT)
    found = run_survey(monkeypatch, "sm_90a", calls, only=chosen, policies=POLICIES[:4])
    assert_survivors_are_redundant(found, REDUNDANT)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
def test_every_fault(calls, monkeypatch):
    found = run_survey(monkeypatch, "sm_90a", calls)
    assert_survivors_are_redundant(found, REDUNDANT)
    assert found.caught >= 0.95 * len(found.verdicts), found.table()
    stale = [r for r in REDUNDANT if not any(map(r.covers, found.survivors))]
    assert not stale, f"these are caught: {stale}"


def test_every_kind_of_synchronisation_is_there(fa3):
    """The list is of the kinds that the kernel has; rings come from a trace."""
    ptx = fa3.program(fa3.config(PROBLEM)).ptx
    kinds = {fault.kind for fault in faults(ptx)}
    assert kinds == {
        *("fence", "commit", "wait", "arrive", "expect_tx", "barrier", "parity", "bytes")
    }
