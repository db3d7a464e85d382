"""LOAD: one warp that feeds the strips of Q and the rings of K and V by TMA."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.pipelines import TmaPipe
from cute_fa.blocks.row_tile import Uses
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tma import Rows, TmaTensor
from cute_fa.fa3.fwd_context import Cta, StripedTile


@cute.jit
def load(cta: Cta):
    """Load what the CTA's tiles need, as far ahead as the slots allow.

    Waits: empty slots of pipe_q, pipe_k, pipe_v.   Signals: full slots of the same.
    Registers: cfg.producer_registers.
    """

    def load_tile(work: WorkTile, uses: Uses) -> Uses:
        return _load_tile(cta, cta.tile(work, uses))

    for_each_tile(cta.schedule, load_tile, Uses.none())


@cute.jit
def _load_tile(cta: Cta, tile: StripedTile) -> Uses:
    """Q, and K and V from right to left in the consumers' order of need: K for S = QKᵀ, then V of
    the block before it for O += PV. V of fp8 inputs goes before its own block's K: TRANSPOSE has to
    turn it first.

    The first K goes before Q, whose strips may have to wait until the last tile's O has left them.
    """
    cfg = cta.config
    transfers = cta.transfers
    queries, keys = Rows.of_queries(tile.sequence), Rows.of_keys(tile.sequence)
    first, stop = tile.first_use, tile.first_use + tile.blocks.count
    if first < stop:
        _load_block(cta.pipe_k, transfers.k, cta.sK, keys, tile, first)
    for w in cutlass.range_constexpr(cfg.num_consumers):
        dst, src = transfers.q.tile(cta.sQ, queries, tile.head, tile.strip(cta, w))
        _fill(transfers.q.atom, cta.pipe_q, tile.use_of_q(cta, w), src, dst)
    if cutlass.const_expr(cfg.is_fp8):
        if first < stop:
            _load_block(cta.pipe_v, transfers.v, cta.sV, keys, tile, first)
        for n in cutlass.range(first + 1, stop, unroll=1):
            _load_block(cta.pipe_v, transfers.v, cta.sV, keys, tile, n)
            _load_block(cta.pipe_k, transfers.k, cta.sK, keys, tile, n)
    else:
        for n in cutlass.range(first + 1, stop, unroll=1):
            _load_block(cta.pipe_k, transfers.k, cta.sK, keys, tile, n)
            _load_block(cta.pipe_v, transfers.v, cta.sV, keys, tile, n - 1)
        if first < stop:
            _load_block(cta.pipe_v, transfers.v, cta.sV, keys, tile, stop - 1)
    return tile.uses_after


@cute.jit
def _load_block(
    pipe: TmaPipe,
    tensor: TmaTensor,
    sX: cute.Tensor,
    keys: Rows,
    tile: StripedTile,
    n: cutlass.Int32,
):
    """Use ``n`` of a ring."""
    dst, src = tensor.tile(sX, keys, tile.head_kv, tile.block(n))
    _fill(tensor.atom, pipe, n, src, dst)


@cute.jit
def _fill(atom: cute.CopyAtom, pipe: TmaPipe, n, src: cute.Tensor, dst: cute.Tensor):
    """Use ``n`` of ``pipe``: tile ``src`` (TMA,) to its slot of ``dst`` (TMA, slot)."""
    pipe.acquire(n)
    cute.copy(atom, src, dst[None, pipe.slot(n)], tma_bar_ptr=pipe.full(n))
