"""Products of the fifth-generation tensor core (tcgen05.mma): one thread issues, O lives in TMEM.

A product multiplies 128 rows. A is in shared memory or in tensor memory, B in shared memory, the
accumulator in tensor memory, row m in lane m (PTX ISA, "TensorCore 5th Generation"; data path
layout D). The instructions of one CTA run in the order of issue, and complete when an mbarrier that
``commit`` names says so.

Two CTAs of a cluster can share a product of 256 rows (``.cta_group::2``): each has 128 rows of A
and of the accumulator, and half of B's n rows, which the other's tensor core reads as well. One
thread of the leading CTA issues for both.
"""

from __future__ import annotations

from cutlass import Float32, cute
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from cute_fa.blocks.tmem import COLUMN_BYTES, LANE_STRIDE

UMMA_M = 128


UMMA_K_BYTES = 32
"""k of every product: 16 elements of 16 bits, 32 of 8 bits."""

UmmaOp = tcgen05.MmaF16BF16Op | tcgen05.MmaF8F6F4Op


def mma_smem_smem(dtype: type, n: int, is_paired: bool = False) -> UmmaOp:
    """m128 × ``n`` × 32 bytes of k, A and B in shared memory, rows along k; m256 of a pair."""
    return _mma_op(dtype, n, is_paired, tcgen05.OperandSource.SMEM, OperandMajorMode.K)


def mma_tmem_smem(dtype: type, n: int, is_paired: bool = False) -> UmmaOp:
    """m128 × ``n`` × 32 bytes of k, A in tensor memory, B in shared memory with rows along n: here,
    unlike in wgmma, of 8-bit types too (``n`` a multiple of 16); m256 of a pair."""
    return _mma_op(dtype, n, is_paired, tcgen05.OperandSource.TMEM, OperandMajorMode.MN)


def _mma_op(dtype, n, is_paired, a_source, b_major) -> UmmaOp:
    group = tcgen05.CtaGroup.TWO if is_paired else tcgen05.CtaGroup.ONE
    shape = (UMMA_M * group.value, n, 8 * UMMA_K_BYTES // dtype.width)
    how = (Float32, shape, group, a_source, OperandMajorMode.K, b_major)
    if dtype.width == 8:
        return tcgen05.MmaF8F6F4Op(dtype, dtype, *how)
    return tcgen05.MmaF16BF16Op(dtype, *how)


def _share(op: UmmaOp) -> cute.ThrMma:
    """What partitions the operands that one CTA holds: those of a product of its own, of 128 rows
    and, in a pair, half of n."""
    if op.cta_group == tcgen05.CtaGroup.TWO:
        op = _mma_op(op.a_dtype, op.shape_mnk[1] // 2, False, op.a_src, op.b_major_mode)
    return cute.make_tiled_mma(op).get_slice(0)


def operand_a(op: UmmaOp, sA: cute.Tensor) -> cute.Tensor:
    """Descriptors of ``sA`` (M, K, …) as the left operand, (MMA, MMA_M, MMA_K, …)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return thr_mma.make_fragment_A(_share(op).partition_A(sA))


def operand_b(op: UmmaOp, sB: cute.Tensor) -> cute.Tensor:
    """Descriptors of ``sB`` (N, K, …), of a pair (N / 2, K, …), as the right operand, (MMA, MMA_N,
    MMA_K, …)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return thr_mma.make_fragment_B(_share(op).partition_B(sB))


def accumulator(op: UmmaOp, n: int, address: cute.Pointer) -> cute.Tensor:
    """The accumulator of 128 × ``n`` at ``address`` in tensor memory, (MMA, 1, 1); of a pair, each
    CTA's."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    m, _, _ = op.shape_mnk
    fragment = thr_mma.make_fragment_C(thr_mma.partition_shape_C((m, n)))
    return cute.make_tensor(address, fragment.layout)


def operand_a_in_tmem(op: UmmaOp, dtype: type, k: int, address: cute.Pointer) -> cute.Tensor:
    """A left operand (128, k) of 16- or 8-bit elements at ``address``, (MMA, 1, MMA_K).

    Two or four elements share a column, the first in its low bits.
    """
    lane = LANE_STRIDE * (COLUMN_BYTES * 8 // dtype.width)
    layout = cute.make_layout((UMMA_M, k), stride=(lane, 1))
    base = cute.recast_ptr(address, dtype=dtype)
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    fragment = thr_mma.make_fragment_A(_share(op).partition_A(cute.make_tensor(base, layout)))
    # DSL(4.8.1): the fragment has the layout, but begins at address 0.
    return cute.make_tensor(base, fragment.layout)


def gemm(
    op: UmmaOp,
    acc: cute.Tensor,
    tCrA: cute.Tensor,
    tCrB: cute.Tensor,
    *,
    k_steps: range,
    accumulate,
    negate_a=None,
) -> None:
    """Issue acc (+)= ±A Bᵀ over ``k_steps``; the whole warp calls, one thread issues.

    Args:
        accumulate: whether the first of these steps adds to ``acc``; the others always do.
        negate_a: a run-time flag, or None for never.
    """
    tiled_mma = cute.make_tiled_mma(op)
    if negate_a is not None:
        tiled_mma.set(tcgen05.Field.NEGATE_A, negate_a)
    for k in k_steps:
        tiled_mma.set(tcgen05.Field.ACCUMULATE, accumulate if k == k_steps.start else True)
        cute.gemm(tiled_mma, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
