"""FA4's synchronisation is needed, all of it: whatever is left out or changed, it shows.

Every rule of the simulator is on, the strict ones too. The surveys of every fault, of a persistent
kernel and of what cluster launch control adds, take several minutes and are marked slow; what runs
by default is a fixed part of each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.sim.addresses import SHARED_BASE
from cute_fa.sim.device import Device
from cute_fa.sim.hazards import RULES
from cute_fa.target import get_target
from cute_fa.testing.fault_survey import POLICIES
from cute_fa.testing.faults import KINDS, Fault, faults
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
# The last tile that a CTA takes has keys, unlike above: what is read last is O in tensor memory.
KEYS_FOR_ALL = replace(PROBLEM, seqlen_q=400, seqlen_k=420)
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
    Redundant("wait", r"mbarrier\.try_wait\..*", 1, NO_KEYS),
    Redundant("parity", r"mbarrier\.try_wait\..*", 1, NO_KEYS),
    Redundant("stage", r"mbarrier\..*", 4, IN_ORDER + " " + NO_KEYS),
)


@pytest.fixture
def calls(fa4):
    config = fa4.config(PROBLEM, **PLAN)
    program = fa4.program(config)
    return [dense_call(program, config, problem) for problem in (PROBLEM, STEEP, KEYS_FOR_ALL)]


def survey(monkeypatch, calls, **how):
    return run_survey(monkeypatch, TARGET, calls, checks=frozenset(RULES), **how)


def test_part_of_the_faults(calls, monkeypatch):
    found = survey(monkeypatch, calls, only=every(16), policies=POLICIES[:3])
    assert_survivors_are_redundant(found, REDUNDANT)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault(calls, monkeypatch):
    """At least 95 % are caught, and what is not is argued to be harmless."""
    found = survey(monkeypatch, calls)
    assert_survivors_are_redundant(found, REDUNDANT)
    assert found.caught >= 0.95 * len(found.verdicts), found.table()


# Five tiles of one block; under the random policy one CTA takes all that it is granted.
ASKING = AttentionProblem(1, 1100, 60, 1, 1, 32, 32, "float16", softmax_scale=-0.2)
ASKING_PLAN = PLAN | {"is_persistent": False, "has_launch_control": True}
NEARBY = 8  # instructions between a query of an answer and the end of what belongs to it
REDUNDANT_IN_ASKING = (
    Redundant(
        "fence",
        r"fence\.proxy\.async\.shared::cta",
        2,
        "Of the asking warp and of the one that is furthest ahead: their reads of an answer are "
        "known, by the next announcement and by the signal that a piece is begun, to warps that "
        "fence behind the next answer, and these fences come before the slot is filled again.",
    ),
)


@pytest.fixture
def launch_control(fa4):
    """(the call, which faults are those of launch control's own synchronisation)."""
    config = fa4.config(ASKING, **ASKING_PLAN)
    call = dense_call(fa4.program(config), config, ASKING)
    device = Device(TARGET, trace=True, workers=1)
    call(device)
    trace = device.launches[-1].trace
    asker = range(config.scheduler_warp, config.scheduler_warp + 1)
    used = {
        address
        for places in trace.shared_addresses(asker).values()
        for address in places.get("barrier", ())
        if address >= SHARED_BASE  # smaller ones are numbers of named barriers
    }
    queries = [i.index for i in trace.kernel.body if "query_cancel" in i.opcode]

    def belongs(fault: Fault) -> bool:
        if fault.barriers:
            return not used.isdisjoint(fault.barriers)
        is_near = any(0 < fault.index - query <= NEARBY for query in queries)
        return is_near and fault.kind in ("fence", "barrier")

    return call, belongs


def test_part_of_the_faults_of_launch_control(launch_control, monkeypatch):
    call, belongs = launch_control
    chosen = every(6)
    found = survey(monkeypatch, [call], only=lambda fault: belongs(fault) and chosen(fault))
    assert_survivors_are_redundant(found, REDUNDANT_IN_ASKING)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_of_launch_control(launch_control, monkeypatch):
    """Of requests, of the answers' ring and of the signal that a piece is begun: at least 95 %."""
    call, belongs = launch_control
    found = survey(monkeypatch, [call], only=belongs)
    assert_survivors_are_redundant(found, REDUNDANT_IN_ASKING)
    assert len(found.verdicts) > 40
    assert found.caught >= 0.95 * len(found.verdicts), found.table()


def test_every_kind_of_synchronisation_is_there(fa4):
    """Rings, "stage", come from a trace."""
    ptx = fa4.program(fa4.config(PROBLEM, **PLAN)).ptx
    assert {fault.kind for fault in faults(ptx)} == set(KINDS) - {"stage"}
