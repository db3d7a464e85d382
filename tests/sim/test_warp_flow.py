"""One lane that signals for its warp: what the other lanes did has to be ordered."""

from __future__ import annotations

import pytest

from cute_fa import ptx
from cute_fa.sim.warp_flow import unsynchronised_arrivals
from tests.sim.tiny import FRAME, run

RULE = "unsynchronised-lanes"
HANDOVER = """
setp.ne.u32 %p1, %tid, 0;
@%p1 bra READY;
mbarrier.init.shared.b64 [smem], 1;
READY:
bar.sync 0;
shl.b32 %r3, %lane, 2;
add.u32 %r3, %r3, %smem;
{store}
{sync}
elect.sync %r4|%p2, -1;
@!%p2 bra OUT;
mbarrier.arrive.shared.b64 _, [smem];
OUT:
"""


def rules(store, sync, checks):
    return run(HANDOVER.format(store=store, sync=sync), arch="sm_90a", checks=checks).rules


@pytest.mark.parametrize("sync", ["bar.warp.sync -1;", "bar.sync 0;", "barrier.sync 1;"])
def test_a_warp_barrier_orders_the_lanes(sync):
    assert rules("st.shared.b32 [%r3+64], %tid;", sync, frozenset([RULE])) == []


def test_without_one_the_arrival_is_reported_if_asked_for():
    store = "st.shared.b32 [%r3+64], %tid;"
    assert rules(store, "", frozenset([RULE])) == [RULE]
    assert rules(store, "", True) == []  # sound programs do it when the lane that stored arrives
    assert rules("", "", frozenset([RULE])) == []
    assert rules("ld.shared.b32 %r5, [%smem+128];", "", frozenset([RULE]))[-1:] == [RULE]
    assert rules("ld.global.b32 %r5, [%in];", "", frozenset([RULE])) == []


def test_elect_and_shuffles_order_no_memory():
    store = "st.shared.b32 [%r3+64], %tid;"
    shuffle = "shfl.sync.bfly.b32 %r5, %tid, 1, 31, -1;"
    assert rules(store, shuffle, frozenset([RULE])) == [RULE]


def test_all_lanes_may_arrive_for_themselves():
    body = HANDOVER.replace("[smem], 1", "[smem], 32").format(
        store="st.shared.b32 [%r3+64], %tid;", sync=""
    )
    body = body.replace("@!%p2 bra OUT;", "")
    assert run(body, arch="sm_90a", checks=frozenset([RULE])).rules == []


def test_stores_are_followed_through_branches():
    """An access on one of two paths, or in an earlier round of a loop, reaches the arrival."""
    body = """
    LOOP:
    setp.eq.u32 %p1, %r3, 0;
    @%p1 bra SKIP;
    st.shared.b32 [%r3], %tid;
    SKIP:
    mbarrier.arrive.shared.b64 _, [smem];
    bar.warp.sync -1;
    mbarrier.arrive.shared.b64 _, [smem+8];
    add.u32 %r3, %r3, 1;
    @%p1 bra LOOP;
    """
    text = FRAME.format(
        arch="sm_90a", module="", declarations="", body=body, in_bytes=4, out_bytes=4
    )
    kernel = ptx.parse(text).kernels["tiny"]
    found = unsynchronised_arrivals(kernel)
    arrivals = [instr.index for instr in kernel.body if instr.parts[:2] == ("mbarrier", "arrive")]
    (store,) = [instr.index for instr in kernel.body if instr.opcode == "st.shared.b32"]
    assert found == {arrivals[0]: store}
