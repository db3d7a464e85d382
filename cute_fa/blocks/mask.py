"""Masking of a score tile in registers: columns outside a row's band become −inf.

Masks are applied to raw scores, before any scale, so they need the scale to be positive and not 0;
``cute_fa.blocks.scores`` sees to that.
"""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.math import NEG_INF
from cute_fa.blocks.mma import rows_by_columns
from cute_fa.blocks.seqlen import Band


@cute.jit
def mask_scores(
    acc_S: cute.Tensor,
    tScS: cute.Tensor,
    band: Band,
    first_row: cutlass.Int32,
    first_col: cutlass.Int32,
):
    """Set the scores of a tile outside the band, or past Sk, to −inf.

    Args:
        acc_S: scores, ((2, 2), MMA_M, MMA_N).
        tScS: this thread's coordinates in the tile, the same shape, of (row, column).
        band: where each row looks.
        first_row, first_col: global position of the tile's corner.
    """
    scores = rows_by_columns(acc_S)  # (rows, columns) of this thread
    coords = rows_by_columns(tScS)
    # This thread's columns are its first one plus constants, so the limits are moved into the
    # thread's frame once per row and each element costs one compare with a constant.
    origin = first_col + coords[0, 0][1]
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row = first_row + coords[r, 0][0]
        stop = band.stop_column(row) - origin
        start = cutlass.Int32(0)
        if cutlass.const_expr(band.left is not None):
            start = band.start_column(row) - origin
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = 8 * (c // 2) + c % 2  # two neighbours, then the next 16×8 block
            hidden = column >= stop
            if cutlass.const_expr(band.left is not None):
                hidden = hidden | (column < start)
            scores[r, c] = cutlass.select_(hidden, NEG_INF, scores[r, c])
