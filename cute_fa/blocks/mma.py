"""Tensor-core products of the mma.sync rungs and the views of their accumulators.

One shape serves all: m16n8k16, 16-bit operands, fp32 accumulators. Thread t of a warp holds, of
each 16×8 accumulator block, rows t/4 and t/4 + 8 and columns 2(t%4), 2(t%4) + 1 (PTX ISA, "Matrix
Fragments for mma.m16n8k16"): a row lives in a quad of four threads.
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warp

from cute_fa.blocks.tiles import MMA_K, MMA_M, MMA_N


def tiled_mma_rows(dtype: type, num_warps: int) -> cute.TiledMma:
    """m16n8k16 with the warps stacked along M; N goes 16 at a time, what ldmatrix.x4 feeds."""
    op = warp.MmaF16BF16Op(dtype, cutlass.Float32, (MMA_M, MMA_N, MMA_K))
    return cute.make_tiled_mma(
        op, (num_warps, 1, 1), permutation_mnk=(num_warps * MMA_M, 2 * MMA_N, MMA_K)
    )


def rows_by_columns(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2), MMA_M, MMA_N) as this thread's (rows, columns)."""
    (pair, half), mma_m, mma_n = acc.shape
    (pair_stride, half_stride), m_stride, n_stride = acc.stride
    layout = cute.make_layout(
        ((half, mma_m), (pair, mma_n)), stride=((half_stride, m_stride), (pair_stride, n_stride))
    )
    return cute.make_tensor(acc.iterator, layout)


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """View a C fragment ((2, 2), MMA_M, MMA_N) as the A fragment ((2, 2, 2), MMA_M, MMA_N / 2).

    Two neighbouring 16×8 blocks of C hold, thread by thread, exactly one 16×16 block of A, so P
    never leaves its registers between the two products.
    """
    (pair, half), mma_m, mma_n = acc.shape
    (pair_stride, half_stride), m_stride, n_stride = acc.stride
    layout = cute.make_layout(
        ((pair, half, 2), mma_m, mma_n // 2),
        stride=((pair_stride, half_stride, n_stride), m_stride, 2 * n_stride),
    )
    return cute.make_tensor(acc.iterator, layout)


def row_offset(r: int, num_warps: int) -> int:
    """Rows from a thread's first accumulator row to its r-th, with the warps stacked along M."""
    return MMA_M * num_warps * (r // 2) + 8 * (r % 2)


def column_offset(c: int) -> int:
    """Columns from a thread's first accumulator column to its c-th."""
    return MMA_N * (c // 2) + c % 2
