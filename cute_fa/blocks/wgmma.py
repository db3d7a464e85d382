"""Warpgroup products (wgmma): 64 rows of four warps, B and sometimes A read from shared memory.

The instruction is asynchronous. ``gemm`` only issues; the fence before it orders earlier register
accesses, and its accumulator, its A registers and its tiles in shared memory belong to the tensor
core until ``wait_group`` says otherwise (PTX ISA, "Asynchronous warpgroup-level matrix
multiply-accumulate", 9.7.15).

Thread t of warp w holds, of each 16×8 block of the accumulator's rows 16w … 16w + 15, rows t/4 and
t/4 + 8 and columns 2(t%4), 2(t%4) + 1: the blocks of mma.m16n8k16, so that masks, softmax and the
C-to-A view of the mma.sync rungs serve here too.
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

WGMMA_M = 64
WGMMA_K_BYTES = 32
"""k of every wgmma: 16 elements of 16 bits, 32 of 8 bits."""

WarpgroupOp = warpgroup.MmaF16BF16Op | warpgroup.MmaF8Op


def mma_smem_smem(dtype: type, n: int) -> WarpgroupOp:
    """m64 × ``n`` × 32 bytes of k, A and B in shared memory, rows along k."""
    return _mma(dtype, n, warpgroup.OperandSource.SMEM, OperandMajorMode.K)


def mma_reg_smem(dtype: type, n: int) -> WarpgroupOp:
    """m64 × ``n`` × 32 bytes of k, A in registers; B in shared memory with rows along n, those of
    8-bit types along k: no other order exists for them."""
    b_major = OperandMajorMode.K if dtype.width == 8 else OperandMajorMode.MN
    return _mma(dtype, n, warpgroup.OperandSource.RMEM, b_major)


def _mma(
    dtype: type, n: int, a_source: warpgroup.OperandSource, b_major: OperandMajorMode
) -> WarpgroupOp:
    shape = (WGMMA_M, n, 8 * WGMMA_K_BYTES // dtype.width)
    how = (cutlass.Float32, shape, a_source, OperandMajorMode.K, b_major)
    if dtype.width == 8:
        return warpgroup.MmaF8Op(dtype, dtype, *how)
    return warpgroup.MmaF16BF16Op(dtype, *how)


def operand_a(op: WarpgroupOp, sA: cute.Tensor) -> cute.Tensor:
    """Descriptors of ``sA`` (M, K, …) as the left operand, (MMA, MMA_M, MMA_K, …)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return thr_mma.make_fragment_A(thr_mma.partition_A(sA))


def operand_b(op: WarpgroupOp, sB: cute.Tensor) -> cute.Tensor:
    """Descriptors of ``sB`` (N, K, …) as the right operand, (MMA, MMA_N, MMA_K, …)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return thr_mma.make_fragment_B(thr_mma.partition_B(sB))


def make_accumulator(op: WarpgroupOp, n: int) -> cute.Tensor:
    """An accumulator of 64 × ``n`` in registers, ((2, 2, n / 8), 1, 1)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return cute.make_rmem_tensor(thr_mma.partition_shape_C((WGMMA_M, n)), cutlass.Float32)


def make_operand_a(op: WarpgroupOp, k: int) -> cute.Tensor:
    """A left operand of 64 × ``k`` in registers, (MMA, 1, MMA_K)."""
    thr_mma = cute.make_tiled_mma(op).get_slice(0)
    return cute.make_rmem_tensor(thr_mma.partition_shape_A((WGMMA_M, k)), op.a_dtype)


def as_mma_blocks(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2, n / 8), 1, 1) as blocks of mma.m16n8, ((2, 2), 1, n / 8)."""
    (pair, half, blocks), _, _ = acc.shape
    (pair_stride, half_stride, block_stride), _, _ = acc.stride
    layout = cute.make_layout(
        ((pair, half), 1, blocks), stride=((pair_stride, half_stride), 0, block_stride)
    )
    return cute.make_tensor(acc.iterator, layout)


def gemm(
    op: WarpgroupOp,
    acc: cute.Tensor,
    tCrA: cute.Tensor,
    tCrB: cute.Tensor,
    *,
    accumulate: bool,
) -> None:
    """Issue acc (+)= A Bᵀ over all k-steps as one group; complete after ``warpgroup.wait_group``.

    The atom is made anew for each call: its accumulate flag is a value of the program, and one that
    was set inside a loop would not exist after it.
    """
    tiled_mma = cute.make_tiled_mma(op)
    for k in range(cute.size(tCrB, mode=[2])):
        tiled_mma.set(warpgroup.Field.ACCUMULATE, accumulate or k > 0)
        cute.gemm(tiled_mma, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
    warpgroup.commit_group()
