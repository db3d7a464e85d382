"""Which query tiles see a K/V block: ``block_range`` read the other way, for K/V outer loops."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.seqlen import Band


def query_blocks(
    band: Band, n_block: cutlass.Int32, tile_m: int, tile_n: int
) -> tuple[cutlass.Int32, cutlass.Int32]:
    """Half-open run of the blocks of ``tile_m`` rows that see some of K/V block ``n_block``.

    Neighbouring rows' bands touch or overlap, so these are one run, and exactly the row tiles whose
    ``key_blocks`` include ``n_block``. ``n_block`` must lie within Sk.
    """
    zero = cutlass.Int32(0)
    first_col = n_block * tile_n
    last_col = cutlass.min(first_col + tile_n, band.seqlen.seqlen_k) - 1
    m_start, m_stop = zero, cute.ceil_div(band.seqlen.seqlen_q, tile_m)
    if cutlass.const_expr(band.right is not None):
        # Row r reaches first_col once r + diagonal + right ≥ first_col.
        first_row = first_col - band.seqlen.diagonal - band.right
        m_start = cutlass.max(first_row, zero) // tile_m
    if cutlass.const_expr(band.left is not None):
        # Row r still sees last_col while r + diagonal − left ≤ last_col.
        last_row = last_col - band.seqlen.diagonal + band.left
        m_stop = cutlass.min(m_stop, cutlass.max(last_row + tile_m, zero) // tile_m)
    return m_start, m_stop
