"""tcgen05.commit: who is told, when, and by which barrier."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.test_mbarrier import init
from tests.sim.tiny import Result, run

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
CLUSTER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
FORM = "mbarrier::arrive::one.shared::cluster"
STATE = """
setp.ne.u32 %p5, %tid, 0;
@%p5 bra SKIP;
mbarrier.test_wait.parity.shared.b64 %p4, [%smem], 0;
selp.u32 %r40, 1, 0, %p4;
st.global.u32 [%out], %r40;
SKIP:
"""


def kernel(body: str, **options: object) -> Result:
    return run(body, **{"arch": "sm_100a", **options})  # type: ignore[arg-type]


def hold(at: str = "") -> str:
    """Everybody waits for the first phase of a barrier."""
    label = f"HOLD{at.strip('+')}"
    return (
        f"{label}:\nmbarrier.try_wait.parity.shared.b64 %p4, [%smem{at}], 0;\n@!%p4 bra {label};\n"
    )


@POLICIES
def test_a_commit_of_nothing_arrives(completion: str) -> None:
    body = init(1) + f"@%p0 tcgen05.commit.cta_group::1.{FORM}.b64 [%smem];\n" + hold()
    assert kernel(body, completion=completion).rules == []


@POLICIES
@pytest.mark.parametrize("mask", [0b0101, 0b1111, 0b1000])
def test_multicast_tells_the_ctas_of_the_mask(mask: int, completion: str) -> None:
    """The barrier at the same offset in each; others are not touched."""
    body = (
        init(1)
        + CLUSTER
        + "mov.u32 %r10, %cluster_ctarank;\nsetp.eq.and.u32 %p1, %r10, 1, %p0;\n"
        + f"mov.b16 %h1, {mask};\n"
        + f"@%p1 tcgen05.commit.cta_group::2.{FORM}.multicast::cluster.b64 [%smem], %h1;\n"
        + f"mov.u32 %r11, 1;\nshl.b32 %r11, %r11, %r10;\nand.b32 %r11, %r11, {mask};\n"
        + "setp.eq.u32 %p6, %r11, 0;\n@%p6 bra NOT_TOLD;\n"
        + hold()
        + "NOT_TOLD:\n"
        + CLUSTER
        + STATE
        + CLUSTER
    )
    got = kernel(body, ctas=4, cluster=4, completion=completion, seed=2)
    assert got.rules == []
    told = got.out.reshape(4, 32)[:, 0]
    assert told.tolist() == [mask >> rank & 1 for rank in range(4)]


def test_a_barrier_of_another_cta() -> None:
    body = (
        init(1)
        + CLUSTER
        + "mov.u32 %r10, %cluster_ctarank;\nmov.u32 %r11, 1;\n"
        + "mapa.shared::cluster.u32 %r12, %smem, %r11;\nsetp.eq.and.u32 %p1, %r10, 0, %p0;\n"
        + f"@%p1 tcgen05.commit.cta_group::1.{FORM}.b64 [%r12];\n"
        + "setp.eq.u32 %p6, %r10, 0;\n@%p6 bra FIRST;\n"
        + hold()
        + "FIRST:\n"
        + CLUSTER
        + STATE
        + CLUSTER
    )
    got = kernel(body, ctas=2, cluster=2)
    assert got.rules == []
    assert got.out.reshape(2, 32)[:, 0].tolist() == [0, 1]


@POLICIES
def test_commits_arrive_in_order(completion: str) -> None:
    """The second barrier's phase is complete only after the first's."""
    commits = "".join(
        f"@%p0 tcgen05.commit.cta_group::1.{FORM}.b64 [%r{12 + i}];\n" for i in range(2)
    )
    body = init(1) + init(1, "+8") + "add.u32 %r12, %smem, 0;\nadd.u32 %r13, %smem, 8;\n"
    body += commits + hold("+8") + STATE
    got = kernel(body, completion=completion, seed=7)
    assert got.rules == []
    assert got.out[0, 0] == 1


def test_every_lane_that_commits_arrives() -> None:
    body = init(32) + f"tcgen05.commit.cta_group::1.{FORM}.b64 [%smem];\n" + hold()
    assert kernel(body).rules == []
    assert kernel(body.replace("%r9, 32", "%r9, 31")).rules == ["mbarrier-overrun"]


def test_no_barrier_there() -> None:
    body = init(1) + f"@%p0 tcgen05.commit.cta_group::1.{FORM}.b64 [%smem+64];\n"
    assert kernel(body).rules == ["mbarrier-uninitialised"]


def test_a_pair_needs_a_cluster_of_pairs() -> None:
    body = init(1) + f"@%p0 tcgen05.commit.cta_group::2.{FORM}.b64 [%smem];\n"
    got = kernel(body)
    assert got.rules == ["tensor-cta-group"]
    assert np.all(got.out == 0xEEEEEEEE)
