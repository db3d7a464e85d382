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

    uses = for_each_tile(cta.schedule, load_tile, Uses.none())
    if cutlass.const_expr(cta.config.is_paired):
        # The other CTA's warps arrive here, and its copies come here: mbarriers and slots must
        # outlive them.
        cta.pipe_k.drain(uses.blocks)
        cta.pipe_v.drain(uses.blocks)


@cute.jit
def _load_tile(cta: Cta, tile: StripedTile) -> Uses:
    """Q, and K and V from right to left in the consumers' order of need: K for S = QKᵀ, then V of
    the block before it for O += PV. V of fp8 inputs goes before its own block's K: TRANSPOSE has to
    turn it first.

    The first K goes before Q, whose strips may have to wait until the last tile's O has left them.
    """
    cfg = cta.config
    transfers = cta.transfers
    queries = Rows.of_queries(tile.sequence)
    first, stop = tile.first_use, tile.first_use + tile.blocks.count
    if first < stop:
        _load_k(cta, tile, first)
    for w in cutlass.range_constexpr(cfg.num_consumers):
        dst, src = transfers.q.tile(cta.sQ, queries, tile.head, tile.strip(cta, w))
        _fill(transfers.q, cta.pipe_q, tile.use_of_q(cta, w), src, dst)
    if cutlass.const_expr(cfg.is_fp8):
        if first < stop:
            _load_v(cta, tile, first)
        for n in cutlass.range(first + 1, stop, unroll=1):
            _load_v(cta, tile, n)
            _load_k(cta, tile, n)
    else:
        for n in cutlass.range(first + 1, stop, unroll=1):
            _load_k(cta, tile, n)
            _load_v(cta, tile, n - 1)
        if first < stop:
            _load_v(cta, tile, stop - 1)
    return tile.uses_after


@cute.jit
def _load_k(cta: Cta, tile: StripedTile, n: cutlass.Int32):
    """Use ``n`` of pipe_k."""
    _load_block(cta, tile, n, cta.pipe_k, cta.transfers.k, cta.sK_loaded)


@cute.jit
def _load_v(cta: Cta, tile: StripedTile, n: cutlass.Int32):
    """Use ``n`` of pipe_v."""
    _load_block(cta, tile, n, cta.pipe_v, cta.transfers.v, cta.sV_loaded)


def _load_block(
    cta: Cta,
    tile: StripedTile,
    n: cutlass.Int32,
    pipe: TmaPipe,
    tensor: TmaTensor,
    sX: cute.Tensor,
) -> None:
    """Use ``n`` of a ring, or this CTA's part of it."""
    keys = Rows.of_keys(tile.sequence)
    column = 0 if cta.rank is None else cta.rank * tensor.columns
    dst, src = tensor.tile(sX, keys, tile.head_kv, tile.block(n), column)
    _fill(tensor, pipe, n, src, dst)


@cute.jit
def _fill(tensor: TmaTensor, pipe: TmaPipe, n, src: cute.Tensor, dst: cute.Tensor):
    """Use ``n`` of ``pipe``: tile ``src`` (TMA,) to its slot of ``dst`` (TMA, slot)."""
    pipe.acquire(n)
    tensor.copy(src, dst[None, pipe.slot(n)], pipe.full(n))
