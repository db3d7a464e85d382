"""Which K/V blocks a tile of query rows needs, and which of them need no mask.

The loop over a row tile goes from the right end to the left:

    n_stop − 1 … n_full_stop    touch Sk or the right edge of the band: masked
    n_full_stop − 1 … n_full_start    inside for every row: not masked
    n_full_start − 1 … n_start  touch the left edge of the band: masked

Ranges may be empty; n_start ≤ n_full_start ≤ n_full_stop ≤ n_stop holds after ``key_blocks``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.seqlen import Band


@dataclass(frozen=True)
class KeyBlocks:
    """K/V block numbers of one row tile; see the module's table."""

    n_start: cutlass.Int32
    n_full_start: cutlass.Int32
    n_full_stop: cutlass.Int32
    n_stop: cutlass.Int32

    @property
    def count(self) -> cutlass.Int32:
        return self.n_stop - self.n_start


def key_blocks(band: Band, m_block: cutlass.Int32, tile_m: int, tile_n: int) -> KeyBlocks:
    """The blocks of ``tile_n`` columns that rows m_block·tile_m … + tile_m − 1 attend to.

    Rows past Sq do not extend the range: the last row is min(…, Sq − 1).
    """
    zero = cutlass.Int32(0)
    first_row = m_block * tile_m
    last_row = cutlass.min(first_row + tile_m, band.seqlen.seqlen_q) - 1
    # Columns are clamped to 0 before dividing: integer division of negatives rounds to zero.
    n_stop = cute.ceil_div(cutlass.max(band.stop_column(last_row), zero), tile_n)
    n_full_stop = cutlass.max(band.stop_column(first_row), zero) // tile_n
    n_start, n_full_start = zero, zero
    if band.left is not None:
        n_start = cutlass.max(band.left_edge(first_row), zero) // tile_n
        n_full_start = cute.ceil_div(cutlass.max(band.left_edge(last_row), zero), tile_n)
        n_start = cutlass.min(n_start, n_stop)
        n_full_start = cutlass.min(cutlass.max(n_full_start, n_start), n_stop)
        n_full_stop = cutlass.max(n_full_stop, n_full_start)
    n_full_stop = cutlass.min(n_full_stop, n_stop)
    return KeyBlocks(n_start, n_full_start, n_full_stop, n_stop)
