"""mbarriers: counts, transactions, phases, tokens, ordering, and what goes wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.hazards import RULES
from tests.sim.tiny import Result, run

WAIT = """
{{ .reg .pred P1;
LAB_WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%smem{at}], {parity}, 10000000;
@P1 bra.uni DONE;
bra.uni LAB_WAIT;
DONE: }}
"""


def wait(parity: int = 0, at: str = "") -> str:
    return WAIT.format(parity=parity, at=at)


def init(count: int, at: str = "") -> str:
    """Thread 0 makes a barrier; everybody knows."""
    return f"""
    setp.eq.u32 %p0, %tid, 0;
    mov.u32 %r9, {count};
    @%p0 mbarrier.init.shared.b64 [%smem{at}], %r9;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    """


def program(body: str, **options: object) -> Result:
    return run(body, **{"arch": "sm_90a", **options})  # type: ignore[arg-type]


POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])


@POLICIES
def test_producer_consumer_ring_orders_both_ways(completion: str) -> None:
    """Warp 0 hands four values through one slot to warp 1."""
    body = (
        init(32, "")
        + init(32, "+8")
        + """
    mov.u32 %r10, 0;  mov.u32 %r11, 0;  mov.u32 %r20, 0;
    setp.eq.u32 %p1, %warp, 0;
    LOOP:
    and.b32 %r11, %r10, 1;
    xor.b32 %r12, %r11, 1;
    @!%p1 bra CONSUME;
    """
        + wait("%r12", "+8").replace("LAB_", "LA_").replace("DONE", "DONE_A")
        + """
    shl.b32 %r13, %lane, 2; add.u32 %r13, %r13, %smem;
    mad.lo.s32 %r14, %r10, 100, %lane;
    st.shared.u32 [%r13+64], %r14;
    mbarrier.arrive.shared.b64 %rd1, [%smem];
    bra NEXT;
    CONSUME:
    """
        + wait("%r11", "")
        + """
    shl.b32 %r13, %lane, 2; add.u32 %r13, %r13, %smem;
    ld.shared.u32 %r14, [%r13+64];
    add.u32 %r20, %r20, %r14;
    mbarrier.arrive.shared.b64 _, [%smem+8];
    NEXT:
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p2, %r10, 4;
    @%p2 bra LOOP;
    st.global.u32 [%out], %r20;
    """
    )
    got = program(body, threads=64, completion=completion, seed=3)
    assert got.rules == []
    assert got.out[32:, 0].tolist() == [600 + 4 * lane for lane in range(32)]


@POLICIES
def test_a_slot_that_threads_have_read_is_filled_anew_behind_a_proxy_fence(completion: str) -> None:
    """The barrier orders them for all that is known of hardware: only the strict rule asks."""
    copy = """
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 128;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r13], [%in0], 128, [%smem];
    """
    body = init(1) + "add.u32 %r13, %smem, 128;" + copy + wait(0)
    body += "mad.lo.u32 %r14, %tid, 4, %r13; ld.shared.u32 %r15, [%r14]; {fence}\nbar.sync 1, 32;"
    body += copy + wait(1).replace("LAB_", "LB_").replace("DONE", "DONE_B")
    data, every = np.zeros(32, np.uint32), frozenset(RULES)

    def rules(fence: str, checks: bool | frozenset[str]) -> list[str]:
        text = body.replace("{fence}", fence)
        return program(text, data=data, completion=completion, checks=checks).rules

    assert rules("", True) == []
    assert rules("", every) == ["unfenced-async-overwrite"]
    assert rules("fence.proxy.async.shared::cta;", every) == []

    def stored() -> list[str]:
        """A bulk store reads the slot in place of the threads: both ends are the async proxy's."""
        store = "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%out0], [%r13], 128;"
        text = init(1) + "add.u32 %r13, %smem, 128;" + copy + wait(0) + store
        text += "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; bar.sync 1, 32;"
        text += copy + wait(1).replace("LAB_", "LB_").replace("DONE", "DONE_B")
        return program(text, data=data, completion=completion, checks=every).rules

    assert stored() == []


def test_without_the_empty_barrier_the_slot_is_overwritten() -> None:
    body = (
        init(32)
        + """
    setp.eq.u32 %p1, %warp, 0;
    shl.b32 %r13, %lane, 2; add.u32 %r13, %r13, %smem;
    @!%p1 bra CONSUME;
    st.shared.u32 [%r13+64], %lane;
    mbarrier.arrive.shared.b64 _, [%smem];
    st.shared.u32 [%r13+64], %lane;
    bra END;
    CONSUME:
    """
        + wait(0)
        + "ld.shared.u32 %r14, [%r13+64];\nEND:\n"
    )
    assert program(body, threads=64).rules == ["shared-race"]


def test_tokens_and_pending_counts() -> None:
    body = (
        init(33)
        + """
    mbarrier.arrive.noComplete.shared.b64 %rd1, [%smem], 1;
    mbarrier.pending_count.b64 %r10, %rd1;
    mbarrier.test_wait.shared.b64 %p1, [%smem], %rd1;
    selp.u32 %r11, 1, 0, %p1;
    @%p0 mbarrier.arrive.shared.b64 _, [%smem];
    mbarrier.test_wait.shared.b64 %p2, [%smem], %rd1;
    selp.u32 %r12, 1, 0, %p2;
    st.global.v4.u32 [%out], {%r10, %r11, %r12, 0};
    """
    )
    got = program(body, words=4)
    assert got.rules == []
    assert got.out[0].tolist() == [33, 0, 1, 0]


def test_a_fresh_barrier_passes_parity_one() -> None:
    body = (
        init(1)
        + """
    mbarrier.test_wait.parity.shared.b64 %p1, [%smem], 1;
    mbarrier.test_wait.parity.shared.b64 %p2, [%smem], 0;
    selp.u32 %r1, 1, 0, %p1;  selp.u32 %r2, 1, 0, %p2;
    st.global.v2.u32 [%out], {%r1, %r2};
    """
    )
    assert program(body, words=2).out.tolist() == [[1, 0]] * 32


def test_transactions_hold_the_phase() -> None:
    """complete before expect makes the count negative for a while, which is legal."""
    body = (
        init(1)
        + """
    @%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%smem], 16;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 48;
    bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%smem], 0;
    selp.u32 %r1, 1, 0, %p1;
    bar.sync 0;
    @%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%smem], 32;
    bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%smem], 0;
    selp.u32 %r2, 1, 0, %p1;
    st.global.v2.u32 [%out], {%r1, %r2};
    """
    )
    got = program(body, words=2, threads=64)
    assert got.rules == []
    assert got.out.tolist() == [[0, 1]] * 64


def test_arrive_drop_lowers_later_phases() -> None:
    body = (
        init(3)
        + """
    @%p0 mbarrier.arrive_drop.shared.b64 %rd1, [%smem];
    @%p0 mbarrier.arrive.shared.b64 %rd1, [%smem], 2;
    bar.sync 0;
    """
        + wait(0)
        + """
    bar.sync 0;
    @%p0 mbarrier.arrive.shared.b64 %rd1, [%smem], 2;
    bar.sync 0;
    mbarrier.test_wait.parity.shared.b64 %p1, [%smem], 1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out], %r1;
    """
    )
    got = program(body)
    assert got.rules == []
    assert got.out[:, 0].tolist() == [1] * 32


def test_remote_arrivals_through_mapa() -> None:
    """Every CTA of a cluster arrives at the barrier of CTA 0, which waits for both."""
    body = (
        init(2)
        + """
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.aligned;
    mapa.shared::cluster.u32 %r10, %smem, 0;
    @%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r10], 1;
    mov.u32 %r11, %cluster_ctarank;
    setp.ne.u32 %p1, %r11, 0;
    @%p1 bra END;
    """
        + wait(0)
        + """
    mov.u32 %r12, 5;
    st.global.u32 [%out], %r12;
    END:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    """
    )
    got = program(body, ctas=4, cluster=2)
    assert got.rules == []
    assert [int(got.out[32 * c, 0]) for c in (0, 2)] == [5, 5]


@POLICIES
@pytest.mark.parametrize("verb", ["try_wait", "test_wait"])
def test_a_wait_where_no_mbarrier_is_does_not_spin_for_ever(verb: str, completion: str) -> None:
    body = wait().replace("try_wait", verb)
    if verb == "test_wait":
        body = body.replace(", 10000000", "")
    got = program(body, completion=completion, max_block_steps=10_000)
    assert got.rules == ["mbarrier-uninitialised", "deadlock"]


def test_deadlock_names_the_barrier_and_its_state() -> None:
    got = program(init(2) + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 64;" + wait(0))
    assert got.rules[0] == "deadlock"
    text = str(got.launch.hazards[0])
    assert "1 of 2 arrivals pending, 64 bytes outstanding, phase 0 (parity 0)" in text
    assert "waits for phase 0 (parity 0, 64 bytes to come)" in text and "(1 of 2 arrived)" in text
    assert got.rules[1] == "mbarrier-transactions"


BUGS = {
    "mbarrier-uninitialised": "mbarrier.arrive.shared.b64 _, [%smem];",
    "mbarrier-reinit": init(1) + "@%p0 mbarrier.init.shared.b64 [%smem], 1;",
    "mbarrier-underflow": init(31) + "mbarrier.arrive.shared.b64 _, [%smem];",
    "mbarrier-count": init(0),
    "shared-misaligned": init(1, "+4"),
    "mbarrier-transactions": init(1) + "@%p0 mbarrier.expect_tx.relaxed.cta.shared.b64 [%smem], 8;",
    "mbarrier-access": init(1) + "ld.shared.u32 %r3, [%smem];",
    "mbarrier-overrun": init(1)
    + "@%p0 mbarrier.arrive.shared.b64 _, [%smem];\n@%p0 mbarrier.arrive.shared.b64 _, [%smem];",
    "mbarrier-stale-token": init(1)
    + """
    @%p0 mbarrier.arrive.shared.b64 %rd1, [%smem];
    @%p0 mbarrier.test_wait.shared.b64 %p1, [%smem], %rd1;
    @%p0 mbarrier.arrive.shared.b64 _, [%smem];
    @%p0 mbarrier.test_wait.shared.b64 %p1, [%smem], %rd1;
    """,
}


@pytest.mark.parametrize("rule", BUGS)
def test_bugs_are_reported(rule: str) -> None:
    assert program(BUGS[rule]).rules == [rule]


def test_a_store_over_a_barrier_is_seen_without_the_shadow() -> None:
    body = (
        init(1)
        + "@%p0 st.shared.u32 [%smem], 7;\nbar.sync 0;\n@%p0 mbarrier.arrive.shared.b64 _, [%smem];"
    )
    assert program(body, checks=False).rules == ["mbarrier-access"]


def test_an_initialisation_that_nothing_orders_before_the_use() -> None:
    body = init(64).replace("bar.sync 0;", "") + "mbarrier.arrive.shared.b64 _, [%smem];"
    assert program(body, threads=64).rules == ["mbarrier-unordered"]


def test_invalidated_barriers_are_memory_again() -> None:
    body = (
        init(1)
        + """
    @%p0 mbarrier.inval.shared.b64 [%smem];
    @%p0 st.shared.u64 [%smem], 5;
    @%p0 ld.shared.u32 %r3, [%smem];
    @%p0 st.global.u32 [%out], %r3;
    """
    )
    got = program(body)
    assert got.rules == [] and got.out[0, 0] == 5


def test_waits_work_over_many_ctas_at_once() -> None:
    body = (
        init(128) + "mbarrier.arrive.shared.b64 _, [%smem];" + wait(0) + "st.global.u32 [%out], 1;"
    )
    got = program(body, threads=128, ctas=7)
    assert got.rules == [] and np.all(got.out == 1)
