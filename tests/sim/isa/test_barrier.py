"""Barriers: who waits for whom, reductions, counts, misuse, and what a barrier orders."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim.hazards import HazardError
from tests.sim.tiny import run

POLICIES = ["eager", "random"]

EXCHANGE = """
    shl.b32 %r3, %tid, 2; add.u32 %r3, %r3, %smem;
    xor.b32 %r4, %tid, {mask}; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %smem;
    st.shared.b32 [%r3], %tid;
    {barrier}
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%out], %r5;
"""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.sync 3, 128;",
        "barrier.sync 0;",
        "barrier.sync.aligned 1, 128;",
        "barrier.cta.sync.aligned 2;",
        "bar.cta.sync 15;",
        "mov.b32 %r6, 5; mov.b32 %r7, 128; bar.sync %r6, %r7;",
    ],
)
def test_a_barrier_orders_stores_before_loads(policy, barrier):
    for seed in range(3):
        result = run(
            EXCHANGE.format(mask=96, barrier=barrier),
            threads=128,
            ctas=3,
            completion=policy,
            seed=seed,
        )
        assert result.rules == []
        assert (result.out[:, 0] == np.tile(np.arange(128) ^ 96, 3)).all()
    assert result.launch.counters["barrier_waits"] == 12


@pytest.mark.parametrize("policy", POLICIES)
def test_without_the_barrier_it_is_a_race(policy):
    result = run(EXCHANGE.format(mask=96, barrier=""), threads=128, completion=policy)
    assert "shared-race" in result.rules or "uninitialised-shared-read" in result.rules


@pytest.mark.parametrize("policy", POLICIES)
def test_a_warp_that_parts_between_two_barriers_is_reported(policy):
    """bar.sync is .aligned: all threads of a warp execute the same one (PTX ISA, bar)."""
    parted = """
        setp.lt.u32 %p1, %tid, {limit}; @%p1 bra FIRST; bar.sync 0; bra DONE;
        FIRST: bar.sync 0;
        DONE: st.global.b32 [%out], %tid;
    """
    torn = run(parted.format(limit=48), threads=64, completion=policy)
    assert "divergent-collective" in torn.rules
    whole = run(parted.format(limit=32), threads=64, completion=policy)
    assert whole.rules == [] and (whole.out[:, 0] == np.arange(64)).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_barriers_of_pairs_of_warps_with_ids_in_registers(policy):
    pairs = "shr.u32 %r6, %warp, 1; add.u32 %r6, %r6, 1; bar.sync %r6, 64;"
    clean = run(EXCHANGE.format(mask=32, barrier=pairs), threads=128, completion=policy)
    assert clean.rules == [] and (clean.out[:, 0] == np.arange(128) ^ 32).all()
    wrong = run(EXCHANGE.format(mask=64, barrier=pairs), threads=128, completion=policy)
    assert set(wrong.rules) & {"shared-race", "uninitialised-shared-read"}


PRODUCER_CONSUMER = """
    setp.lt.u32 %p1, %warp, 2;
    shl.b32 %r3, %tid, 2; add.u32 %r3, %r3, %smem;
    @!%p1 bra consumer;
    st.shared.b32 [%r3], %tid;
    {produced}
    bra done;
    consumer:
    {wait}
    ld.shared.b32 %r5, [%r3+-256];
    st.global.b32 [%out], %r5;
    done:
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_arrive_and_sync(policy):
    for seed in range(3):
        clean = run(
            PRODUCER_CONSUMER.format(produced="bar.arrive 1, 128;", wait="bar.sync 1, 128;"),
            threads=128,
            completion=policy,
            seed=seed,
        )
        assert clean.rules == []
        assert (clean.out[64:, 0] == np.arange(64)).all()


def test_an_arrival_does_not_order_what_follows_it():
    late = run(
        PRODUCER_CONSUMER.format(
            produced="bar.arrive 1, 128; st.shared.b32 [%r3], 5;", wait="bar.sync 1, 128;"
        ),
        threads=128,
    )
    assert late.rules == ["shared-race"]


@pytest.mark.parametrize(
    ("operator", "limit", "expected"),
    [
        ("popc.u32", 70, 70),
        ("popc.u32", 0, 0),
        ("and.pred", 70, 0),
        ("and.pred", 200, 1),
        ("or.pred", 70, 1),
        ("or.pred", 0, 0),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("negate", ["", "!"])
def test_reductions(operator, limit, expected, policy, negate):
    if negate and operator == "popc.u32":
        expected = 128 - expected
    elif negate:
        satisfied = 128 - min(limit, 128)
        expected = int(satisfied == 128) if operator == "and.pred" else int(satisfied > 0)
    is_count = operator == "popc.u32"
    body = f"""
        setp.lt.u32 %p1, %tid, {limit};
        bar.red.{operator} {"%r3" if is_count else "%p2"}, 0, {negate}%p1;
        {"" if is_count else "selp.b32 %r3, 1, 0, %p2;"}
        st.global.b32 [%out], %r3;
    """
    result = run(body, threads=128, ctas=2, completion=policy)
    assert result.rules == [] and (result.out == expected).all()
    assert result.launch.counters["barrier_waits"] == 8


def test_reductions_repeat_in_loops_and_take_counts():
    result = run(
        """
        mov.b32 %r8, 0; mov.b32 %r9, 0;
        setp.ge.u32 %p3, %warp, 3; @%p3 bra done;
        loop:
        setp.lt.u32 %p1, %tid, %r8;
        barrier.red.popc.aligned.u32 %r3, 4, 96, %p1;
        add.u32 %r9, %r9, %r3;
        add.u32 %r8, %r8, 1; setp.lt.u32 %p2, %r8, 5; @%p2 bra loop;
        st.global.b32 [%out], %r9;
        done:
        """,
        threads=128,
        completion="random",
    )
    assert result.rules == [] and (result.out[:96] == 0 + 1 + 2 + 3 + 4).all()


def test_a_barrier_for_all_does_not_wait_for_threads_that_have_exited():
    result = run(
        """
        setp.ge.u32 %p1, %warp, 3; @%p1 ret;
        bar.sync 0;
        st.global.b32 [%out], 1;
        """,
        threads=128,
    )
    assert result.rules == [] and (result.out[:96] == 1).all()
    late = run(
        """
        setp.lt.u32 %p1, %warp, 3; @%p1 bra wait;
        st.shared.b32 [%smem], 1;
        ret;
        wait: bar.sync 0;
        st.global.b32 [%out], 1;
        """,
        threads=128,
        completion="random",
    )
    assert late.rules == [] and (late.out[:96] == 1).all()


def test_a_cta_that_is_not_whole_warps():
    result = run(EXCHANGE.format(mask=0, barrier="bar.sync 0;"), threads=72, ctas=2)
    assert result.rules == [] and (result.out[:, 0] == np.tile(np.arange(72), 2)).all()


MISUSE = {
    "barrier-count": "bar.sync 1, 48;",
    "barrier-id": "mov.b32 %r6, 16; bar.sync %r6;",
    "barrier-count-mismatch": (
        "setp.lt.u32 %p1, %warp, 1; mov.b32 %r6, 64; @%p1 mov.b32 %r6, 128; bar.sync 1, %r6;"
    ),
    "deadlock": (
        "setp.ne.u32 %p1, %warp, 0; @%p1 bra skip; bar.arrive 1, 96; "
        "skip: @!%p1 bra done; barrier.sync 1, 96; done:"
    ),
    "barrier-kind-mismatch": (
        "setp.lt.u32 %p1, %warp, 2; @%p1 bra other; bar.sync 1, 128; bra done;"
        "other: bar.red.popc.u32 %r3, 1, 128, %p1; done:"
    ),
}


@pytest.mark.parametrize("rule", MISUSE)
def test_misuse(rule):
    result = run(MISUSE[rule], threads=128)
    assert rule in result.rules
    with pytest.raises(HazardError) as caught:
        run(MISUSE[rule], threads=128, strict=True)
    assert caught.value.hazard.rule == result.rules[0]


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize("barrier", ["bar.sync 1, 64;", "barrier.sync 1, 64;", "bar.sync 1, 32;"])
def test_more_threads_than_a_barrier_expects_are_of_its_next_use(barrier, completion):
    """Four warps come; who meets whom is open, but everybody goes on."""
    result = run(barrier + "st.global.b32 [%out], 1;", threads=128, completion=completion)
    assert result.rules == [] and (result.out == 1).all()


def test_threads_of_a_barriers_next_use_wait_for_it():
    """Three of four warps are one and a half uses."""
    result = run(
        "setp.eq.u32 %p1, %warp, 3; @%p1 bra done; bar.sync 1, 64; st.global.b32 [%out], 1; done:",
        threads=128,
    )
    assert result.rules == ["deadlock"]
    assert "barrier 1 (32 of 64 arrived)" in str(result.launch.hazards[0])
    assert (result.out[:64] == 1).all() and (result.out[64:] != 1).all()


def test_a_count_larger_than_the_cta_is_reported():
    assert run("bar.sync 1, 256;", threads=128).rules == ["barrier-count"]


def test_a_missing_arrival_is_a_deadlock_that_names_the_barrier():
    result = run("setp.eq.u32 %p1, %warp, 2; @%p1 bra done; bar.sync 6, 128; done:", threads=128)
    assert result.rules == ["deadlock"]
    text = str(result.launch.hazards[0])
    assert "barrier 6" in text and "96 of 128" in text and "bar.sync 6, 128" in text


def test_arrive_needs_a_count():
    with pytest.raises(UnsupportedError, match="without a thread count"):
        run("bar.arrive 1;")


@pytest.mark.parametrize(
    "fence",
    [
        "membar.cta;",
        "membar.gl;",
        "fence.acq_rel.cta;",
        "fence.sc.gpu;",
        "fence.proxy.async.shared::cta;",
        "fence.proxy.async;",
        "fence.mbarrier_init.release.cluster;",
        "bar.warp.sync 0xffffffff;",
        "bar.warp.sync -1;",
    ],
)
def test_fences_change_no_value_and_order_nothing_between_warps(fence):
    same = run(EXCHANGE.format(mask=1, barrier=fence), threads=64, arch="sm_90a")
    assert same.rules == [] and (same.out[:, 0] == np.arange(64) ^ 1).all()
    other = run(EXCHANGE.format(mask=32, barrier=fence), threads=64, arch="sm_90a")
    assert other.rules == ["shared-race"]
