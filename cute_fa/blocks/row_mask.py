"""Masking of one row of scores in registers, as bits: one thread holds all columns of its row."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.math import NEG_INF
from cute_fa.blocks.seqlen import Band

WORD = 32


@cute.jit
def mask_row(row_S: cute.Tensor, band: Band, row: cutlass.Int32, first_column: cutlass.Int32):
    """Set the scores (N,) of columns first_column … outside the band of ``row``, or past Sk, to −∞.

    The visible columns of a row are one interval, so 32 of them at a time are a word of ones made
    by two shifts, and a score costs a bit test, which the compiler takes from a predicate register.
    """
    stop = band.stop_column(row) - first_column
    start = cutlass.Int32(0)
    if cutlass.const_expr(band.left is not None):
        start = band.left_edge(row) - first_column
    for word in cutlass.range_constexpr(cute.size(row_S) // WORD):
        visible = _ones_below(stop - word * WORD)
        if cutlass.const_expr(band.left is not None):
            visible = visible & ~_ones_below(start - word * WORD)
        for bit in cutlass.range_constexpr(WORD):
            column = word * WORD + bit
            is_visible = cutlass.Boolean(visible & cutlass.Int32(_bit(bit)))
            row_S[column] = cutlass.select_(is_visible, row_S[column], NEG_INF)


def _bit(index: int) -> int:
    """1 << index as a signed 32-bit number."""
    return (1 << index) - (1 << WORD if index == WORD - 1 else 0)


def _ones_below(count: cutlass.Int32) -> cutlass.Int32:
    """The word whose lowest ``count`` bits are ones: none below 0, all above 31.

    As shl.b32 itself, for it clamps: of a shift by 32 and more, 0 is left (PTX ISA, shl).
    """
    shifted = cute.arch.inline_ptx(
        "shl.b32 {$w0}, {$r0}, {$r1};",
        write_only_types=[cutlass.Int32],
        read_only_args=[cutlass.Int32(1), cutlass.max(count, cutlass.Int32(0))],
    )
    return shifted - 1
