"""TRANSPOSE: two warps that turn the tiles of V for FP8 products, beside LOAD."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.row_tile import Uses
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.transpose import transpose_bytes
from cute_fa.fa3.config import TRANSPOSE_WARPS
from cute_fa.fa3.fwd_context import Cta, StripedTile


@cute.jit
def transpose(cta: Cta, part: cutlass.Int32):
    """Vᵀ of all tiles of the CTA, ``part`` of TRANSPOSE_WARPS of each.

    Waits: full slots of pipe_v, empty slots of pipe_vt.   Signals: empty slots of pipe_v, full
    slots of pipe_vt.   Registers: cfg.producer_registers.
    """

    def transpose_tile(work: WorkTile, uses: Uses) -> Uses:
        return _transpose_tile(cta, cta.tile(work, uses), part)

    for_each_tile(cta.schedule, transpose_tile, Uses.none())


@cute.jit
def _transpose_tile(cta: Cta, tile: StripedTile, part: cutlass.Int32) -> Uses:
    """Use n of pipe_v becomes use n of pipe_vt."""
    pipe_v, pipe_vt = cta.pipe_v, cta.pipe_vt
    first, stop = tile.first_use, tile.first_use + tile.blocks.count
    for n in cutlass.range(first, stop, unroll=1):
        pipe_v.wait(n)
        pipe_vt.acquire(n)
        sV = cta.sV[None, None, pipe_v.slot(n)]
        sVt = cta.sVt[None, None, pipe_vt.slot(n)]
        transpose_bytes(sV, sVt, part, TRANSPOSE_WARPS)
        pipe_vt.commit(n)
        pipe_v.release(n)
    return tile.uses_after
