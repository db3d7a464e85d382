"""LOAD: one warp that feeds the Q tiles and the ring of K and V by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.tma import Rows
from cute_fa.fa4.config import S_BUFFERS
from cute_fa.fa4.fwd_context import CtaTile, Transfers


@cute.jit
def load(tile: CtaTile, transfers: Transfers):
    """Load the Q tiles, then K and V blocks from right to left, in MMA's order of need.

    Waits: empty slots of pipe_kv.   Signals: full slots of pipe_q, pipe_kv.
    Registers: cfg.other_registers.
    """
    cfg = tile.config
    queries = Rows.of_queries(tile.sequence)
    count = tile.blocks.count
    if count > 0:
        for i in cutlass.range_constexpr(cfg.num_q_tiles):
            q_tile = tile.m_block * cfg.num_q_tiles + i
            tile.pipe_q.acquire(i)
            tQsQ, tQgQ = transfers.q.tile(tile.sQ, queries, tile.head, q_tile)
            full = tile.pipe_q.full(i)
            cute.copy(transfers.q.atom, tQgQ, tQsQ[None, i], tma_bar_ptr=full)
            if cutlass.const_expr(i == 0):
                _load_k(tile, transfers, cutlass.Int32(0))
        ahead = S_BUFFERS // cfg.num_q_tiles
        if cutlass.const_expr(ahead > 1):
            for j in cutlass.range(1, cutlass.min(count, ahead), unroll=1):
                _load_k(tile, transfers, j)
        for j in cutlass.range(count, unroll=1):
            _load_v(tile, transfers, j)
            if j + ahead < count:
                _load_k(tile, transfers, j + ahead)


@cute.jit
def _load_k(tile: CtaTile, transfers: Transfers, j: cutlass.Int32):
    """Block ``j`` of K, counted from the right, to its slot."""
    pipe, n = tile.pipe_kv, tile.k_use(j)
    keys, block = Rows.of_keys(tile.sequence), tile.blocks.n_stop - 1 - j
    tKsK, tKgK = transfers.k.tile(tile.sK, keys, tile.head_kv, block)  # (TMA, stage), (TMA,)
    pipe.acquire(n, tile.config.smem_k_bytes)
    cute.copy(transfers.k.atom, tKgK, tKsK[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))


@cute.jit
def _load_v(tile: CtaTile, transfers: Transfers, j: cutlass.Int32):
    """Block ``j`` of V, counted from the right, to its slot."""
    pipe, n = tile.pipe_kv, tile.v_use(j)
    keys, block = Rows.of_keys(tile.sequence), tile.blocks.n_stop - 1 - j
    tVsV, tVgV = transfers.v.tile(tile.sV, keys, tile.head_kv, block)  # (TMA, stage), (TMA,)
    pipe.acquire(n, tile.config.smem_v_bytes)
    cute.copy(transfers.v.atom, tVgV, tVsV[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))
