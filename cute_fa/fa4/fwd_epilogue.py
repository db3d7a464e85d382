"""EPILOGUE: one warp that writes the O tiles to global memory by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tma import Rows
from cute_fa.fa4.fwd_context import Cta


@cute.jit
def store_o(cta: Cta):
    """O of all tiles: shared memory → global. Rows past Sq and columns past Dv are not written.

    Waits: signal o_out.   Signals: o_gone; empty slots of pipe_q, where O lies.
    Registers: cfg.other_registers.
    """

    def store_tile(work: WorkTile, uses: Uses) -> Uses:
        return _store_tile(cta, cta.tile(work, uses))

    for_each_tile(cta.schedule, store_tile, Uses.none())
    if cutlass.const_expr(not cta.config.is_resident):
        # Shared memory must outlive the copies' reads of it; resident CTAs wait in each round.
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def _store_tile(cta: Cta, tile: RowTile) -> Uses:
    cfg = cta.config
    tensor, queries = cta.transfers.o, Rows.of_queries(tile.sequence)
    for i in cutlass.range_constexpr(cfg.num_q_tiles):
        cta.signals.o_out.wait(i, tile.uses.tiles)
        tOsO, tOgO = tensor.tile(cta.sO, queries, tile.head, cta.q_tile(tile, i))
        cute.copy(tensor.atom, tOsO[None, i], tOgO)
        cute.arch.cp_async_bulk_commit_group()
    if cutlass.const_expr(cfg.is_resident):
        for i in cutlass.range_constexpr(cfg.num_q_tiles):
            cute.arch.cp_async_bulk_wait_group(cfg.num_q_tiles - 1 - i, read=True)
            if cutlass.const_expr(cfg.has_o_gone):
                cta.signals.o_gone.arrive(i)
            if cutlass.const_expr(not cfg.has_own_o):
                cta.pipe_q.release(cta.q_use(tile, i))
    return tile.uses_after
