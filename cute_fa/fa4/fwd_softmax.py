"""SOFTMAX: one warpgroup per Q tile, one thread per row; turns S into P, in tensor memory."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.fp8 import HeadDescales
from cute_fa.blocks.pack_gqa import HeadGroup
from cute_fa.blocks.row_mask import mask_row
from cute_fa.blocks.row_softmax import RowSoftmax
from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.scores import ScoreScale, cap_scores
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tiles import WARP_THREADS, WARPGROUP_WARPS
from cute_fa.exp2 import CHUNK_COLUMNS
from cute_fa.fa4.config import TILE_M, Fa4FwdBarrier
from cute_fa.fa4.fwd_context import Cta


@dataclass(frozen=True)
class Row:
    """What one thread works on: a row of a Q tile, which stands for a query of a head."""

    cta: Cta
    tile: RowTile
    scores: ScoreScale  # of all blocks, unless cta.config.has_block_descales
    descales: HeadDescales
    softmax: RowSoftmax
    i: cutlass.Int32  # Q tile
    thread: cutlass.Int32  # within the warpgroup: the row of the Q tile
    warp: cutlass.Int32  # within the warpgroup
    query: cutlass.Int32
    head: cutlass.Int32


@cute.jit
def softmax(cta: Cta, mLSE: cute.Tensor, i: cutlass.Int32, thread: cutlass.Int32):
    """P, sums and LSE of Q tile ``i`` of all tiles.

    Waits: signals s, sums_taken; in a pair of CTAs, barrier RESCALE.
    Signals: barrier RESCALE; p, p_rest, sums.
    Registers: cfg.softmax_registers.
    """

    cta = cta.with_tmem()

    def softmax_tile(work: WorkTile, uses: Uses) -> Uses:
        return _softmax_tile(_row(cta, cta.tile(work, uses), i, thread), mLSE)

    for_each_tile(cta.schedule, softmax_tile, Uses.none())


def _row(cta: Cta, tile: RowTile, i: cutlass.Int32, thread: cutlass.Int32) -> Row:
    cfg = cta.config
    group = HeadGroup(cfg.packed_group)
    warp = cute.arch.make_warp_uniform(thread // WARP_THREADS)
    row = cta.q_tile(tile, i) * TILE_M + thread
    scores, descales = cta.scores, cta.descales_of(tile)
    if not cfg.has_block_descales:
        scores = descales.scale(scores, 0, 0)
    return Row(
        cta=cta,
        tile=tile,
        scores=scores,
        descales=descales,
        softmax=RowSoftmax.start(scores.scale_log2, cfg.rescale_threshold, cfg.p_exponent),
        i=i,
        thread=thread,
        warp=warp,
        query=group.query(row),
        head=group.head(tile.head, row),
    )


@cute.jit
def _softmax_tile(row: Row, mLSE: cute.Tensor) -> Uses:
    """All blocks of a Q tile, from right to left; then the rows' sums and LSE."""
    cta, tile = row.cta, row.tile
    cfg = cta.config
    blocks = tile.blocks
    if cutlass.const_expr(cfg.is_resident and cfg.is_paired):
        # The last factors of the tile before have been read, too.
        cta.signals.sums_taken.wait_for_previous(row.i, tile.uses.tiles)
    # The three ranges of ``KeyBlocks``, counted from the right.
    first_full = blocks.n_stop - blocks.n_full_stop
    first_left = blocks.n_stop - blocks.n_full_start
    for j in cutlass.range(first_full, unroll=1):
        _block(row, j, is_masked=True)
    for j in cutlass.range(first_full, first_left, unroll=1):
        _block(row, j, is_masked=False)
    if cutlass.const_expr(cfg.has_window_left):
        for j in cutlass.range(first_left, blocks.count, unroll=1):
            _block(row, j, is_masked=True)
    if cutlass.const_expr(cfg.is_resident and not cfg.is_paired):
        cta.signals.sums_taken.wait_for_previous(row.i, tile.uses.tiles)
    cta.sSum[row.thread, row.i] = row.softmax.total()
    cta.signals.sums.arrive(row.i)
    if row.query < tile.sequence.seqlen.seqlen_q:
        tile.sequence.row_values(mLSE, row.head)[row.query] = row.softmax.lse()
    return tile.uses_after


@cute.jit
def _block(row: Row, j: cutlass.Int32, is_masked: cutlass.Constexpr):
    """One block: S from tensor memory, the rows' factors to CORRECTION, P to tensor memory."""
    cta, tile = row.cta, row.tile
    cfg = cta.config
    buffer = cta.s_buffer(tile, row.i, j)
    row_S = cute.make_rmem_tensor(cfg.tile_n, cutlass.Float32)  # (N,)
    tS = tmem.TmemRow(cta.tmem_s(buffer), cfg.tile_n, CHUNK_COLUMNS, row.thread)
    cta.signals.s.wait(buffer, cta.s_use(tile, row.i, j))
    for chunk in cutlass.range_constexpr(tS.num_chunks):
        tS.load(chunk, _columns(row_S, chunk))
    scores, softmax = _of_block(row, j)
    cap_scores(row_S, scores)
    if cutlass.const_expr(is_masked):
        # Whether a warp's rows are cut at all is not asked: where the paths met again, its whole
        # row of registers would have to be moved.
        first_column = (tile.blocks.n_stop - 1 - j) * cfg.tile_n
        mask_row(row_S, tile.band, row.query, first_column)
    factor = softmax.absorb_maximum(row_S)
    if j > 0:
        cta.sFactor[row.thread, buffer] = factor
        _hand_out_factors(cta, buffer, row.warp)
    if cutlass.const_expr(is_masked or cfg.has_softcap):
        _store_p(row, softmax, row_S, buffer)
    else:
        _store_p(row, softmax, row_S, buffer, tS)


@cute.jit
def _hand_out_factors(cta: Cta, buffer, warp: cutlass.Int32):
    """To the CORRECTION warp of the same rows.

    What MMA waits for between this block and the next use of the buffer says that CORRECTION has
    read them, but not across CTAs (``Signal.is_paired``): there CORRECTION is waited for, which has
    read the factors of the block before when it comes to take these.
    """
    hand_out = cute.arch.barrier if cta.config.is_paired else cute.arch.barrier_arrive
    hand_out(
        barrier_id=int(Fa4FwdBarrier.RESCALE) + WARPGROUP_WARPS * buffer + warp,
        number_of_threads=2 * WARP_THREADS,
    )


def _of_block(row: Row, j: cutlass.Int32) -> tuple[ScoreScale, RowSoftmax]:
    """What the raw scores of block ``j`` are to be multiplied by, and the statistics for it."""
    if not row.cta.config.has_block_descales:
        return row.scores, row.softmax
    key = (row.tile.blocks.n_stop - 1 - j) * row.cta.config.tile_n
    scores = row.descales.scale(row.scores, row.query, key)
    return scores, row.softmax.of_block(scores.scale_log2, row.descales.weight(key))


@cute.jit
def _store_p(
    row: Row,
    softmax: RowSoftmax,
    row_S: cute.Tensor,
    buffer: cutlass.Int32,
    tS: tmem.TmemRow | None = None,
):
    """P = 2^(S·scale − anchor) to 16 or 8 bits, chunk by chunk; the first part is signalled early.

    Args:
        tS: S in tensor memory, if that is still what row_S is.
    """
    # PERF(SASS): ptxas, which cannot know who waits, puts the factors' barrier and the first part's
    # signal behind most exponentials, unless those need what is loaded after it: S once more.
    cta = row.cta
    cfg = cta.config
    first_chunks = cfg.first_part_columns // CHUNK_COLUMNS
    chunk_columns = CHUNK_COLUMNS * cfg.tmem_map.p_columns // cfg.tile_n
    tP = tmem.TmemRow(cta.tmem_p(buffer), cfg.tmem_map.p_columns, chunk_columns, row.thread)
    if cutlass.const_expr(tS is None):
        # The thread's whole row is in registers, and P may be written over it.
        tmem.finish_loads()
    else:
        for chunk in cutlass.range_constexpr(1, first_chunks):
            tS.load(chunk, _columns(row_S, chunk))
    for chunk in cutlass.range_constexpr(tP.num_chunks):
        start = chunk * CHUNK_COLUMNS
        pairs = cfg.polynomial_pairs_of(chunk)
        softmax.exponentiate(row_S, start, start + CHUNK_COLUMNS, pairs)
        rP = cute.make_rmem_tensor(CHUNK_COLUMNS, DTYPES[cfg.dtype])
        rP.store(_columns(row_S, chunk).load().to(rP.element_type))
        if cutlass.const_expr(chunk in (0, first_chunks) and tS is not None):
            tmem.finish_loads()
        tP.store(chunk, cute.recast_tensor(rP, cutlass.Float32))
        if cutlass.const_expr(chunk == first_chunks - 1):
            tmem.finish_stores()
            if cutlass.const_expr(tS is not None):
                for later in cutlass.range_constexpr(first_chunks, tP.num_chunks):
                    tS.load(later, _columns(row_S, later))
            cta.signals.p.arrive(buffer)
    tmem.finish_stores()
    cta.signals.p_rest.arrive(buffer)


def _columns(row_S: cute.Tensor, chunk: int) -> cute.Tensor:
    """Chunk ``chunk`` of a row in registers, (32,)."""
    return cute.make_tensor(row_S.iterator + chunk * CHUNK_COLUMNS, cute.make_layout(CHUNK_COLUMNS))
