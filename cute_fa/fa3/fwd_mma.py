"""CONSUMER: one warpgroup that computes a strip of 64 query rows."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warp as warp_ops
from cutlass.cute.nvgpu import warpgroup

from cute_fa.blocks.copies import transposed_view
from cute_fa.blocks.mask import mask_scores
from cute_fa.blocks.mma import as_operand_a, row_offset
from cute_fa.blocks.scores import cap_scores, fold_scale_sign
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.softmax import OnlineSoftmax, rescale_rows
from cute_fa.blocks.tiles import CHUNK_BYTES, MMA_M, WARP_THREADS
from cute_fa.blocks.tma import TmaTensor
from cute_fa.blocks.wgmma import (
    as_mma_blocks,
    gemm,
    make_accumulator,
    mma_reg_smem,
    mma_smem_smem,
    operand_a,
    operand_b,
)
from cute_fa.fa3.config import (
    ELEMENT_BYTES,
    STRIP_ROWS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
    Fa3FwdBarrier,
)
from cute_fa.fa3.fwd_context import CtaTile


@dataclass(frozen=True)
class Strip:
    """What one consumer works on: its operands, statistics and place in the problem."""

    cta: CtaTile
    mma_qk: cutlass.Constexpr
    mma_pv: cutlass.Constexpr
    tSrQ: cute.Tensor  # descriptors, (MMA, MMA_M, MMA_D)
    tSrK: cute.Tensor  # descriptors, (MMA, MMA_N, MMA_D, stage)
    tOrVt: cute.Tensor  # descriptors, (MMA, MMA_Dv, MMA_N, stage)
    rP: cute.Tensor  # P of the latest block, ((2, 2, 2), 1, N / 16)
    acc_O: cute.Tensor  # ((2, 2, Dv / 8), 1, 1)
    softmax: OnlineSoftmax
    consumer: cutlass.Int32
    thread: cutlass.Int32  # within the warpgroup
    warp_row: cutlass.Int32  # first global row of the warp
    thread_row: cutlass.Int32  # global row of the thread's first accumulator element
    thread_column: cutlass.Int32  # and its column in the tile


@cute.jit
def attend(
    cta: CtaTile,
    tma_o: TmaTensor,
    mLSE: cute.Tensor,
    consumer: cutlass.Int32,
    thread: cutlass.Int32,
):
    """Compute, write and leave: O and LSE of strip ``consumer``.

    Waits: full slots of pipe_q, pipe_k, pipe_v; its turn; its strip's barrier.
    Signals: empty slots of pipe_k, pipe_v; the next consumer's turn.
    Registers: cfg.consumer_registers.
    """
    cfg = cta.config
    strip = _strip(cta, consumer, thread)
    blocks = cta.blocks
    count = blocks.count
    if count > 0:
        cta.pipe_q.wait(consumer)
        if cutlass.const_expr(not cfg.has_softcap):
            _fold_scale_sign(strip)
        _first_block(strip)
        # Uses 1 … count − 1 of the rings, in the three ranges of ``KeyBlocks``.
        one = cutlass.Int32(1)
        first_full = cutlass.max(blocks.n_stop - blocks.n_full_stop, one)
        first_left = cutlass.max(blocks.n_stop - blocks.n_full_start, one)
        for n in cutlass.range(1, first_full, unroll=1):
            _next_block(strip, n, is_masked=True)
        for n in cutlass.range(first_full, first_left, unroll=1):
            _next_block(strip, n, is_masked=False)
        if cutlass.const_expr(cfg.has_window_left):
            for n in cutlass.range(first_left, count, unroll=1):
                _next_block(strip, n, is_masked=True)
        _last_product(strip, count - 1)
    _store_lse(strip, mLSE[cta.batch, cta.head, None])
    _store_o(strip, tma_o)


def _strip(cta: CtaTile, consumer: cutlass.Int32, thread: cutlass.Int32) -> Strip:
    """The operands and empty statistics of one consumer."""
    cfg = cta.config
    dtype = DTYPES[cfg.dtype]
    mma_qk = mma_smem_smem(dtype, cfg.tile_n)
    mma_pv = mma_reg_smem(dtype, cfg.padded_dv)
    acc_O = make_accumulator(mma_pv, cfg.padded_dv)  # ((2, 2, Dv / 8), 1, 1)
    acc_O.fill(0.0)
    warp = cute.arch.make_warp_uniform(thread // WARP_THREADS)
    warp_row = cta.m_block * cfg.tile_m + consumer * STRIP_ROWS + warp * MMA_M
    lane = thread % WARP_THREADS
    softmax = OnlineSoftmax.start(2, cta.scores.scale_log2)
    return Strip(
        cta=cta,
        mma_qk=mma_qk,
        mma_pv=mma_pv,
        tSrQ=operand_a(mma_qk, cta.sQ)[None, None, None, consumer],
        tSrK=operand_b(mma_qk, cta.sK),
        tOrVt=operand_b(mma_pv, transposed_view(cta.sV)),
        rP=cute.make_rmem_tensor(((2, 2, 2), 1, cfg.tile_n // 16), dtype),
        acc_O=acc_O,
        softmax=softmax,
        consumer=consumer,
        thread=thread,
        warp_row=warp_row,
        thread_row=warp_row + lane // 4,
        thread_column=2 * (lane % 4),
    )


@cute.jit
def _first_block(strip: Strip):
    """S and P of the right-most block, which nothing overlaps."""
    cta = strip.cta
    acc_S = make_accumulator(strip.mma_qk, cta.config.tile_n)
    cta.pipe_k.wait(0)
    _await_turn(strip, is_first=True)
    warpgroup.fence()
    # S = Q Kᵀ   (64, N) = (64, D) @ (D, N)
    gemm(
        strip.mma_qk,
        acc_S,
        strip.tSrQ,
        strip.tSrK[None, None, None, cta.pipe_k.slot(0)],
        accumulate=False,
    )
    _pass_turn(strip)
    warpgroup.wait_group(0)
    cta.pipe_k.release(0)
    _softmax(strip, acc_S, 0, is_masked=True)
    _keep_p(strip, acc_S)
    cta.pipe_v.wait(0)


@cute.jit
def _next_block(strip: Strip, n: cutlass.Int32, is_masked: cutlass.Constexpr):
    """Use ``n`` of K and ``n`` − 1 of V: this block's softmax runs while the tensor core adds the
    block before it to O (paper, section 3.2)."""
    cta = strip.cta
    acc_S = make_accumulator(strip.mma_qk, cta.config.tile_n)
    cta.pipe_k.wait(n)
    _await_turn(strip)
    warpgroup.fence()
    # S = Q Kᵀ   (64, N) = (64, D) @ (D, N)
    gemm(
        strip.mma_qk,
        acc_S,
        strip.tSrQ,
        strip.tSrK[None, None, None, cta.pipe_k.slot(n)],
        accumulate=False,
    )
    _add_pv(strip, n - 1)
    _pass_turn(strip)
    warpgroup.wait_group(1)
    cta.pipe_k.release(n)
    rescale = _softmax(strip, acc_S, n, is_masked)
    # PERF(SASS): the next product's V is awaited here, and not where it is used, because ptxas
    # hoists the wait for this product above all of the softmax unless a branch stands between.
    cta.pipe_v.wait(n)
    warpgroup.wait_group(0)
    cta.pipe_v.release(n - 1)
    rescale_rows(as_mma_blocks(strip.acc_O), rescale)
    _keep_p(strip, acc_S)


@cute.jit
def _last_product(strip: Strip, n: cutlass.Int32):
    """O += P V of the left-most block."""
    _await_turn(strip)
    warpgroup.fence()
    _add_pv(strip, n)
    _pass_turn(strip, is_last=True)
    warpgroup.wait_group(0)


def _add_pv(strip: Strip, n: cutlass.Int32) -> None:
    """Issue O += P V   (64, Dv) = (64, N) @ (N, Dv) of use ``n``, whose V has landed."""
    cta = strip.cta
    vt = strip.tOrVt[None, None, None, cta.pipe_v.slot(n)]
    gemm(strip.mma_pv, strip.acc_O, strip.rP, vt, accumulate=True)


@cute.jit
def _softmax(
    strip: Strip, acc_S: cute.Tensor, n: cutlass.Int32, is_masked: cutlass.Constexpr
) -> cute.Tensor:
    """S ← P of use ``n``, statistics updated; returns what O has to be multiplied by."""
    cta = strip.cta
    scores = as_mma_blocks(acc_S)  # ((2, 2), 1, N / 8)
    cap_scores(scores, cta.scores)
    if cutlass.const_expr(is_masked):
        first_column = (cta.blocks.n_stop - 1 - n) * cta.config.tile_n
        last_column = first_column + cta.config.tile_n - 1
        last_row = strip.warp_row + MMA_M - 1
        if cta.band.cuts(strip.warp_row, last_row, first_column, last_column):
            column = first_column + strip.thread_column
            mask_scores(scores, cta.band, strip.thread_row, column, WARPGROUP_WARPS)
    return strip.softmax.absorb(scores, is_masked)


def _keep_p(strip: Strip, acc_S: cute.Tensor) -> None:
    """P to 16 bits, in the registers that the next O += PV reads."""
    _round(as_operand_a(as_mma_blocks(acc_S)), strip.rP)


def _round(src: cute.Tensor, dst: cute.Tensor) -> None:
    """fp32 to 16 bits, both as A fragments ((2, 2, 2), 1, k-steps).

    DSL(4.8.1): one k-step at a time. The conversion of a whole tile whose size is no power of two
    leaves single 16-bit values, which are packed only where they are read: after wgmma.fence.
    """
    for k in range(cute.size(src, mode=[2])):
        dst[None, None, k].store(src[None, None, k].load().to(dst.element_type))


@cute.jit
def _await_turn(strip: Strip, is_first: cutlass.Constexpr = False):
    """Wait until the consumer before this one has issued its products; consumer 0 begins."""
    cfg = strip.cta.config
    if cutlass.const_expr(cfg.has_turns):
        if cutlass.const_expr(is_first):
            if strip.consumer > 0:
                _turn_barrier(strip)
        else:
            _turn_barrier(strip)


def _turn_barrier(strip: Strip) -> None:
    cute.arch.barrier(
        barrier_id=int(Fa3FwdBarrier.TURN) + strip.consumer,
        number_of_threads=2 * WARPGROUP_THREADS,
    )


@cute.jit
def _pass_turn(strip: Strip, is_last: cutlass.Constexpr = False):
    """Let the next consumer issue; after the last consumer's last product nobody waits."""
    cfg = strip.cta.config
    if cutlass.const_expr(cfg.has_turns):
        following = strip.consumer + 1
        if strip.consumer == cfg.num_consumers - 1:
            following = cutlass.Int32(0)
        if cutlass.const_expr(is_last):
            if following > 0:
                _arrive_turn(following)
        else:
            _arrive_turn(following)


def _arrive_turn(consumer: cutlass.Int32) -> None:
    cute.arch.barrier_arrive(
        barrier_id=int(Fa3FwdBarrier.TURN) + consumer, number_of_threads=2 * WARPGROUP_THREADS
    )


def _strip_barrier(strip: Strip) -> None:
    """All threads of this consumer."""
    cute.arch.barrier(
        barrier_id=int(Fa3FwdBarrier.STRIP) + strip.consumer, number_of_threads=WARPGROUP_THREADS
    )


@cute.jit
def _fold_scale_sign(strip: Strip):
    """Negate or clear the strip of Q in shared memory if the scale is negative or zero.

    Where an element lies does not matter here, so the threads walk over the strip's bytes.
    """
    cfg = strip.cta.config
    if strip.cta.scores.scale <= 0.0:
        chunk = CHUNK_BYTES // ELEMENT_BYTES
        chunks = cfg.smem_q_bytes // CHUNK_BYTES // WARPGROUP_THREADS
        layout = cute.make_layout(
            (cfg.num_consumers, WARPGROUP_THREADS, (chunk, chunks)),
            stride=(cfg.smem_strip_bytes // ELEMENT_BYTES, chunk, (1, WARPGROUP_THREADS * chunk)),
        )
        words = cute.make_tensor(strip.cta.memory_q, layout)[strip.consumer, strip.thread, None]
        fold_scale_sign(words, strip.cta.scores)
        # The tensor core reads Q through the async proxy.
        cute.arch.fence_view_async_shared()
        _strip_barrier(strip)


@cute.jit
def _store_lse(strip: Strip, mLSE: cute.Tensor):
    """O ← O / l in registers, and LSE (Sq,) by the first thread of each quad."""
    lse = strip.softmax.finish(as_mma_blocks(strip.acc_O))
    if strip.thread_column == 0:
        for r in cutlass.range_constexpr(cute.size(lse)):
            row = strip.thread_row + row_offset(r, WARPGROUP_WARPS)
            if row < strip.cta.band.seqlen.seqlen_q:
                mLSE[row] = lse[r]


@cute.jit
def _store_o(strip: Strip, tma_o: TmaTensor):
    """O: registers → shared memory, where the strip of Q was → global, by TMA.

    Rows past Sq and columns past Dv are outside the tensor, which TMA does not write.
    """
    cta = strip.cta
    cfg = cta.config
    rO = cute.make_rmem_tensor_like(strip.acc_O, DTYPES[cfg.dtype])
    _round(as_operand_a(as_mma_blocks(strip.acc_O)), as_operand_a(as_mma_blocks(rO)))
    store_matrix = cute.make_copy_atom(
        warp_ops.StMatrix8x8x16bOp(transpose=False, num_matrices=4), rO.element_type
    )
    tiled_mma = cute.make_tiled_mma(strip.mma_pv)
    to_smem = cute.make_tiled_copy_C(store_matrix, tiled_mma).get_slice(strip.thread)
    sO = cta.sO[None, None, strip.consumer]  # (64, Dv)
    # A warp's O may lie where another's rows of Q were: wait until no product reads them.
    _strip_barrier(strip)
    cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(sO))
    cute.arch.fence_view_async_shared()
    _strip_barrier(strip)
    if strip.thread < WARP_THREADS:
        tOsO, tOgO = tma_o.tiles(cta.head, cta.batch, cta.sO)  # (TMA, strip), (TMA, tile)
        row_tile = cta.m_block * cfg.num_consumers + strip.consumer
        cute.copy(tma_o.atom, tOsO[None, strip.consumer], tOgO[None, row_tile])
        cute.arch.cp_async_bulk_commit_group()
        # Shared memory must outlive the copy's reads of it.
        cute.arch.cp_async_bulk_wait_group(0, read=True)
