"""The scheduler: reconvergence, waiting, polling, time-outs, deadlocks, random order."""

from typing import Any

import numpy as np
import pytest

from cute_fa.sim.hazards import HazardError
from cute_fa.sim.isa import Decoded, Subsystem, WaitReason, blocking, effect, subsystem
from tests.sim.tiny import run

# --- instructions of these tests ------------------------------------------------------------------


@subsystem
class Gates(Subsystem):
    """Numbered gates that lanes wait at until somebody opens them."""

    name = "test_gates"

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.waiting: dict[int, list] = {}
        self.log: list[str] = []

    def on_idle(self, ctx: Any) -> bool:
        tickets = self.waiting.pop(99, [])  # gate 99 opens when nobody else can run
        ctx.release(*tickets)
        return bool(tickets)

    def describe(self) -> list[str]:
        return [f"gate {number}: closed" for number in self.waiting]


class _Gate(Decoded):
    def __init__(self, instr, kernel):
        super().__init__(instr, kernel)
        self.sources = instr.operands

    @staticmethod
    def number(values, mask):
        return int(values[mask][0] if mask is not None else values.flat[0])


@blocking("gatetest.wait")
class GateWait(_Gate):
    def run(self, ctx, mask, *sources):
        gates = ctx.subsystem("test_gates")
        number = self.number(sources[0], mask)
        if number in gates.open:
            return None
        ticket = ctx.park(mask, WaitReason("waits for", barrier=f"gate {number}"))
        gates.waiting.setdefault(number, []).append(ticket)
        return ctx.lanes.within(np.zeros(ctx.lanes.shape, bool))


@effect("gatetest.open")
class GateOpen(_Gate):
    def run(self, ctx, mask, *sources):
        gates = ctx.subsystem("test_gates")
        number = self.number(sources[0], mask)
        gates.open.add(number)
        ctx.release(*gates.waiting.pop(number, []))


class _Poll(_Gate):
    ends_block = True
    own_block = True
    progress = False

    def __init__(self, instr, kernel):
        super().__init__(instr, kernel)
        self.dests = (instr.operands[0].name,)
        self.sources = instr.operands[1:]


@effect("gatetest.poll")
class GatePoll(_Poll):
    def run(self, ctx, mask, *sources):
        ok = self.number(sources[0], mask) in ctx.subsystem("test_gates").open
        if not ok:
            ctx.yield_(mask)
        return (np.full(ctx.lanes.shape, ok),)


@effect("gatetest.try")
class GateTry(_Poll):
    """Waits, and gives false after a time-out."""

    def run(self, ctx, mask, *sources):
        gates = ctx.subsystem("test_gates")
        number = self.number(sources[0], mask)
        ok = number in gates.open
        if not ok and ctx.timed_out is None:
            ticket = ctx.park(mask, WaitReason("tries"), may_time_out=True, retry=True)
            gates.waiting.setdefault(number, []).append(ticket)
        return (np.full(ctx.lanes.shape, ok),)


@effect("gatetest.together")
class Together(Decoded):
    """Gives every lane the number of lanes of its warp that execute it together."""

    collective = True

    def __init__(self, instr, kernel):
        super().__init__(instr, kernel)
        self.dests = (instr.operands[0].name,)

    def run(self, ctx, mask, *sources):
        active = ctx.lanes.dense_mask() if mask is None else mask
        return (np.count_nonzero(active, axis=2, keepdims=True).astype(np.uint32),)


STORE = "st.global.b32 [%out], %r5;"

# --- reconvergence --------------------------------------------------------------------------------


def test_lanes_of_a_warp_meet_at_a_collective_that_they_reach_by_different_ways():
    """The short way loops back to a collective above the long way's code."""
    body = f"""
        mov.b32 %r4, 0;
        TOP: setp.lt.u32 %p1, %lane, 7; @%p1 bra MEET; bra LONG;
        MEET: gatetest.together %r5; bra DONE;
        LONG: add.s32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 5; @%p2 bra LONG; bra MEET;
        DONE: {STORE}
    """
    result = run(body, threads=64)
    assert (result.out == 32).all()


def test_a_collective_waits_for_lanes_that_leave_by_exiting():
    body = f"""
        mov.b32 %r5, 0; setp.ge.u32 %p1, %lane, 7; @%p1 bra DONE;
        gatetest.together %r5;
        DONE: {STORE}
    """
    result = run(body, threads=32)
    assert result.rules == []
    assert (result.out[:, 0] == np.where(np.arange(32) < 7, 7, 0)).all()


LATECOMER = """
    setp.ne.u32 %p1, %lane, 0; @%p1 bra MEET;
    gatetest.wait 99;  // opens when nobody else can run
    MEET: {collective}
    st.global.b32 [%out], %r5;
"""


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize("mask", ["-1", "%r9"])
@pytest.mark.parametrize(
    ("collective", "expected"),
    [
        ("elect.sync %r4|%p2, {mask}; selp.b32 %r5, 1, 0, %p2;", [1] + 31 * [0]),
        ("shfl.sync.idx.b32 %r5, %lane, 0, 31, {mask};", 32 * [0]),
        ("vote.sync.ballot.b32 %r5, %p1, {mask};", 32 * [0xFFFF_FFFE]),
        ("match.any.sync.b32 %r5, 7, {mask};", 32 * [0xFFFF_FFFF]),
        ("redux.sync.add.u32 %r5, %lane, {mask};", 32 * [496]),
        ("bar.warp.sync {mask}; activemask.b32 %r5;", 32 * [0xFFFF_FFFF]),
    ],
)
def test_lanes_that_wait_for_something_asynchronous_are_waited_for(
    collective, expected, mask, completion
):
    """The other lanes must not elect a leader, or vote, without the one that comes later."""
    body = "mov.b32 %r9, -1;" + LATECOMER.format(collective=collective.format(mask=mask))
    result = run(body, strict=True, completion=completion)
    assert result.out[:, 0].tolist() == expected


@pytest.mark.parametrize("mask", ["0xfffffffe", "%r9"])
def test_lanes_that_are_no_members_are_not_waited_for(mask):
    """Lane 0 waits for the gate that the leader of the others opens."""
    body = f"""
        mov.b32 %r9, 0xfffffffe; mov.b32 %r5, 7;
        setp.ne.u32 %p1, %lane, 0; @%p1 bra OTHERS;
        gatetest.wait 1; bra DONE;
        OTHERS: elect.sync %r5|%p2, {mask}; @%p2 gatetest.open 1;
        DONE: {STORE}
    """
    result = run(body, strict=True)
    assert result.out[:, 0].tolist() == [7] + 31 * [1]


def test_two_groups_of_lanes_have_members_of_their_own():
    body = f"""
        setp.lt.u32 %p1, %lane, 16; selp.b32 %r9, 0x0000ffff, 0xffff0000, %p1;
        setp.ne.u32 %p3, %lane, 0; @%p3 bra MEET;
        gatetest.wait 99;
        MEET: elect.sync %r5|%p2, %r9; {STORE}
    """
    result = run(body, strict=True)
    assert result.out[:, 0].tolist() == 16 * [0] + 16 * [16]


@pytest.mark.parametrize(
    "collective",
    [
        "elect.sync %r5|%p2, -1;",
        "vote.sync.ballot.b32 %r5, %p1, -1;",
        "@%p1 redux.sync.add.u32 %r5, %lane, -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [%smem];",
        "gatetest.together %r5;",
    ],
)
def test_a_collective_without_all_its_members_is_reported(collective):
    """Lane 0 is held at a gate that only opens behind the collective: on hardware all hang."""
    body = f"""
        mov.b32 %r5, 0; setp.ne.u32 %p1, %lane, 0; @%p1 bra OTHERS;
        gatetest.wait 1; bra DONE;
        OTHERS: {collective.replace("{{", "{").replace("}}", "}")} gatetest.open 1;
        DONE: {STORE}
    """
    result = run(body, checks=False)
    assert result.rules == ["divergent-collective"]
    assert result.launch.hazards[0].ptx_line == result.line("OTHERS:")
    assert "31 of a warp's 32 threads" in result.launch.hazards[0].message


def test_a_guard_that_leaves_members_out_is_reported():
    result = run(f"mov.b32 %r5, 0; setp.ne.u32 %p1, %lane, 3; @%p1 elect.sync %r5|%p2, -1; {STORE}")
    assert result.rules == ["divergent-collective"]


def test_a_warp_barrier_is_met_at_different_instructions():
    """Both arms of a branch hold one, as the ISA allows."""
    body = f"""
        setp.lt.u32 %p1, %lane, 9; @%p1 bra LOW;
        gatetest.wait 1; bar.warp.sync -1; mov.b32 %r5, 1; bra DONE;
        LOW: gatetest.open 1; bar.warp.sync -1; mov.b32 %r5, 2;
        DONE: {STORE}
    """
    result = run(body, strict=True)
    assert result.out[:, 0].tolist() == 9 * [2] + 23 * [1]


def test_a_warp_barrier_that_a_lane_never_reaches_is_a_deadlock():
    body = f"""
        setp.eq.u32 %p1, %lane, 0; @%p1 bra FIRST;
        bar.warp.sync -1; gatetest.open 1; bra DONE;
        FIRST: gatetest.wait 1;
        DONE: {STORE}
    """
    result = run(body)
    assert result.rules == ["deadlock"]
    assert "bar.warp.sync 0xffffffff (31 of 32 arrived)" in result.launch.hazards[0].message


def test_a_warp_is_whole_when_its_other_lanes_have_exited():
    body = f"setp.ge.u32 %p1, %lane, 20; @%p1 exit; gatetest.together %r5; {STORE}"
    result = run(body, threads=40)
    assert (result.out[:20, 0] == 20).all()
    assert (result.out[32:40, 0] == 8).all()


def test_warps_take_different_roles():
    body = f"""
        setp.eq.u32 %p1, %warp, 0; @%p1 bra PRODUCER;
        gatetest.wait 1; mov.b32 %r5, 11; bra DONE;
        PRODUCER: mov.b32 %r5, 22; gatetest.open 1;
        DONE: {STORE}
    """
    result = run(body, threads=96, strict=True)
    assert (result.out[:32] == 22).all()
    assert (result.out[32:] == 11).all()


def test_a_guarded_wait_holds_only_the_lanes_of_its_guard():
    body = f"""
        mov.b32 %r5, 1; setp.eq.u32 %p1, %warp, 1; @%p1 gatetest.wait 1;
        setp.eq.u32 %p2, %warp, 0; @%p2 gatetest.open 1; mov.b32 %r5, 2; {STORE}
    """
    assert (run(body, threads=64, strict=True).out == 2).all()


# --- polls, time-outs, idle work ------------------------------------------------------------------


def test_a_spinning_warp_lets_the_one_it_waits_for_run():
    body = f"""
        setp.eq.u32 %p1, %warp, 1; @%p1 bra OPENER;
        SPIN: gatetest.poll %p2, 3; @!%p2 bra SPIN; mov.b32 %r5, 5; bra DONE;
        OPENER: mov.b32 %r4, 0;
        WORK: add.s32 %r4, %r4, 1; setp.lt.u32 %p3, %r4, 50; @%p3 bra WORK;
        gatetest.open 3; mov.b32 %r5, 6;
        DONE: {STORE}
    """
    result = run(body, threads=64, strict=True)
    assert (result.out[:32] == 5).all()
    assert (result.out[32:] == 6).all()


def test_one_lane_spins_while_the_rest_of_its_warp_waits_at_a_collective():
    body = f"""
        setp.eq.u32 %p1, %warp, 1; @%p1 bra OPENER;
        setp.ne.u32 %p2, %lane, 0; @%p2 bra MEET;
        SPIN: gatetest.poll %p3, 3; @!%p3 bra SPIN;
        MEET: gatetest.together %r5; bra DONE;
        OPENER: gatetest.open 3; mov.b32 %r5, 6;
        DONE: {STORE}
    """
    result = run(body, threads=64, strict=True)
    assert (result.out[:32] == 32).all()


def test_a_wait_with_a_time_out_is_let_go_when_nobody_else_can_run():
    body = f"gatetest.try %p1, 5; selp.b32 %r5, 1, 2, %p1; {STORE}"
    assert (run(body, strict=True).out == 2).all()


def test_a_wait_with_a_time_out_that_ends_in_time():
    body = f"""
        setp.eq.u32 %p2, %warp, 1; @%p2 bra OPENER;
        gatetest.try %p1, 5; selp.b32 %r5, 1, 2, %p1; bra DONE;
        OPENER: gatetest.open 5; mov.b32 %r5, 3;
        DONE: {STORE}
    """
    result = run(body, threads=64, strict=True)
    assert (result.out[:32] == 1).all()


def test_subsystems_finish_asynchronous_work_when_nobody_can_run():
    body = f"gatetest.wait 99; mov.b32 %r5, 4; {STORE}"
    assert (run(body, threads=64, strict=True).out == 4).all()


# --- deadlock and livelock ------------------------------------------------------------------------


def test_a_deadlock_names_every_waiter_and_what_it_waits_for():
    body = f"""
        setp.eq.u32 %p1, %warp, 1; @%p1 bra OTHER;
        gatetest.wait 1; bra DONE;
        OTHER: gatetest.wait 2;
        DONE: {STORE}
    """
    with pytest.raises(HazardError) as caught:
        run(body, threads=64, ctas=2, strict=True)
    hazard = caught.value.hazard
    assert hazard.rule == "deadlock"
    assert "128 threads" in hazard.message
    for fact in ("gate 1", "gate 2", "gatetest.wait 1", "gatetest.wait 2"):
        assert fact in hazard.message
    for cta in ("(0, 0, 0)", "(1, 0, 0)"):
        assert cta in hazard.message
    assert "gate 1: closed" in hazard.message
    assert caught.value.launch.counters.warp_instructions > 0


def test_a_deadlock_does_not_stop_a_lenient_launch():
    body = f"setp.eq.u32 %p1, %warp, 1; @%p1 gatetest.wait 1; mov.b32 %r5, 7; {STORE}"
    result = run(body, threads=64)
    assert result.rules == ["deadlock"]
    assert (result.out[:32] == 7).all()
    assert (result.out[32:] == 0xEEEEEEEE).all()


def test_a_poll_that_can_never_succeed_is_a_deadlock():
    body = f"SPIN: gatetest.poll %p2, 3; @!%p2 bra SPIN; {STORE}"
    result = run(body, threads=64)
    assert result.rules == ["deadlock"]
    assert "gatetest.poll" in result.launch.hazards[0].message


def test_an_endless_loop_is_given_up():
    with pytest.raises(HazardError) as caught:
        run("LOOP: add.s32 %r5, %r5, 1; bra LOOP;", strict=True, max_block_steps=1000)
    assert caught.value.hazard.rule == "livelock"
    assert "1000" in caught.value.hazard.message


# --- random order ---------------------------------------------------------------------------------

RACE_FREE = f"""
    mov.b32 %r4, 0; mov.b32 %r5, 0;
    LOOP: add.s32 %r5, %r5, %lane; bar.sync 0; add.s32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 4; @%p1 bra LOOP; {STORE}
"""
ORDER = """
    setp.eq.u32 %p1, %lane, 0; mov.b32 %r4, 0;
    LOOP: @%p1 atom.global.add.u32 %r5, [%in0], 1; add.s32 %r4, %r4, 1;
    setp.lt.u32 %p2, %r4, 6; @%p2 bra LOOP;
    st.global.b32 [%out], %r5;
"""


@pytest.mark.parametrize("seed", range(5))
def test_random_order_keeps_the_results_of_a_correct_program(seed):
    result = run(RACE_FREE, threads=128, ctas=2, completion="random", seed=seed, strict=True)
    assert (result.out[:, 0] == 4 * (np.arange(256) % 32)).all()


def test_random_order_depends_on_the_seed_only():
    def order(seed):
        result = run(ORDER, threads=256, completion="random", seed=seed, strict=True)
        return tuple(result.out[::32, 0])

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(6)}) > 1
