"""Masking of a score tile in registers: columns outside a row's band become −inf.

Masks are applied to raw scores, before any scale, so they need the scale to be positive and not 0;
``cute_fa.blocks.scores`` sees to that.
"""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.math import NEG_INF
from cute_fa.blocks.mma import column_offset, row_offset, rows_by_columns
from cute_fa.blocks.seqlen import Band


@cute.jit
def mask_scores(
    acc_S: cute.Tensor,
    band: Band,
    row: cutlass.Int32,
    column: cutlass.Int32,
    num_warps: cutlass.Constexpr,
    group: cutlass.Constexpr = 1,
):
    """Set the scores of a tile that are outside the band, or past Sk, to −inf.

    Args:
        acc_S: scores, ((2, 2), MMA_M, MMA_N).
        band: where each row looks.
        row, column: global position of this thread's first score.
        num_warps: warps stacked along M.
        group: rows of the tile per query, of which ``row`` is the number (``blocks.pack_gqa``).

    The edges of the band move with the row and the rows of a thread are a constant apart, so each
    edge is one register for all of them, and a score costs one compare with a constant per edge.
    """
    scores = rows_by_columns(acc_S)  # (rows, columns) of this thread
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            from_diagonal = column_offset(c) - row_offset(r, num_warps) // group
            hidden = cutlass.Boolean(False)
            if cutlass.const_expr(band.right is not None):
                hidden = from_diagonal >= band.right_edge(row) - column
            if cutlass.const_expr(not band.is_within_k):
                hidden = hidden | (column_offset(c) >= band.seqlen.seqlen_k - column)
            if cutlass.const_expr(band.left is not None):
                hidden = hidden | (from_diagonal < band.left_edge(row) - column)
            scores[r, c] = cutlass.select_(hidden, NEG_INF, scores[r, c])
