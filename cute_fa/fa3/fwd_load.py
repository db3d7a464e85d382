"""LOAD: one warp that feeds the strips of Q and the rings of K and V by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.pipelines import TmaPipe
from cute_fa.fa3.fwd_context import CtaTile, Transfers


@cute.jit
def load(tile: CtaTile, transfers: Transfers):
    """Load the strips of Q, then K and V blocks from right to left, V one block behind K.

    The n-th use of both rings is block n_stop − 1 − n. The order is the consumers' order of need:
    K(n) for S = QK(n), then V of the block before it for O += PV.

    Waits: empty slots of pipe_k, pipe_v.   Signals: full slots of pipe_q, pipe_k, pipe_v.
    Registers: cfg.producer_registers.
    """
    cfg = tile.config
    tQsQ, tQgQ = transfers.q.tiles(tile.head, tile.batch, tile.sQ)  # (TMA, strip), (TMA, tile)
    tKsK, tKgK = transfers.k.tiles(tile.head_kv, tile.batch, tile.sK)  # (TMA, stage), (TMA, tile)
    tVsV, tVgV = transfers.v.tiles(tile.head_kv, tile.batch, tile.sV)
    count = tile.blocks.count
    last = tile.blocks.n_stop - 1
    if count > 0:
        for w in cutlass.range_constexpr(cfg.num_consumers):
            row_tile = tile.m_block * cfg.num_consumers + w
            _fill(transfers.q.atom, tile.pipe_q, w, tQgQ[None, row_tile], tQsQ)
        _fill(transfers.k.atom, tile.pipe_k, 0, tKgK[None, last], tKsK)
        for n in cutlass.range(1, count, unroll=1):
            _fill(transfers.k.atom, tile.pipe_k, n, tKgK[None, last - n], tKsK)
            _fill(transfers.v.atom, tile.pipe_v, n - 1, tVgV[None, last - n + 1], tVsV)
        _fill(transfers.v.atom, tile.pipe_v, count - 1, tVgV[None, last - count + 1], tVsV)


@cute.jit
def _fill(atom: cute.CopyAtom, pipe: TmaPipe, n, src: cute.Tensor, dst: cute.Tensor):
    """Use ``n`` of ``pipe``: tile ``src`` (TMA,) to its slot of ``dst`` (TMA, slot)."""
    pipe.acquire(n)
    cute.copy(atom, src, dst[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))
