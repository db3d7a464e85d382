"""LOAD: one warp that feeds the Q tiles and the ring of K and V by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tma import Rows
from cute_fa.fa4.fwd_context import Cta
from cute_fa.fa4.tmem_map import S_BUFFERS


@cute.jit
def load(cta: Cta):
    """Load what the CTA's tiles need, as far ahead as the slots allow.

    Waits: empty slots of pipe_q, pipe_kv.   Signals: full slots of the same; begun.
    Registers: cfg.other_registers.
    """

    def load_tile(work: WorkTile, uses: Uses) -> Uses:
        return _load_tile(cta, cta.tile(work, uses))

    uses = for_each_tile(cta.schedule, load_tile, Uses.none(), is_ahead=True)
    if cutlass.const_expr(cta.config.is_paired):
        # The leading CTA's commits arrive here: this CTA's mbarriers must outlive them.
        cta.pipe_kv.drain(2 * uses.blocks)
        cta.pipe_q.drain(uses.tiles)


@cute.jit
def _load_tile(cta: Cta, tile: RowTile) -> Uses:
    """Q, and K and V from right to left, in MMA's order of need.

    The first K goes before Q, whose place may have to wait until the last tile's O has left it.
    """
    cfg = cta.config
    count = tile.blocks.count
    ahead = S_BUFFERS // cfg.num_q_tiles
    if count > 0:
        _load_k(cta, tile, cutlass.Int32(0))
    for i in cutlass.range_constexpr(cfg.num_q_tiles):
        _load_q(cta, tile, i)
    if cutlass.const_expr(ahead > 1):
        for j in cutlass.range(1, cutlass.min(count, ahead), unroll=1):
            _load_k(cta, tile, j)
    for j in cutlass.range(count, unroll=1):
        _load_v(cta, tile, j)
        if j + ahead < count:
            _load_k(cta, tile, j + ahead)
    return tile.uses_after


@cute.jit
def _load_q(cta: Cta, tile: RowTile, i: cutlass.Constexpr):
    """Q tile ``i``."""
    tensor, pipe, n = cta.transfers.q, cta.pipe_q, cta.q_use(tile, i)
    queries = Rows.of_queries(tile.sequence)
    tQsQ, tQgQ = tensor.tile(cta.sQ, queries, tile.head, cta.q_tile(tile, i))
    pipe.acquire(n)
    cute.copy(tensor.atom, tQgQ, tQsQ[None, i], tma_bar_ptr=pipe.full(n))


@cute.jit
def _load_k(cta: Cta, tile: RowTile, j: cutlass.Int32):
    """Block ``j`` of K to its slot."""
    tensor, pipe, n = cta.transfers.k, cta.pipe_kv, cta.k_use(tile, j)
    keys, block = Rows.of_keys(tile.sequence), tile.blocks.n_stop - 1 - j
    tKsK, tKgK = tensor.tile(cta.sK, keys, tile.head_kv, cta.k_block(block))
    pipe.acquire(n, cta.config.smem_k_bytes)
    cute.copy(tensor.atom, tKgK, tKsK[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))


@cute.jit
def _load_v(cta: Cta, tile: RowTile, j: cutlass.Int32):
    """Block ``j`` of V to its slot."""
    tensor, pipe, n = cta.transfers.v, cta.pipe_kv, cta.v_use(tile, j)
    keys, block = Rows.of_keys(tile.sequence), tile.blocks.n_stop - 1 - j
    tVsV, tVgV = tensor.tile(cta.sV, keys, tile.head_kv, block, cta.v_column())
    pipe.acquire(n, cta.config.smem_v_bytes)
    cute.copy(tensor.atom, tVgV, tVsV[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))
