"""FA3's synchronisation is needed, all of it: whatever is left out or changed, it shows.

The surveys of every fault, of a persistent and of a single-tile kernel, take about a minute each
and are marked slow. What runs by default is a fixed part of the first: every eighth fault of each
kind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target
from cute_fa.testing.faults import faults
from tests.faults import (
    Redundant,
    assert_survivors_are_redundant,
    dense_call,
    every,
    run_survey,
)

# One SM, so that a persistent CTA takes all three row tiles. Masked and unmasked blocks, more of
# each than the rings have slots; a negative scale, because only then do threads write to Q.
TARGET = replace(get_target("sm_90a"), sm_count=1)
PERSISTENT = AttentionProblem(1, 300, 430, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2)
SINGLE = AttentionProblem(1, 200, 430, 1, 1, 64, 64, "float16", softmax_scale=-0.2)
PLAN = {"tile_n": 64, "num_consumers": 2}  # less code than the plans of the table
PLANS = {PERSISTENT: PLAN, SINGLE: {**PLAN, "is_persistent": False, "has_own_o": False}}

IN_EVERY_SCHEDULE = (
    Redundant(
        "barrier",
        r"bar\.sync %r, 128",
        1,
        "The strip's barrier between the threads' writes to Q and the products that read it: all "
        "warps of the consumer also pass the turn's barrier before they issue the first product.",
    ),
    Redundant(
        "barrier",
        r"bar\.sync %r, 256",
        1,
        "Consumer 0's last wait for its turn only takes back an arrival: the CTA ends there.",
    ),
)
OF_PERSISTENT = (
    *IN_EVERY_SCHEDULE,
    Redundant(
        "stage",
        r"mbarrier\.arrive\.shared\.b64 %rd, \[%r\+\d+\], %r",
        1,
        "Two slots whose empty barriers are exchanged: slots are released in order, so the "
        "producer waits for the younger of two uses first, and the older one is then released.",
    ),
)
FIRST_WAIT = (
    "The producer's first wait for an empty slot, peeled off its loop: a literal 1 is the parity "
    "of the phase before the first, which a fresh mbarrier counts as complete."
)
OF_SINGLE = (
    replace(
        IN_EVERY_SCHEDULE[0],
        at_most=2,
        why=IN_EVERY_SCHEDULE[0].why
        + " And the one before O takes Q's place: a warp comes there when its last product is "
        "complete; groups of a warpgroup complete as a whole and in order, so S = Q Kᵀ, which "
        "reads Q for all four warps, was complete before.",
    ),
    IN_EVERY_SCHEDULE[1],
    Redundant("wait", r"mbarrier\.try_wait\S* P1, \[%r\], 1, 10000000", 1, FIRST_WAIT),
    Redundant(
        "stage",
        r"mbarrier\.try_wait\S* P1, \[%r\], 1, 10000000",
        1,
        FIRST_WAIT + " The other slot's barrier is as fresh.",
    ),
    Redundant(
        "arrive",
        r"mbarrier\.arrive\.shared\.b64 %rd, \[%r\+\d+\], %r",
        1,
        "The release of V after the last product: a CTA of one tile fills that slot no more.",
    ),
)


def calls(fa3, problem):
    config = fa3.config(problem, **PLANS[problem])
    return [dense_call(fa3.program(config), config, problem)]


def test_part_of_the_faults(fa3, monkeypatch):
    found = run_survey(monkeypatch, TARGET, calls(fa3, PERSISTENT), only=every(8))
    assert_survivors_are_redundant(found, OF_PERSISTENT)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault(fa3, monkeypatch):
    """At least 95 % of the persistent kernel's faults are caught, and of both kernels' together;
    survivors have an argument, and every argument a survivor."""
    caught = tried = 0
    for problem, redundant in ((PERSISTENT, OF_PERSISTENT), (SINGLE, OF_SINGLE)):
        found = run_survey(monkeypatch, TARGET, calls(fa3, problem))
        assert_survivors_are_redundant(found, redundant)
        stale = [r for r in redundant if not any(map(r.covers, found.survivors))]
        assert not stale, f"these are caught: {stale}"
        caught += found.caught
        tried += len(found.verdicts)
        assert caught >= 0.95 * tried, found.table()


def test_every_kind_of_synchronisation_is_there(fa3):
    """The list is of the kinds that the kernel has; rings come from a trace."""
    ptx = fa3.program(fa3.config(PERSISTENT, **PLAN)).ptx
    kinds = {fault.kind for fault in faults(ptx)}
    assert kinds == {
        *("fence", "commit", "wait", "arrive", "expect_tx", "barrier", "parity", "bytes")
    }
