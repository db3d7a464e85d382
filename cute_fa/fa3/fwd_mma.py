"""CONSUMER: one warpgroup that computes a strip of 64 rows of each tile."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warp as warp_ops
from cutlass.cute.nvgpu import warpgroup

from cute_fa.blocks import fp8
from cute_fa.blocks.copies import transposed_view
from cute_fa.blocks.fp8 import HeadDescales
from cute_fa.blocks.mask import mask_scores
from cute_fa.blocks.mma import as_operand_a, row_offset
from cute_fa.blocks.pack_gqa import HeadGroup
from cute_fa.blocks.row_tile import Uses
from cute_fa.blocks.scores import ScoreScale, cap_scores, fold_scale_sign
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.softmax import BlockWeight, OnlineSoftmax, rescale_rows
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tiles import (
    CHUNK_BYTES,
    MMA_M,
    PANEL_ELEMENT_BYTES,
    WARP_THREADS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
)
from cute_fa.blocks.tma import Rows
from cute_fa.blocks.wgmma import (
    as_mma_blocks,
    gemm,
    make_accumulator,
    make_operand_a,
    mma_reg_smem,
    mma_smem_smem,
    operand_a,
    operand_b,
)
from cute_fa.fa3.config import STRIP_ROWS, Fa3FwdBarrier
from cute_fa.fa3.fwd_context import Cta, StripedTile


@dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup and its operands, for all tiles."""

    cta: Cta
    mma_qk: cutlass.Constexpr
    mma_pv: cutlass.Constexpr
    tSrQ: cute.Tensor  # descriptors, (MMA, MMA_M, MMA_D)
    tSrK: cute.Tensor  # descriptors, (MMA, MMA_N, MMA_D, stage)
    tOrVt: cute.Tensor  # descriptors, (MMA, MMA_Dv, MMA_N, stage)
    number: cutlass.Int32
    thread: cutlass.Int32  # within the warpgroup
    warp: cutlass.Int32  # within the warpgroup

    @property
    def is_first_warp(self) -> cutlass.Boolean:
        """Whether this is the warp that stores O."""
        return self.warp == 0


@dataclass(frozen=True)
class Strip:
    """One consumer's 64 rows of a tile: P, O, statistics, and where they are.

    Rows are packed rows where query heads share the tile; ``cta.config.packed_group`` of them are
    one query, and masks know queries only.
    """

    owner: Consumer
    tile: StripedTile
    rP: cute.Tensor  # P of the latest block, an A operand of so many k-steps
    acc_O: cute.Tensor  # ((2, 2, Dv / 8), 1, 1)
    scores: ScoreScale  # of all blocks, unless cta.config.has_block_descales
    softmax: OnlineSoftmax
    descales: HeadDescales
    warp_row: cutlass.Int32  # first row of the warp in its sequence
    thread_row: cutlass.Int32  # row of the thread's first accumulator element
    thread_column: cutlass.Int32  # and its column in the tile


@cute.jit
def attend(cta: Cta, mLSE: cute.Tensor, number: cutlass.Int32, thread: cutlass.Int32):
    """O and LSE of strip ``number`` of all tiles of the CTA.

    Waits: full slots of pipe_q, pipe_k, pipe_v; its turn; its strip's barrier.
    Signals: empty slots of the same; the next consumer's turn.
    Registers: cfg.consumer_registers.
    """
    consumer = _consumer(cta, number, thread)

    def attend_tile(work: WorkTile, uses: Uses) -> Uses:
        return _attend_tile(consumer, cta.tile(work, uses), mLSE)

    _open_turns(consumer)
    for_each_tile(cta.schedule, attend_tile, Uses.none())
    _close_turns(consumer)
    # Shared memory must outlive the last store's reads of it.
    _await_stores(consumer)


def _consumer(cta: Cta, number: cutlass.Int32, thread: cutlass.Int32) -> Consumer:
    cfg = cta.config
    dtype = DTYPES[cfg.dtype]
    mma_qk = mma_smem_smem(dtype, cfg.tile_n)
    mma_pv = mma_reg_smem(dtype, cfg.padded_dv)
    if cfg.is_fp8:
        sQ, sK, sVt = map(fp8.bytes_of, (cta.sQ, cta.sK, cta.sVt))
    else:
        sQ, sK, sVt = cta.sQ, cta.sK, transposed_view(cta.sV)
    return Consumer(
        cta=cta,
        mma_qk=mma_qk,
        mma_pv=mma_pv,
        tSrQ=operand_a(mma_qk, sQ)[None, None, None, number],
        tSrK=operand_b(mma_qk, sK),
        tOrVt=operand_b(mma_pv, sVt),
        number=number,
        thread=thread,
        warp=cute.arch.make_warp_uniform(thread // WARP_THREADS),
    )


def _strip(consumer: Consumer, tile: StripedTile) -> Strip:
    """Empty statistics, and O = 0."""
    cta = consumer.cta
    cfg = cta.config
    acc_O = make_accumulator(consumer.mma_pv, cfg.padded_dv)  # ((2, 2, Dv / 8), 1, 1)
    acc_O.fill(0.0)
    lane = consumer.thread % WARP_THREADS
    warp_row = tile.strip(cta, consumer.number) * STRIP_ROWS + consumer.warp * MMA_M
    descales = tile.descales(cta)
    scores = cta.scores
    if not cfg.has_block_descales:
        scores = descales.scale(scores, 0, 0)
    return Strip(
        owner=consumer,
        tile=tile,
        rP=make_operand_a(consumer.mma_pv, cfg.tile_n),
        acc_O=acc_O,
        scores=scores,
        softmax=OnlineSoftmax.start(2, scores.scale_log2, cfg.p_exponent),
        descales=descales,
        warp_row=warp_row,
        thread_row=warp_row + lane // 4,
        thread_column=2 * (lane % 4),
    )


@cute.jit
def _attend_tile(consumer: Consumer, tile: StripedTile, mLSE: cute.Tensor) -> Uses:
    """O and LSE of this consumer's strip of one tile."""
    cta = consumer.cta
    cfg = cta.config
    blocks = tile.blocks
    strip = _strip(consumer, tile)
    use_of_q = tile.use_of_q(cta, consumer.number)
    cta.pipe_q.wait(use_of_q)
    # Uses of the rings, in the three ranges of ``KeyBlocks``.
    first, stop = tile.first_use, tile.first_use + blocks.count
    if first < stop:
        if cutlass.const_expr(not cfg.has_softcap):
            _fold_scale_sign(consumer)
        _first_block(strip, first)
        first_full = first + cutlass.max(blocks.n_stop - blocks.n_full_stop, 1)
        first_left = first + cutlass.max(blocks.n_stop - blocks.n_full_start, 1)
        for n in cutlass.range(first + 1, first_full, unroll=1):
            _next_block(strip, n, is_masked=True)
        for n in cutlass.range(first_full, first_left, unroll=1):
            _next_block(strip, n, is_masked=False)
        if cutlass.const_expr(cfg.has_window_left):
            for n in cutlass.range(first_left, stop, unroll=1):
                _next_block(strip, n, is_masked=True)
    if cutlass.const_expr(cfg.is_persistent and cfg.has_own_o):
        cta.pipe_q.release(use_of_q)
    if first < stop:
        _last_product(strip, stop - 1)
    _store_lse(strip, mLSE)
    _store_o(strip)
    if cutlass.const_expr(cfg.is_persistent and not cfg.has_own_o):
        _await_stores(consumer)
        cta.pipe_q.release(use_of_q)
    return tile.uses_after


@cute.jit
def _first_block(strip: Strip, n: cutlass.Int32):
    """S and P of the right-most block, use ``n``, which nothing overlaps."""
    cta = strip.owner.cta
    acc_S = _begin_scores(strip, n)
    _pass_turn(strip.owner)
    warpgroup.wait_group(0)
    _release_k(strip, n)
    _softmax(strip, acc_S, n, is_masked=True)
    _keep_p(strip, acc_S)
    cta.pipe_pv.wait(n)


@cute.jit
def _next_block(strip: Strip, n: cutlass.Int32, is_masked: cutlass.Constexpr):
    """Use ``n`` of K and ``n`` − 1 of V: this block's softmax runs while the tensor core adds the
    block before it to O (paper, section 3.2)."""
    cta = strip.owner.cta
    acc_S = _begin_scores(strip, n)
    _issue_pv(strip, n - 1)
    _pass_turn(strip.owner)
    warpgroup.wait_group(1)
    _release_k(strip, n)
    rescale = _softmax(strip, acc_S, n, is_masked)
    # PERF(SASS): the next product's V is awaited here, and not where it is used, because ptxas
    # hoists the wait for this product above all of the softmax unless a branch stands between.
    cta.pipe_pv.wait(n)
    warpgroup.wait_group(0)
    cta.pipe_pv.release(n - 1)
    rescale_rows(as_mma_blocks(strip.acc_O), rescale)
    _keep_p(strip, acc_S)


@cute.jit
def _last_product(strip: Strip, n: cutlass.Int32):
    """O += P V of the left-most block, use ``n``."""
    _await_turn(strip.owner)
    warpgroup.fence()
    _issue_pv(strip, n)
    _pass_turn(strip.owner)
    warpgroup.wait_group(0)
    strip.owner.cta.pipe_pv.release(n)


def _begin_scores(strip: Strip, n: cutlass.Int32) -> cute.Tensor:
    """Await K of use ``n`` and the consumer's turn, and issue S = Q Kᵀ; gives S, not there yet."""
    owner = strip.owner
    acc_S = make_accumulator(owner.mma_qk, owner.cta.config.tile_n)
    owner.cta.pipe_k.wait(n)
    _await_turn(owner)
    warpgroup.fence()
    # S = Q Kᵀ   (64, N) = (64, D) @ (D, N)
    k = owner.tSrK[None, None, None, owner.cta.pipe_k.slot(n)]
    gemm(owner.mma_qk, acc_S, owner.tSrQ, k, accumulate=False)
    return acc_S


def _release_k(strip: Strip, n: cutlass.Int32) -> None:
    """K of use ``n`` has been read; LOAD hears of it before the softmax begins."""
    cta = strip.owner.cta
    cta.pipe_k.release(n)
    # PERF(SASS): ptxas sinks the arrival into the softmax, often to its end, unless a branch stands
    # between: this wait, which is over before it begins, because the tile still holds its Q.
    cta.pipe_q.wait(strip.tile.use_of_q(cta, strip.owner.number))


def _issue_pv(strip: Strip, n: cutlass.Int32) -> None:
    """Issue O += P V   (64, Dv) = (64, N) @ (N, Dv) of use ``n``, whose V has landed."""
    owner = strip.owner
    vt = owner.tOrVt[None, None, None, owner.cta.pipe_pv.slot(n)]
    gemm(owner.mma_pv, strip.acc_O, strip.rP, vt, accumulate=True)


@cute.jit
def _softmax(
    strip: Strip, acc_S: cute.Tensor, n: cutlass.Int32, is_masked: cutlass.Constexpr
) -> cute.Tensor:
    """S ← P of use ``n``, statistics updated; returns what O has to be multiplied by."""
    cta, band = strip.owner.cta, strip.tile.band
    blocks = as_mma_blocks(acc_S)  # ((2, 2), 1, N / 8)
    scores, weight = _scale_and_weight(strip, n)
    cap_scores(blocks, scores)
    if cutlass.const_expr(is_masked):
        group = HeadGroup(cta.config.packed_group)
        first_column = strip.tile.block(n) * cta.config.tile_n
        last_column = first_column + cta.config.tile_n - 1
        first_query = group.query(strip.warp_row)
        last_query = group.query(strip.warp_row + MMA_M - 1)
        if band.cuts(first_query, last_query, first_column, last_column):
            column = first_column + strip.thread_column
            query = group.query(strip.thread_row)
            mask_scores(blocks, band, query, column, WARPGROUP_WARPS, group.size)
    return strip.softmax.absorb(blocks, is_masked, scores.scale_log2, weight)


def _scale_and_weight(strip: Strip, n: cutlass.Int32) -> tuple[ScoreScale, BlockWeight | None]:
    """What the raw scores of use ``n`` are to be multiplied by, and how its V weighs."""
    cta = strip.owner.cta
    if not cta.config.has_block_descales:
        return strip.scores, None
    query = HeadGroup(cta.config.packed_group).query(strip.warp_row)
    key = strip.tile.block(n) * cta.config.tile_n
    return strip.descales.scale(cta.scores, query, key), strip.descales.weight(key)


def _keep_p(strip: Strip, acc_S: cute.Tensor) -> None:
    """P to 16 or 8 bits, in the registers that the next O += PV reads."""
    view = fp8.as_operand_a if strip.owner.cta.config.is_fp8 else as_operand_a
    _round(view(as_mma_blocks(acc_S)), strip.rP)


def _round(src: cute.Tensor, dst: cute.Tensor) -> None:
    """fp32 to 16 or 8 bits, both as A fragments, (MMA, 1, k-steps).

    DSL(4.8.1): one k-step at a time. The conversion of a whole tile whose size is no power of two
    leaves single 16-bit values, which are packed only where they are read: after wgmma.fence.
    """
    for k in range(cute.size(src, mode=[2])):
        dst[None, None, k].store(src[None, None, k].load().to(dst.element_type))


@cute.jit
def _open_turns(consumer: Consumer):
    """Consumer 0 begins: the first turn comes from the one before it in the cycle."""
    cfg = consumer.cta.config
    if consumer.number == cfg.num_consumers - 1:
        _arrive_turn(consumer, cutlass.Int32(0))


@cute.jit
def _close_turns(consumer: Consumer):
    """Take back the turn that nobody takes, so that every arrival has met its wait."""
    if consumer.number == 0:
        _await_turn(consumer)


@cute.jit
def _await_turn(consumer: Consumer):
    """Wait until the consumer before this one has issued its products."""
    if cutlass.const_expr(consumer.cta.config.has_turns):
        cute.arch.barrier(
            barrier_id=int(Fa3FwdBarrier.TURN) + consumer.number,
            number_of_threads=2 * WARPGROUP_THREADS,
        )


@cute.jit
def _pass_turn(consumer: Consumer):
    """Let the next consumer issue."""
    following = consumer.number + 1
    if consumer.number == consumer.cta.config.num_consumers - 1:
        following = cutlass.Int32(0)
    _arrive_turn(consumer, following)


def _arrive_turn(consumer: Consumer, following: cutlass.Int32) -> None:
    if consumer.cta.config.has_turns:
        cute.arch.barrier_arrive(
            barrier_id=int(Fa3FwdBarrier.TURN) + following,
            number_of_threads=2 * WARPGROUP_THREADS,
        )


def _strip_barrier(consumer: Consumer) -> None:
    """All threads of this consumer."""
    cute.arch.barrier(
        barrier_id=int(Fa3FwdBarrier.STRIP) + consumer.number, number_of_threads=WARPGROUP_THREADS
    )


@cute.jit
def _fold_scale_sign(consumer: Consumer):
    """Negate or clear the strip of Q in shared memory if the scale is negative or zero.

    Where an element lies does not matter here, so the threads walk over the strip's bytes.
    """
    cta = consumer.cta
    cfg = cta.config
    if cta.scores.scale <= 0.0:
        chunk = CHUNK_BYTES // PANEL_ELEMENT_BYTES
        chunks = cfg.smem_q_bytes // CHUNK_BYTES // WARPGROUP_THREADS
        strip = cfg.smem_q_place_bytes // PANEL_ELEMENT_BYTES
        layout = cute.make_layout(
            (cfg.num_consumers, WARPGROUP_THREADS, (chunk, chunks)),
            stride=(strip, chunk, (1, WARPGROUP_THREADS * chunk)),
        )
        words = cute.make_tensor(cta.memory_q, layout)[consumer.number, consumer.thread, None]
        fold_scale_sign(words, cta.scores, 8 * cfg.element_bytes)
        # The tensor core reads Q through the async proxy.
        cute.arch.fence_view_async_shared()
        _strip_barrier(consumer)


@cute.jit
def _store_lse(strip: Strip, mLSE: cute.Tensor):
    """O ← O / l in registers, and LSE by the first thread of each quad."""
    sequence = strip.tile.sequence
    group = HeadGroup(strip.owner.cta.config.packed_group)
    lse = strip.softmax.finish(as_mma_blocks(strip.acc_O), strip.descales.of_out)
    if strip.thread_column == 0:
        for r in cutlass.range_constexpr(cute.size(lse)):
            row = strip.thread_row + row_offset(r, WARPGROUP_WARPS)
            query = group.query(row)
            if query < sequence.seqlen.seqlen_q:
                head = group.head(strip.tile.head, row)
                sequence.row_values(mLSE, head)[query] = lse[r]


@cute.jit
def _store_o(strip: Strip):
    """O: registers → shared memory → global, by TMA.

    Rows past the sequence's end and columns past Dv are outside what TMA writes.
    """
    owner, tile = strip.owner, strip.tile
    cta = owner.cta
    cfg = cta.config
    rO = cute.make_rmem_tensor_like(strip.acc_O, DTYPES[cfg.out_dtype])
    _round(as_operand_a(as_mma_blocks(strip.acc_O)), as_operand_a(as_mma_blocks(rO)))
    store_matrix = cute.make_copy_atom(
        warp_ops.StMatrix8x8x16bOp(transpose=False, num_matrices=4), rO.element_type
    )
    tiled_mma = cute.make_tiled_mma(owner.mma_pv)
    to_smem = cute.make_tiled_copy_C(store_matrix, tiled_mma).get_slice(owner.thread)
    sO = cta.sO[None, None, owner.number]  # (64, Dv)
    if cutlass.const_expr(cfg.is_persistent and cfg.has_own_o):
        _await_stores(owner)
    # What lay here may still be read: another warp's rows of Q by a product, or the last O by TMA.
    _strip_barrier(owner)
    cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(sO))
    cute.arch.fence_view_async_shared()
    _strip_barrier(owner)
    if owner.is_first_warp:
        queries = Rows.of_queries(tile.sequence)
        src, dst = cta.transfers.o.tile(cta.sO, queries, tile.head, tile.strip(cta, owner.number))
        cute.copy(cta.transfers.o.atom, src[None, owner.number], dst)
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def _await_stores(consumer: Consumer):
    """Until TMA has read this consumer's O from shared memory; its first warp waits, for all."""
    if consumer.is_first_warp:
        cute.arch.cp_async_bulk_wait_group(0, read=True)
