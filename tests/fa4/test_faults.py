"""FA4's synchronisation is needed, all of it: whatever is left out or changed, it shows.

Every rule of the simulator is on, the strict ones too. The survey of every fault takes several
minutes and is marked slow; what runs by default is a fixed part of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.sim.hazards import RULES
from cute_fa.target import get_target
from cute_fa.testing.fault_survey import POLICIES
from cute_fa.testing.faults import KINDS, faults
from tests.faults import (
    Redundant,
    assert_survivors_are_redundant,
    dense_call,
    every,
    run_survey,
)

# One SM, so that a persistent CTA takes all row tiles. Masked and unmasked blocks, more of each
# than the ring has slots; the steeper scale is there because O then has to be rescaled.
TARGET = replace(get_target("sm_100a"), sm_count=1)
PROBLEM = AttentionProblem(1, 600, 300, 1, 1, 32, 32, "float16", causal=True, softmax_scale=-0.2)
STEEP = replace(PROBLEM, softmax_scale=-3.0)
PLAN = {"tile_n": 64, "stages": 3, "is_persistent": True}  # less code than the plans of the table

IN_ORDER = (
    "Slots of two Q tiles exchanged on one side: both are signalled and waited for one after the "
    "other, in the same order by everybody, so that waiting for the other one first, or signalling "
    "it first, only delays."
)
NO_KEYS = (
    "MMA's wait for Q of a tile without keys: it multiplies nothing, and the correction waits for "
    "the same bytes before it puts O in their place."
)
REDUNDANT = (
    Redundant(
        "allocation",
        r"tcgen05\.relinquish_alloc_permit\..*",
        1,
        "A hint: it lets other CTAs of the SM allocate, and there are none.",
    ),
    Redundant(
        "fence",
        r"tcgen05\.fence::before_thread_sync",
        1,
        "The second of two arrivals for the first block, one per Q tile, with nothing in between.",
    ),
    Redundant("barrier", r"bar\.warp\.sync -1", 1, "The same two arrivals."),
    Redundant(
        "wait",
        r"cp\.async\.bulk\.wait_group\.read 0",
        1,
        "The epilogue warp's wait behind its loop: each round of it ends with the same wait.",
    ),
    Redundant("wait", r"mbarrier\.try_wait\..*", 1, NO_KEYS),
    Redundant("parity", r"mbarrier\.try_wait\..*", 1, NO_KEYS),
    Redundant("stage", r"mbarrier\..*", 4, IN_ORDER + " " + NO_KEYS),
)
NOT_SEEN = (
    Redundant(
        "barrier",
        r"bar\.sync 9, 128",
        1,
        "Needed: the correction warps meet before one of them deallocates tensor memory. The "
        "simulator does not order deallocation against other warps' loads.",
    ),
)


@pytest.fixture
def calls(fa4):
    config = fa4.config(PROBLEM, **PLAN)
    program = fa4.program(config)
    return [dense_call(program, config, problem) for problem in (PROBLEM, STEEP)]


def survey(monkeypatch, calls, **how):
    return run_survey(monkeypatch, TARGET, calls, checks=frozenset(RULES), **how)


def test_part_of_the_faults(calls, monkeypatch):
    found = survey(monkeypatch, calls, only=every(16), policies=POLICIES[:3])
    assert_survivors_are_redundant(found, REDUNDANT + NOT_SEEN)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault(calls, monkeypatch):
    """Of the faults that are not argued to be harmless, at least 95 % are caught; of all, 93 %."""
    found = survey(monkeypatch, calls)
    assert_survivors_are_redundant(found, REDUNDANT + NOT_SEEN)
    harmless = sum(any(r.covers(fault) for r in REDUNDANT) for fault in found.survivors)
    tried = len(found.verdicts)
    assert found.caught >= 0.95 * (tried - harmless), found.table()
    assert found.caught >= 0.93 * tried, found.table()


def test_every_kind_of_synchronisation_is_there(fa4):
    """Rings, "stage", come from a trace."""
    ptx = fa4.program(fa4.config(PROBLEM, **PLAN)).ptx
    assert {fault.kind for fault in faults(ptx)} == set(KINDS) - {"stage"}
