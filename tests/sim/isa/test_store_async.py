"""red.async, st.bulk and what is refused of their kin (PTX ISA 9.7.13.7, 9.7.9.13, 9.7.9.14)."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.test_cluster import POLICIES, RANKS, SYNC, program
from tests.sim.test_mbarrier import init, wait
from tests.sim.tiny import Result, run

REDUCTIONS = {
    "add.u32": lambda old, new: old + new,
    "add.s32": lambda old, new: old + new,
    "min.s32": min,
    "max.u32": max,
    "or.b32": lambda old, new: old | new,
    "xor.b32": lambda old, new: old ^ new,
    "and.b32": lambda old, new: old & new,
    "inc.u32": lambda old, new: 0 if old >= new else old + 1,
    "dec.u32": lambda old, new: new if old == 0 or old > new else old - 1,
}

# Every CTA's mbarrier expects a word of each lane, and the word of each lane holds its tid.
PREPARED = (
    init(1)
    + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 128;\n"
    + "fence.mbarrier_init.release.cluster;\n"
    + RANKS
    + "st.shared.b32 [%r15+1024], %tid;\n"
    + SYNC
)


@POLICIES
@pytest.mark.parametrize("form", sorted(REDUCTIONS))
def test_asynchronous_reductions_in_the_next_cta(form: str, completion: str) -> None:
    """Every lane reduces 3 * rank into the word of its tid, which holds the tid."""
    body = (
        PREPARED
        + f"""
    mapa.shared::cluster.u32 %r20, %smem, %r12; mul.lo.u32 %r21, %r10, 3;
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{form}
        [%r13+1024], %r21, [%r20];
    """
        + wait(0)
        + "ld.shared.b32 %r22, [%r15+1024]; st.global.b32 [%out], %r22;"
        + SYNC
    )
    got = program(body, completion=completion, seed=3)
    assert got.rules == []
    rows = got.out.reshape(4, 32)
    for cta in range(4):
        want = [REDUCTIONS[form](tid, 3 * ((cta - 1) % 4)) for tid in range(32)]
        assert rows[cta].tolist() == want


def test_a_reduction_of_64_bits() -> None:
    body = (
        init(1)
        + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 256;\n"
        + "fence.mbarrier_init.release.cluster;\n"
        + RANKS
        + "mov.b64 %rd5, 0xffffffff; st.shared.b64 [%smem+1024], %rd5;\n"
        + SYNC
        + """
    mapa.shared::cluster.u32 %r20, %smem, %r12; mov.b64 %rd6, 2;
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64
        [%r20+1024], %rd6, [%r20];
    """
        + wait(0)
        + "ld.shared.b64 %rd7, [%smem+1024]; st.global.b64 [%out], %rd7;"
        + SYNC
    )
    got = program(body, words=2)
    assert set(got.out.view(np.uint64).reshape(-1).tolist()) == {0xFFFFFFFF + 64}


INTO_ONE = (
    init(1)
    + RANKS
    + "setp.eq.and.u32 %p2, %r10, 0, %p0;\n"
    + "@%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], {nbytes};\n"
    + "fence.mbarrier_init.release.cluster;\n"
    + "{first}"
    + SYNC
    + """
    mapa.shared::cluster.u32 %r20, %smem, 0;
    add.u32 %r21, %r20, %r14;
    setp.eq.u32 %p1, %r10, 0;
    {own}
    @!%p1 red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32
        [%r21+1024], %r10, [%r20];
    {early}
    @!%p1 bra END;
    """
    + wait(0).replace("{", "{{").replace("}", "}}")
    + """
    ld.shared.b32 %r22, [%r15+1024]; st.global.b32 [%out], %r22;
    END:
    """
    + SYNC
)
"""CTAs 1 to 3 add their ranks to words of CTA 0, which hold 100."""
FILLED = "st.shared.b32 [%r15+1024], 100;\n"


def add_into_one(**parts: object) -> Result:
    words = {"nbytes": 3 * 128, "first": FILLED, "own": "", "early": ""}
    options = {name: parts.pop(name) for name in ("completion", "seed") if name in parts}
    return program(INTO_ONE.format(**{**words, **parts}), **options)


@POLICIES
@pytest.mark.parametrize("own", ["", "@%p1 red.shared.add.u32 [%r15+1024], 5;"])
def test_reductions_to_one_place_may_overlap(own: str, completion: str) -> None:
    """With each other and with the target's own atomics."""
    got = add_into_one(own=own, completion=completion, seed=4)
    assert got.rules == []
    assert got.out[:32, 0].tolist() == [100 + 6 + 5 * bool(own)] * 32


ASYNC_MISTAKES = {
    "a read that does not wait": (
        {"early": "@%p1 ld.shared.b32 %r23, [%r15+1024];"},
        {"read-before-arrival", "shared-race"},
    ),
    "a store that does not wait": (
        {"early": "@%p1 st.shared.b32 [%r15+1024], 1;"},
        {"write-while-copy-in-flight", "shared-race"},
    ),
    "nothing orders what was there before": (
        {"first": "", "own": "@%p1 " + FILLED},
        {"write-while-copy-in-flight", "shared-race"},
    ),
    "a read that may come too late": (
        {"own": "@%p1 ld.shared.b32 %r23, [%r15+1024];"},
        {"read-before-arrival", "shared-race"},
    ),
    "one CTA is not waited for": (
        {"nbytes": 2 * 128},
        {"mbarrier-overrun", "mbarrier-transactions", "read-before-arrival"},
    ),
}


@POLICIES
@pytest.mark.parametrize("mistake", ASYNC_MISTAKES)
def test_races_of_asynchronous_reductions(mistake: str, completion: str) -> None:
    parts, rules = ASYNC_MISTAKES[mistake]
    assert not rules.isdisjoint(add_into_one(**parts, completion=completion, seed=4).rules)


ACROSS_PROXIES = (
    PREPARED
    + """
    mapa.shared::cluster.u32 %r20, %smem, %r12;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r13+1024], %lane, [%r20];
    """
    + wait(0).replace("{", "{{").replace("}", "}}")
    + """
    {fence}
    bar.sync 0;
    add.u32 %r21, %smem, 1024;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r21], 128;
    @%p0 cp.async.bulk.commit_group;
    @%p0 cp.async.bulk.wait_group 0;
    """
    + SYNC
)


@POLICIES
@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
def test_asynchronous_stores_use_the_generic_proxy(fence: str, completion: str) -> None:
    """Where threads wrote before they need no proxy fence; a bulk copy of what they wrote does."""
    got = program(ACROSS_PROXIES.format(fence=fence), completion=completion, seed=5)
    assert got.rules == ([] if fence else ["missing-proxy-fence"])
    assert got.out.reshape(4, 32).tolist() == [list(range(32))] * 4


@POLICIES
@pytest.mark.parametrize("barrier", ["bar.sync 0;", SYNC])
def test_every_atomic_has_to_come_before_a_read(barrier: str, completion: str) -> None:
    """CTAs add to one word, which CTA 0 reads: behind its own barrier or behind the cluster's."""
    body = (
        RANKS
        + "st.shared.b32 [%smem+1024], 0;\n"
        + SYNC
        + "mapa.shared::cluster.u32 %r20, %smem, 0;\n"
        + "red.relaxed.cluster.shared::cluster.add.u32 [%r20+1024], 1;\n"
        + f"{barrier}\nsetp.eq.u32 %p1, %r10, 0;\n"
        + "@%p1 ld.shared.b32 %r22, [%smem+1024];\n@%p1 st.global.b32 [%out], %r22;\n"
        + SYNC
    )
    got = program(body, completion=completion, seed=6)
    if barrier == SYNC:
        assert got.rules == [] and set(got.out[:32, 0].tolist()) == {128}
    else:
        assert set(got.rules) == {"shared-race"}


@pytest.mark.parametrize("address", ["%smem", "%rd5"])
def test_bulk_zeros(address: str) -> None:
    body = f"""
        mov.b32 %r3, 0xffffffff;
        shl.b32 %r5, %tid, 2; add.u32 %r5, %r5, %smem; st.shared.b32 [%r5], %r3;
        cvt.u64.u32 %rd5, %smem; cvta.shared.u64 %rd5, %rd5;
        bar.sync 0;
        setp.eq.u32 %p1, %tid, 3; mov.b64 %rd6, 40;
        @%p1 st.bulk.weak.shared::cta [{address}], %rd6, 0;
        bar.sync 0;
        ld.shared.b32 %r6, [%r5]; st.global.b32 [%out], %r6;
    """
    result = run(body.replace("weak.shared::cta [%rd5]", "weak [%rd5]"), arch="sm_100a")
    assert result.rules == []
    assert result.out.reshape(-1).tolist() == [0] * 10 + [0xFFFFFFFF] * 22
    assert result.launch.counters["shared_bytes_written"] == 128 + 40


def test_bulk_zeros_initialise_and_are_checked() -> None:
    body = """
        setp.eq.u32 %p1, %tid, 0; mov.b64 %rd6, {size};
        @%p1 st.bulk.shared::cta [%smem], %rd6, 0;
        bar.sync 0; shl.b32 %r5, %tid, 2; add.u32 %r5, %r5, %smem; ld.shared.b32 %r6, [%r5];
    """
    assert run(body.format(size=128), arch="sm_100a").rules == []
    assert run(body.format(size=64), arch="sm_100a").rules == ["uninitialised-shared-read"]
    assert "bulk-operands" in run(body.format(size=132), arch="sm_100a").rules
    assert "shared-out-of-bounds" in run(body.format(size=4104), arch="sm_100a").rules


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("multimem.red.global.add.f32 [%out], %r1;", "several GPUs"),
        ("multimem.ld_reduce.global.add.f32 %r1, [%out];", "several GPUs"),
        ("st.async.mmio.release.sys.global.b32 [%out], %r1;", "other than by an mbarrier"),
        ("st.bulk.weak.shared::cta [%smem], %rd1, 1;", "initial value"),
    ],
)
def test_what_is_not_simulated_is_refused_by_name(line: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        run(line, arch="sm_100a")
