"""Clusters: barriers, shared memory of other CTAs, asynchronous stores; and setmaxnreg."""

from __future__ import annotations

import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim import shadow
from tests.sim.test_mbarrier import init, wait
from tests.sim.tiny import Result, run

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
RANKS = """
mov.u32 %r10, %cluster_ctarank;
mov.u32 %r11, %cluster_nctarank;
add.u32 %r12, %r10, 1;
rem.u32 %r12, %r12, %r11;
mapa.shared::cluster.u32 %r13, %smem, %r12;
shl.b32 %r14, %tid, 2;
add.u32 %r15, %smem, %r14;
add.u32 %r13, %r13, %r14;
"""


def program(body: str, **options: object) -> Result:
    settings = {"arch": "sm_90a", "ctas": 4, "cluster": 4, **options}
    return run(body, **settings)  # type: ignore[arg-type]


@POLICIES
@pytest.mark.parametrize("threads", [32, 96])
def test_threads_read_and_write_their_neighbours_memory(completion: str, threads: int) -> None:
    body = (
        RANKS
        + "mad.lo.u32 %r16, %r10, 1000, %tid;\nst.shared.u32 [%r15], %r16;\n"
        + SYNC
        + "ld.shared::cluster.u32 %r17, [%r13];\nst.shared::cluster.u32 [%r13+1024], %r10;\n"
        + SYNC
        + "ld.shared.u32 %r18, [%r15+1024];\nst.global.v2.u32 [%out], {%r17, %r18};\n"
        + SYNC
    )
    got = program(body, words=2, threads=threads, completion=completion, seed=2, ctas=8)
    assert got.rules == []
    for thread, row in enumerate(got.out.tolist()):
        cta, tid = divmod(thread, threads)
        assert row == [1000 * ((cta + 1) % 4) + tid, (cta - 1) % 4]


def test_cluster_special_registers() -> None:
    names = (
        "cluster_ctarank",
        "cluster_nctarank",
        "cluster_ctaid.x",
        "clusterid.x",
        "nclusterid.x",
    )
    body = "".join(
        f"mov.u32 %r10, %{name};\nst.global.u32 [%out+{4 * i}], %r10;\n"
        for i, name in enumerate(names)
    )
    got = program(body, words=5, ctas=6, cluster=2)
    rows = got.out.reshape(6, 32, 5)[:, 0].tolist()
    assert rows == [[c % 2, 2, c % 2, c // 2, 3] for c in range(6)]


@POLICIES
def test_asynchronous_stores_signal_the_barrier_of_the_cta_they_go_to(completion: str) -> None:
    body = (
        init(1)
        + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem], 512;\n"
        + "fence.mbarrier_init.release.cluster;\n"
        + SYNC
        + RANKS
        + """
    mapa.shared::cluster.u32 %r20, %smem, %r12;
    add.u32 %r13, %r13, %r14; add.u32 %r13, %r13, %r14; add.u32 %r13, %r13, %r14;
    mov.u32 %r21, 7;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32
        [%r13+1024], {%r10, %tid, %r21, %r21}, [%r20];
    """
        + wait(0)
        + """
    shl.b32 %r14, %tid, 4; add.u32 %r15, %smem, %r14;
    ld.shared.v4.u32 {%r22, %r23, %r24, %r25}, [%r15+1024];
    st.global.v4.u32 [%out], {%r22, %r23, %r24, %r25};
    """
        + SYNC
    )
    got = program(body, words=4, completion=completion, seed=1)
    assert got.rules == []
    rows = got.out.reshape(4, 32, 4)
    for cta in range(4):
        assert rows[cta].tolist() == [[(cta - 1) % 4, tid, 7, 7] for tid in range(32)]


def test_exited_threads_are_not_waited_for() -> None:
    body = "setp.eq.u32 %p1, %warp, 1;\n@%p1 exit;\n" + SYNC + "st.global.u32 [%out], 3;\n"
    got = program(body, threads=64)
    assert got.rules == []
    assert got.out.reshape(4, 2, 32)[:, 0].tolist() == [[3] * 32] * 4


def test_relaxed_arrivals_order_nothing_but_what_a_fence_orders() -> None:
    relaxed = SYNC.replace("arrive", "arrive.relaxed")
    store = RANKS + "st.shared.u32 [%r15], %tid;\n"
    read = "ld.shared::cluster.u32 %r17, [%r13];\n" + SYNC
    assert program(store + relaxed + read).rules == ["shared-race"]
    assert program(store + "fence.acq_rel.cluster;\n" + relaxed + read).rules == []


HAND_OVER = (
    init(32)
    + SYNC
    + """
    shl.b32 %r14, %tid, 2; add.u32 %r15, %smem, %r14;
    and.b32 %r16, %smem, 16777215;
    mov.u32 %r10, %cluster_ctarank;
    setp.eq.u32 %p1, %r10, 0;
    @!%p1 bra READER;
    mapa.shared::cluster.u32 %r13, %r15, 1;
    mapa.shared::cluster.u32 %r17, %smem, 1;
    st.shared::cluster.u32 [%r13+1024], %tid;
    {before}
    mbarrier.arrive.{arrive}.cluster.shared::cluster.b64 _, [%r17];
    bra END;
    READER:
    """
    + wait(0).replace("{", "{{").replace("}", "}}").replace(".parity", ".parity.{wait}.cluster")
    + """
    {behind}
    ld.shared.u32 %r18, [%r15+1024]; st.global.u32 [%out], %r18;
    END:
    """
    + SYNC
)
"""CTA 0 writes to the memory of CTA 1 and arrives; CTA 1 waits and reads."""
RESTRICTED = "fence.{}.sync_restrict::shared::{}.cluster;"


@pytest.mark.parametrize(
    ("before", "arrive", "waits", "behind", "ordered"),
    [
        ("", "release", "acquire", "", True),
        ("", "release", "relaxed", "", False),
        ("", "release", "relaxed", "fence.acq_rel.cluster;", True),
        ("", "release", "relaxed", "fence.acquire.cluster;", True),
        ("", "release", "relaxed", "fence.cluster;", True),
        ("", "release", "relaxed", "fence.release.cluster;", False),
        ("", "relaxed", "acquire", "", False),
        ("fence.release.cluster;", "relaxed", "acquire", "", True),
        ("fence.acquire.cluster;", "relaxed", "acquire", "", False),
        (
            RESTRICTED.format("release", "cta"),
            "relaxed",
            "relaxed",
            RESTRICTED.format("acquire", "cluster"),
            True,
        ),
        (RESTRICTED.format("release", "cta"), "relaxed", "relaxed", "", False),
    ],
)
@POLICIES
def test_fences_make_relaxed_operations_release_and_acquire(
    completion: str, before: str, arrive: str, waits: str, behind: str, ordered: bool
) -> None:
    """PTX ISA 8.8: fence, then strong write; strong read, then fence."""
    body = HAND_OVER.format(before=before, arrive=arrive, wait=waits, behind=behind)
    got = program(body, cluster=2, ctas=2, completion=completion)
    assert got.rules == ([] if ordered else ["shared-race"])
    assert got.out[32:, 0].tolist() == list(range(32))


@pytest.mark.parametrize(
    "line",
    [
        "fence.relaxed.cluster;",
        "fence.acquire.sync_restrict::shared::cta.cluster;",
        "fence.mbarrier_init.acquire.cluster;",
        "fence.proxy.async.local;",
        "fence.proxy.async::generic.acquire.cluster;",
        "fence.proxy.texture;",
    ],
)
def test_fences_that_do_not_exist_are_refused(line: str) -> None:
    with pytest.raises(UnsupportedError, match="fence"):
        program(line)


BUGS = {
    "no barrier": (
        "shared-race",
        RANKS + "st.shared.u32 [%r15], 1;\nld.shared::cluster.u32 %r17, [%r13];\n" + SYNC,
    ),
    "arrives twice": ("cluster-barrier", "barrier.cluster.arrive;\n" + SYNC),
    "waits only": ("cluster-barrier", "barrier.cluster.wait;\n"),
    "bad rank": (
        "shared-bad-rank",
        "mapa.shared::cluster.u32 %r13, %smem, 5;\nst.shared::cluster.u32 [%r13], 1;\n",
    ),
    "exits early": (
        "exited-cta-access",
        RANKS
        + "setp.ne.u32 %p1, %r10, 0;\n@%p1 exit;\nbar.sync 0; bar.sync 0;\n"
        + "st.shared::cluster.u32 [%r13], 1;\n",
    ),
}


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize(
    "access", ["st.shared::cluster.u32 [%r13], 1;\n", "ld.shared::cluster.u32 %r17, [%r13];\n"]
)
def test_a_cta_has_to_outlive_the_accesses_of_others(access: str, completion: str) -> None:
    """However it is scheduled: what orders the access before the exit is missing."""
    begin = RANKS + "st.shared.u32 [%r15], 1;\n" + SYNC
    wrong = program(begin + access, completion=completion)
    assert wrong.rules == ["exited-cta-access"]
    first = wrong.launch.hazards[0]
    assert first.ptx_line == wrong.line(access.strip())
    assert (first.cta, first.warp) != (None, None) and first.address is not None
    relaxed = SYNC.replace("arrive", "arrive.relaxed")
    assert program(begin + access + relaxed, completion=completion).rules == wrong.rules
    assert program(begin + access + SYNC, completion=completion).rules == []


@pytest.mark.parametrize("access", ["ld", "st"])
def test_races_are_found_in_sparse_shadows_too(
    access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large clusters keep their stamps in memory of small pages."""
    monkeypatch.setattr(shadow, "SPARSE_BYTES", 0)
    remote = {
        "ld": "ld.shared::cluster.u32 %r17, [%r13];\n",
        "st": "st.shared::cluster.u32 [%r13], 1;\n",
    }
    own = {"st": "ld.shared.u32 %r17, [%r15];\n", "ld": "st.shared.u32 [%r15], 1;\n"}
    begin = RANKS + "st.shared.u32 [%r15], 1;\n" + SYNC + remote[access]
    assert program(begin + own[access] + SYNC).rules == ["shared-race"]
    assert program(begin + SYNC + own[access] + SYNC).rules == []


LAST_ARRIVALS = (
    init(1)
    + init(1, "+8")
    + SYNC
    + RANKS
    + """
    and.b32 %r16, %r13, -16777216;
    and.b32 %r17, %smem, 16777215;
    or.b32 %r16, %r16, %r17;
    setp.ne.u32 %p1, %r10, 0;
    @!%p1 bra TARGET;
    @%p0 mbarrier.arrive.{first}.cluster.shared::cluster.b64 _, [%r16];
    {between}
    @%p0 mbarrier.arrive.{last}.cluster.shared::cluster.b64 _, [%r16+8];
    exit;
    TARGET:
    """
    + wait(0, "+8").replace("{", "{{").replace("}", "}}")
)
"""CTA 1 arrives at two barriers of CTA 0, which waits for the second one and exits."""


@POLICIES
@pytest.mark.parametrize(
    ("first", "between", "last", "rules"),
    [
        ("release", "", "release", []),
        ("relaxed", "", "release", []),
        ("relaxed", "fence.acq_rel.cluster;", "relaxed", []),
        ("relaxed", "", "relaxed", ["exited-cta-access"]),
        ("release", "", "relaxed", ["exited-cta-access"]),
    ],
)
def test_a_relaxed_arrival_orders_no_earlier_arrival_before_an_exit(
    completion: str, first: str, between: str, last: str, rules: list[str]
) -> None:
    """PTX ISA 9.7.13.15: ``.relaxed`` provides no ordering; that the second arrival was seen
    does not mean that the first one has been performed."""
    body = LAST_ARRIVALS.format(first=first, between=between, last=last)
    got = program(body, cluster=2, ctas=2, completion=completion)
    assert got.rules == rules
    if rules:
        assert got.launch.hazards[0].ptx_line == got.line(f"mbarrier.arrive.{first}")


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported(bug: str) -> None:
    rule, body = BUGS[bug]
    assert program(body).rules[0] == rule


def test_a_cluster_barrier_that_cannot_complete_is_described() -> None:
    body = (
        "mov.u32 %r10, %cluster_ctarank;\nsetp.eq.u32 %p1, %r10, 0;\n@%p1 bra L;\n" + SYNC + "L:\n"
    )
    body += init(1) + wait(0)
    got = program(body, cluster=2, ctas=2)
    text = str(got.launch.hazards[0])
    assert got.rules == ["deadlock"]
    assert "waits at the cluster barrier (32 of 64 arrived)" in text
    assert "32 threads have yet to arrive in phase 0" in text


REGISTERS = """
setp.lt.u32 %p1, %warp, 4;
@%p1 bra PRODUCER;
setmaxnreg.inc.sync.aligned.u32 {inc};
bra END;
PRODUCER:
setmaxnreg.dec.sync.aligned.u32 {dec};
END:
"""


@POLICIES
def test_registers_move_between_warpgroups(completion: str) -> None:
    body = REGISTERS.format(inc=240, dec=24) + "st.global.u32 [%out], 1;"
    got = program(body, threads=384, cluster=1, ctas=2, completion=completion)
    assert got.rules == [] and (got.out == 1).all()


@pytest.mark.parametrize(
    ("inc", "dec", "rule"),
    [
        (240, 40, "deadlock"),  # 40 + 2 * 240 registers of 3 * 168
        (160, 24, "register-budget"),  # below what the warps have
        (240, 176, "register-budget"),  # above what the warps have
        (236, 24, "register-budget"),  # not a multiple of 8
        (168, 24, "register-balance"),
    ],
)
def test_register_budgets(inc: int, dec: int, rule: str) -> None:
    body = REGISTERS.format(inc=inc, dec=dec)
    if rule == "register-balance":
        body = body.replace("setmaxnreg.inc.sync.aligned.u32 168;", "")
    got = program(body, threads=384, cluster=1, ctas=1)
    assert got.rules[0] == rule
    if rule == "deadlock":
        assert "waits for 288 registers per lane" in str(got.launch.hazards[0])


def test_warps_of_a_warpgroup_have_to_agree_on_their_registers() -> None:
    body = "setp.eq.u32 %p1, %warp, 3;\n@%p1 bra END;\nsetmaxnreg.inc.sync.aligned.u32 248;\nEND:\n"
    got = program(body.replace("inc", "dec").replace("248", "64"), threads=128, cluster=1, ctas=1)
    assert got.rules == ["register-balance", "register-budget"]
