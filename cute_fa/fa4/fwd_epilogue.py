"""EPILOGUE: one warp that writes the O tiles to global memory by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.tma import Rows, TmaTensor
from cute_fa.fa4.fwd_context import CtaTile


@cute.jit
def store_o(cta: CtaTile, tma_o: TmaTensor):
    """O: shared memory → global. Rows past Sq and columns past Dv are not written.

    Waits: signal o_out.   Registers: cfg.other_registers.
    """
    cfg = cta.config
    queries = Rows.of_queries(cta.sequence)
    for i in cutlass.range_constexpr(cfg.num_q_tiles):
        cta.signals.o_out.wait(i, 0)
        q_tile = cta.m_block * cfg.num_q_tiles + i
        tOsO, tOgO = tma_o.tile(cta.sO, queries, cta.head, q_tile)  # (TMA, Q tile), (TMA,)
        cute.copy(tma_o.atom, tOsO[None, i], tOgO)
        cute.arch.cp_async_bulk_commit_group()
    # Shared memory must outlive the copies' reads of it.
    cute.arch.cp_async_bulk_wait_group(0, read=True)
