"""Tensor copies with ``.cta_group::2``: the mbarrier may be in the other CTA of the pair."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.isa import UnsupportedInstruction
from cute_fa.sim.tensor_map import swizzled_chunks
from tests.sim.test_mbarrier import init, wait
from tests.sim.test_tensor_copy import BAR, POLICIES, Tensor, dump, program

BYTES = 1024
CLUSTER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
GATHER = COPY.replace("tile", "tile::gather4")
FORMS = pytest.mark.parametrize(
    ("copy", "box", "place"),
    [
        (COPY, 8, "[%in0, {%r20, %r21}]"),
        (GATHER, 1, "[%in0, {%r20, %r22, %r21, %r23, %r22}]"),
    ],
    ids=["tile", "gather4"],
)
"""What is copied: eight rows of 128 bytes, or four."""
ROWS = "mov.u32 %r22, 5; mov.u32 %r23, 7;\n"


def start(arming: str, announced: int) -> str:
    """Barriers in every CTA; those of the CTAs in predicate ``arming`` await bytes."""
    return (
        init(1, f"+{BAR}")
        + f"""
    mov.u32 %r10, %cluster_ctarank;
    and.b32 %r11, %r10, 1;
    {arming}
    setp.eq.and.u32 %p2, %r12, 0, %p0;
    @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], {announced};
    """
        + CLUSTER
        + f"mov.u32 %r20, 0; mov.u32 %r21, 0;\nadd.u32 %r30, %smem, {BAR};\n"
    )


def waited(arming_wait: str = "%r12", rows: int = 8) -> str:
    """The CTAs that armed their barrier wait; the cluster barrier tells the others."""
    passed = f"setp.ne.u32 %p3, {arming_wait}, 0;\n@%p3 bra PASSED;\n"
    return passed + wait(0, f"+{BAR}") + "PASSED:\n" + CLUSTER + dump(rows) + CLUSTER


def _assert_all_are_told(body: str, tensor: Tensor, rows: list[int], completion: str) -> None:
    """Every CTA of four comes past its wait, with the same rows."""
    words = len(rows)
    got = program(
        ROWS + body + waited(rows=words),
        tensor,
        words=words,
        ctas=4,
        cluster=4,
        arch="sm_100a",
        completion=completion,
    )
    assert got.rules == []
    chunks = got.out.reshape(4, 32, words).transpose(0, 2, 1).reshape(4, -1).view(np.uint8)
    want = tensor.data[: 8 * 128].reshape(8, 128)[rows].reshape(-1, 16)
    order = swizzled_chunks(1024, 128 * words, 128) - 64
    for cta in chunks:
        assert (cta.reshape(-1, 16)[order] == want).all()


def _moved(box: int) -> list[int]:
    """The rows that a copy of ``FORMS`` moves."""
    return [5, 0, 7, 5] if box == 1 else list(range(8))


@POLICIES
@FORMS
def test_both_ctas_of_a_pair_signal_the_even_one(
    copy: str, box: int, place: str, completion: str
) -> None:
    tensor = Tensor((64, 8), (64, box), swizzle=128)
    rows = _moved(box)
    body = start("mov.b32 %r12, %r11;", 2 * 128 * len(rows))
    body += f"""
    and.b32 %r30, %r30, 0xFEFFFFFF;
    @%p0 {copy}.cta_group::2 [%smem], {place}, [%r30];
    """
    _assert_all_are_told(body, tensor, rows, completion)


@POLICIES
@FORMS
@pytest.mark.parametrize("issuer", [2, 3])
def test_multicast_signals_the_parity_of_the_barrier(
    issuer: int, copy: str, box: int, place: str, completion: str
) -> None:
    """Four CTAs receive; in each pair the one with the parity of the given barrier is told."""
    tensor = Tensor((64, 8), (64, box), swizzle=128)
    rows = _moved(box)
    body = start(f"xor.b32 %r12, %r11, {issuer % 2};", 2 * 128 * len(rows))
    body += f"""
    setp.eq.and.u32 %p1, %r10, {issuer}, %p0;
    mov.b16 %h1, 15;
    @%p1 {copy}.multicast::cluster.cta_group::2 [%smem], {place}, [%r30], %h1;
    """
    _assert_all_are_told(body, tensor, rows, completion)


@pytest.mark.parametrize(("group", "distance"), [("", 1), (".cta_group::1", 1), ("", 2)])
def test_a_barrier_elsewhere_is_reported(group: str, distance: int) -> None:
    tensor = Tensor((64, 8), (64, 8), swizzle=128)
    body = start("mov.b32 %r12, %r10;", BYTES)
    body += f"""
    setp.eq.and.u32 %p1, %r10, {distance}, %p0;
    and.b32 %r30, %r30, 0xFFFFFF;
    @%p1 {COPY}{group} [%smem], [%in0, {{%r20, %r21}}], [%r30];
    """
    got = program(body + waited("%r10"), tensor, words=8, ctas=4, cluster=4, arch="sm_100a")
    assert "bulk-operands" in got.rules


def test_a_store_has_no_group() -> None:
    form = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.cta_group::2"
    with pytest.raises(UnsupportedInstruction, match="cta_group"):
        program(f"{form} [%in0, {{%r20, %r21}}], [%smem];", Tensor((64, 8), (64, 8)))
