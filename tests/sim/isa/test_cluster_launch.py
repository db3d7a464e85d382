"""Cluster launch control: every CTA's work is done once, whoever does it, and its misuse."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.tiny import Result, run

UNTOUCHED = 0xEEEEEEEE

LOOP = """
mov.u32 %r10, %ctaid.x;
mov.u32 %r11, 0;
mov.u32 %r20, %cluster_ctarank;
mbarrier.init.shared.b64 [%smem+16], 1;
fence.mbarrier_init.release.cluster;
LOOP:
barrier.cluster.arrive;
barrier.cluster.wait;
mbarrier.arrive.expect_tx.shared.b64 _, [%smem+16], 16;
{request}
mul.wide.u32 %rd1, %r10, 4;
add.s64 %rd1, %rd1, %out0;
red.global.add.u32 [%rd1], 1;
WAIT:
mbarrier.try_wait.parity.shared.b64 %p2, [%smem+16], %r11;
@!%p2 bra WAIT;
xor.b32 %r11, %r11, 1;
ld.shared.v2.b64 {{%rd2, %rd3}}, [%smem];
mov.b128 %q, {{%rd2, %rd3}};
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q;
{first}
add.u32 %r10, %r10, %r20;
fence.proxy.async.shared::cta;
{again}
@%p3 bra LOOP;
"""
"""One thread per CTA; the barrier orders the reads of a response before the next one."""

CANCEL = (
    "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 "
    "[%smem], [%smem+16];"
)
CANCEL_ALL = CANCEL.replace("bytes.b128", "bytes.multicast::cluster::all.b128")
FIRST = {
    "vector": "clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 "
    "{%r10, %r12, %r13, _}, %q;",
    "x": "clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r10, %q;",
    # as cuDNN frontend's programs do, which know where the bits are
    "bits": "cvt.u32.u64 %r10, %rd2; and.b64 %rd4, %rd3, 1; setp.ne.u64 %p3, %rd4, 0;",
}


def persistent(
    ctas: int, *, cluster: int = 1, first: str = "x", again: str = "", **options: object
) -> Result:
    request = CANCEL
    if cluster > 1:  # the first CTA asks for all
        request = "setp.eq.u32 %p4, %r20, 0;\n@%p4 " + CANCEL_ALL
    body = LOOP.format(request=request, first=FIRST[first], again=again)
    return run(
        body,
        ctas=ctas,
        threads=1,
        cluster=cluster,
        declarations=".reg .b128 %q;",
        arch="sm_100a",
        **options,
    )


def runs(result: Result) -> np.ndarray:
    """How often each tile was processed."""
    return result.out[:, 0] - np.uint32(UNTOUCHED)


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize("first", sorted(FIRST))
def test_every_cta_is_done_once(completion: str, first: str) -> None:
    result = persistent(23, first=first, completion=completion, seed=3)
    assert result.rules == []
    assert (runs(result) == 1).all()
    assert result.launch.counters["clusters_cancelled"] > 0


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_whole_clusters_are_cancelled(completion: str) -> None:
    result = persistent(12, cluster=2, completion=completion, seed=1)
    assert result.rules == []
    assert (runs(result) == 1).all()
    assert 0 < result.launch.counters["clusters_cancelled"] < 6


def test_half_of_the_grid_is_left_to_be_cancelled() -> None:
    eager = persistent(24)
    assert eager.launch.counters["clusters_cancelled"] == 12
    assert eager.launch.waves == 1


def test_refusals_leave_ctas_to_be_started() -> None:
    launches = [persistent(16, completion="random", seed=seed).launch for seed in range(4)]
    counts = {launch.counters["clusters_cancelled"] for launch in launches}
    assert len(counts) > 1  # the seed decides
    assert all(launch.waves == 16 - launch.counters["clusters_cancelled"] for launch in launches)


def test_asking_again_after_a_refusal() -> None:
    again = (
        "@!%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+16], 16;\n@!%p3 "
        + CANCEL
        + "\nLAST:\nmbarrier.try_wait.parity.shared.b64 %p5, [%smem+16], %r11;\n"
        + "or.pred %p5, %p5, %p3;\n@!%p5 bra LAST;"
    )
    result = persistent(4, again=again)
    assert set(result.rules) == {"cluster-launch"}


@pytest.mark.parametrize("place", ["[%smem+8]", "[%smem+4096]"])
def test_bad_places_of_the_response(place: str) -> None:
    body = (
        "mbarrier.init.shared.b64 [%smem+32], 1;\nfence.mbarrier_init.release.cluster;\n"
        + CANCEL.replace("[%smem], [%smem+16]", f"{place}, [%smem+32]")
    )
    assert "cluster-launch" in run(body, ctas=2, threads=1, arch="sm_100a").rules


def test_a_query_of_other_bytes() -> None:
    body = (
        "mov.u64 %rd2, 7;\nmov.b128 %q, {%rd2, %rd2};\n"
        "clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p3, %q;"
    )
    result = run(body, declarations=".reg .b128 %q;", arch="sm_100a")
    assert result.rules == ["cluster-launch"]
