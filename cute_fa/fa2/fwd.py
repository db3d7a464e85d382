"""FlashAttention-2 forward for mma.sync GPUs (sm_80 and all later ones).

One CTA computes O and LSE of ``tile_m`` query rows of one (batch, head):

    S = Q Kᵀ · scale        m = rowmax over the blocks seen        P = exp(S − m)
    O ← O · exp(m_old − m) + P V        l ← l · exp(m_old − m) + rowsum P
    at the end  O / l  and  LSE = m + ln l

K/V blocks go right to left, so that the blocks which need masking come first. Warps split the rows
of Q, never the columns of K: no warp needs another's results (paper, section 3.3).

    shared memory   filled by       groups in flight        freed at
    sQ              cp.async        1, before the loop      the end, then O is staged in it
    sK ring         cp.async        up to ``stages``        the second barrier of its iteration
    sV ring         cp.async        up to ``stages``        the first barrier of the next iteration

One iteration, all warps alike (``stages`` = 1):

    wait K(n)   barrier   load V(n)      S = Q K(n)ᵀ
    wait V(n)   barrier   load K(n−1)    softmax    O += P V(n)
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import CopyUniversalOp

from cute_fa.blocks.block_range import KeyBlocks, key_blocks
from cute_fa.blocks.copies import (
    async_load_copy,
    chunk_store_copy,
    copy_tile,
    shared_tile,
)
from cute_fa.blocks.gemm import Operand, gemm_reg_smem, gemm_smem_smem, operand_a, operand_b
from cute_fa.blocks.mask import mask_scores
from cute_fa.blocks.mma import as_operand_a, row_offset, tiled_mma_rows
from cute_fa.blocks.scores import ScoreScale, cap_scores, fold_scale_sign, score_scale
from cute_fa.blocks.seqlen import (
    Band,
    DenseSequences,
    PackedSequences,
    Sequence,
    Window,
    num_sequences,
    sequences,
)
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.softmax import OnlineSoftmax
from cute_fa.blocks.tiles import MMA_M, SMEM_ALIGN_BYTES, WARP_THREADS
from cute_fa.fa2.config import Fa2FwdConfig


@dataclass(frozen=True)
class RingLoad:
    """The copy of one operand's blocks from global memory into its shared-memory ring.

    Attributes:
        copy: cp.async, 16 bytes per thread.
        gmem: source partition, (CPY, CPY_N, CPY_K, n_block).
        smem: destination partition, (CPY, CPY_N, CPY_K, stage).
        coords: (row, column) of each chunk in its tile, (CPY, CPY_N, CPY_K).
        columns: D or Dv if the tile is padded beyond it, else None.
    """

    copy: cute.TiledCopy
    gmem: cute.Tensor
    smem: cute.Tensor
    coords: cute.Tensor
    columns: cutlass.Constexpr


@dataclass(frozen=True)
class RowTile:
    """What one CTA works on: its operands, rings, statistics and place in the problem."""

    tiled_mma: cute.TiledMma
    q: Operand  # (M, D)
    k: Operand  # (N, D, stage)
    vt: Operand  # (Dv, N, stage)
    load_k: RingLoad
    load_v: RingLoad
    acc_O: cute.Tensor  # ((2, 2), MMA_M, MMA_Dv)
    acc_S_shape: cutlass.Constexpr  # ((2, 2), MMA_M, MMA_N)
    softmax: OnlineSoftmax
    scores: ScoreScale
    band: Band
    blocks: KeyBlocks
    m_block: cutlass.Int32
    warp_row: cutlass.Int32  # first global row of the warp
    thread_row: cutlass.Int32  # global row of the thread's first accumulator element
    thread_column: cutlass.Int32  # and its column in the tile


class Fa2Fwd:
    """The forward kernel of one ``Fa2FwdConfig``."""

    def __init__(self, config: Fa2FwdConfig) -> None:
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (B, Sq, Hq, D), or packed (Tq, Hq, D)
        mK: cute.Tensor,  # (B, Sk, Hk, D) or (Tk, Hk, D)
        mV: cute.Tensor,  # (B, Sk, Hk, Dv) or (Tk, Hk, Dv)
        mO: cute.Tensor,  # (B, Sq, Hq, Dv) or (Tq, Hq, Dv)
        mLSE: cute.Tensor,  # (B, Hq, Sq) or (Hq, Tq) fp32
        softmax_scale: cutlass.Float32,
        softcap: cutlass.Float32,
        window_left: cutlass.Int32,
        window_right: cutlass.Int32,
        stream,
        *lengths,  # of packed sequences: blocks.signature
    ):
        """Launch on ``stream``; only variants that have them read ``softcap`` and the window."""
        cfg = self.config
        window = Window.of(cfg, window_left, window_right)
        launched = sequences(mQ, mK, window, lengths)
        scores = score_scale(softmax_scale, softcap, cfg.has_softcap)
        self.kernel(mQ, mK, mV, mO, mLSE, scores, launched).launch(
            grid=[
                cute.ceil_div(launched.max_seqlen_q, cfg.tile_m),
                mQ.shape[-2],
                num_sequences(mQ, lengths),
            ],
            block=[cfg.num_threads, 1, 1],
            # Said aloud, so that the compiler does not spill to fit a third CTA on an SM.
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        scores: ScoreScale,
        launched: DenseSequences | PackedSequences,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        m_block, head, batch = cute.arch.block_idx()
        if cutlass.const_expr(cfg.is_causal):
            # Later rows see more keys: they start first, so that no long tile is left for the end.
            m_block = cute.arch.grid_dim()[0] - 1 - m_block
        sequence = launched.of(batch)
        tensors = (mQ, mK, mV, mO, mLSE)
        if cutlass.const_expr(cfg.is_varlen):
            # The grid is as long as the longest sequence.
            if m_block * cfg.tile_m < sequence.seqlen.seqlen_q:
                self.row_tile(tensors, sequence, head, m_block, scores, tidx)
        else:
            self.row_tile(tensors, sequence, head, m_block, scores, tidx)

    @cute.jit
    def row_tile(
        self,
        tensors: tuple[cute.Tensor, ...],
        sequence: Sequence,
        head: cutlass.Int32,
        m_block: cutlass.Int32,
        scores: ScoreScale,
        tidx: cutlass.Int32,
    ):
        """O and LSE of rows m_block · tile_m … of one head of one sequence."""
        cfg, band = self.config, sequence.band
        mQ, mK, mV, mO, mLSE = tensors
        head_kv = head // (mQ.shape[-2] // mK.shape[-2])
        blocks = key_blocks(band, m_block, cfg.tile_m, cfg.tile_n)

        # -- storage
        smem = cutlass.memory.SmemAllocator()
        memory_q = self._allocate(smem, cfg.smem_q_bytes)
        memory_k = self._allocate(smem, cfg.stages * cfg.smem_k_bytes)
        memory_v = self._allocate(smem, cfg.stages * cfg.smem_v_bytes)
        sQ = shared_tile(memory_q, cfg.tile_m, cfg.padded_d)  # (M, D, 1)
        sO = shared_tile(memory_q, cfg.tile_m, cfg.padded_dv)  # (M, Dv, 1), in Q's place at the end
        sK = shared_tile(memory_k, cfg.tile_n, cfg.padded_d, cfg.stages)  # (N, D, stage)
        sV = shared_tile(memory_v, cfg.tile_n, cfg.padded_dv, cfg.stages)  # (N, Dv, stage)

        # -- tiles
        load_k = self._ring_load(sequence.rows_k(mK, head_kv), sK, tidx, cfg.head_dim)
        load_v = self._ring_load(sequence.rows_k(mV, head_kv), sV, tidx, cfg.head_dim_v)
        tiled_mma = tiled_mma_rows(self.dtype, cfg.num_warps)
        thr_mma = tiled_mma.get_slice(tidx)
        acc_O = cute.make_rmem_tensor(
            thr_mma.partition_shape_C((cfg.tile_m, cfg.padded_dv)), cutlass.Float32
        )  # ((2, 2), MMA_M, MMA_Dv)
        acc_O.fill(0.0)
        tScS = thr_mma.partition_C(cute.make_identity_tensor((cfg.tile_m, cfg.tile_n)))
        tile = RowTile(
            tiled_mma=tiled_mma,
            q=operand_a(tiled_mma, sQ, tidx),
            k=operand_b(tiled_mma, sK, tidx),
            vt=operand_b(tiled_mma, sV, tidx, transpose=True),
            load_k=load_k,
            load_v=load_v,
            acc_O=acc_O,
            acc_S_shape=tScS.shape,
            softmax=OnlineSoftmax.start(cfg.rows_per_thread, scores.scale_log2),
            scores=scores,
            band=band,
            blocks=blocks,
            m_block=m_block,
            warp_row=m_block * cfg.tile_m
            + MMA_M * cute.arch.make_warp_uniform(tidx // WARP_THREADS),
            thread_row=m_block * cfg.tile_m + tScS[0][0],
            thread_column=tScS[0][1],
        )

        # -- loop
        if blocks.count > 0:
            self.prologue(tile, sequence.rows_q(mQ, head), sQ, tidx)
        for i in cutlass.range(blocks.n_stop - blocks.n_full_stop, unroll=1):
            self.attend(tile, blocks.n_stop - 1 - i, is_masked=True)
        for i in cutlass.range(blocks.n_full_stop - blocks.n_full_start, unroll=1):
            self.attend(tile, blocks.n_full_stop - 1 - i, is_masked=False)
        if cutlass.const_expr(cfg.has_window_left):
            for i in cutlass.range(blocks.n_full_start - blocks.n_start, unroll=1):
                self.attend(tile, blocks.n_full_start - 1 - i, is_masked=True)

        # -- results
        self.store_lse(tile, sequence.row_values(mLSE, head))
        self.store_o(tile, sequence.rows_q(mO, head), sO, tidx)

    def _allocate(self, smem: cutlass.memory.SmemAllocator, num_bytes: int) -> cute.Pointer:
        """Shared memory for elements of the kernel's dtype, aligned for any swizzle."""
        elements = num_bytes * 8 // self.dtype.width
        return smem.allocate_array(self.dtype, elements, byte_alignment=SMEM_ALIGN_BYTES)

    def _ring_load(
        self, mX: cute.Tensor, sX: cute.Tensor, tidx: cutlass.Int32, head_dim: int
    ) -> RingLoad:
        """The ring load of mX (Sk, D) into sX (N, D, stage)."""
        cfg = self.config
        rows, columns = cfg.tile_n, cute.size(sX, mode=[1])
        copy = async_load_copy(self.dtype, cfg.num_threads, columns)
        thr_copy = copy.get_slice(tidx)
        gX = cute.local_tile(mX, (rows, columns), (None, 0))  # (N, D, n_block)
        return RingLoad(
            copy=copy,
            gmem=thr_copy.partition_S(gX),
            smem=thr_copy.partition_D(sX),
            coords=thr_copy.partition_S(cute.make_identity_tensor((rows, columns))),
            columns=None if head_dim == columns else head_dim,
        )

    @cute.jit
    def prologue(self, tile: RowTile, mQ: cute.Tensor, sQ: cute.Tensor, tidx: cutlass.Int32):
        """Load Q (Sq, D) and the first K and V blocks; the scale's sign goes into Q."""
        cfg = self.config
        copy = async_load_copy(self.dtype, cfg.num_threads, cfg.padded_d)
        thr_copy = copy.get_slice(tidx)
        shape = (cfg.tile_m, cfg.padded_d)
        gQ = cute.local_tile(mQ, shape, (tile.m_block, 0))  # (M, D)
        tQsQ = thr_copy.partition_D(sQ[None, None, 0])  # (CPY, CPY_M, CPY_K)
        tQcQ = thr_copy.partition_S(cute.make_identity_tensor(shape))
        rows = tile.band.seqlen.seqlen_q - tile.m_block * cfg.tile_m
        columns = None if cfg.head_dim == cfg.padded_d else cfg.head_dim
        copy_tile(copy, thr_copy.partition_S(gQ), tQsQ, tQcQ, rows, columns)
        cute.arch.cp_async_commit_group()
        # Groups after Q's: K, V, K, V, …, K; the loop's waits count on this alternation.
        for i in cutlass.range_constexpr(cfg.stages):
            self.load_block(tile, tile.load_k, tile.blocks.n_stop - 1 - i, is_ragged=True)
            if cutlass.const_expr(i + 1 < cfg.stages):
                self.load_block(tile, tile.load_v, tile.blocks.n_stop - 1 - i, is_ragged=True)
        if cutlass.const_expr(not cfg.has_softcap):
            cute.arch.cp_async_wait_group(2 * cfg.stages - 1)
            fold_scale_sign(tQsQ, tile.scores)

    @cute.jit
    def load_block(
        self, tile: RowTile, load: RingLoad, n_block: cutlass.Int32, is_ragged: cutlass.Constexpr
    ):
        """Start the load of block ``n_block`` into its ring slot, and close a cp.async group.

        Blocks left of the row tile's range load nothing but still close a (then empty) group, so
        that a wait means the same in every iteration. ``is_ragged`` blocks may reach past Sk.
        """
        cfg = self.config
        if n_block >= tile.blocks.n_start:
            rows = None
            if cutlass.const_expr(is_ragged):
                rows = tile.band.seqlen.seqlen_k - n_block * cfg.tile_n
            stage = self.ring_slot(tile, n_block)
            copy_tile(
                load.copy,
                load.gmem[None, None, None, n_block],
                load.smem[None, None, None, stage],
                load.coords,
                rows,
                load.columns,
            )
        cute.arch.cp_async_commit_group()

    def ring_slot(self, tile: RowTile, n_block: cutlass.Int32):
        """Slot of ``n_block`` in the K and the V ring: its distance from the right end, wrapped."""
        if self.config.stages == 1:
            return 0
        return (tile.blocks.n_stop - 1 - n_block) % self.config.stages

    @cute.jit
    def attend(self, tile: RowTile, n_block: cutlass.Int32, is_masked: cutlass.Constexpr):
        """One iteration: take K/V block ``n_block`` into acc_O and the row statistics."""
        cfg = self.config
        stage = self.ring_slot(tile, n_block)
        pending = 2 * (cfg.stages - 1)  # groups younger than the one that a wait is for

        # K(n) has landed for all; all warps are done with the V slot that is filled next.
        cute.arch.cp_async_wait_group(pending)
        cute.arch.sync_threads()
        # Only the right-most block can be ragged, and only a ring of one slot loads its V here.
        is_ragged = is_masked and cfg.stages == 1
        self.load_block(tile, tile.load_v, n_block - (cfg.stages - 1), is_ragged)

        # S = Q Kᵀ   (M, N) = (M, D) @ (D, N)
        acc_S = cute.make_rmem_tensor(tile.acc_S_shape, cutlass.Float32)  # ((2, 2), MMA_M, MMA_N)
        acc_S.fill(0.0)
        gemm_smem_smem(tile.tiled_mma, acc_S, tile.q, tile.k.at_stage(stage))

        # V(n) has landed for all; all warps are done with K(n), whose slot is filled next.
        cute.arch.cp_async_wait_group(pending)
        cute.arch.sync_threads()
        self.load_block(tile, tile.load_k, n_block - cfg.stages, is_ragged=False)

        cap_scores(acc_S, tile.scores)
        if cutlass.const_expr(is_masked):
            self.mask(tile, acc_S, n_block * cfg.tile_n)
        tile.softmax.update(acc_S, tile.acc_O, is_masked)  # S ← P
        rP = cute.make_rmem_tensor_like(acc_S, self.dtype)
        rP.store(acc_S.load().to(self.dtype))

        # O += P V   (M, Dv) = (M, N) @ (N, Dv)
        gemm_reg_smem(tile.tiled_mma, tile.acc_O, as_operand_a(rP), tile.vt.at_stage(stage))

    @cute.jit
    def mask(self, tile: RowTile, acc_S: cute.Tensor, first_column: cutlass.Int32):
        """S ← −inf outside the band, by the warps of whose rows the band cuts this tile."""
        cfg = self.config
        last_row = tile.warp_row + cfg.warp_row_span - 1
        last_column = first_column + cfg.tile_n - 1
        if tile.band.cuts(tile.warp_row, last_row, first_column, last_column):
            column = first_column + tile.thread_column
            mask_scores(acc_S, tile.band, tile.thread_row, column, cfg.num_warps)

    @cute.jit
    def store_lse(self, tile: RowTile, mLSE: cute.Tensor):
        """O ← O / l in registers, and LSE (Sq,) by the first thread of each quad."""
        lse = tile.softmax.finish(tile.acc_O)
        if tile.thread_column == 0:
            for r in cutlass.range_constexpr(cute.size(lse)):
                row = tile.thread_row + row_offset(r, self.config.num_warps)
                if row < tile.band.seqlen.seqlen_q:
                    mLSE[row] = lse[r]

    @cute.jit
    def store_o(self, tile: RowTile, mO: cute.Tensor, sO: cute.Tensor, tidx: cutlass.Int32):
        """O (Sq, Dv): registers → shared memory, where Q was → global, 16 bytes per thread.

        No warp still reads Q: the last barrier of the loop came after its last S = QKᵀ.
        """
        cfg = self.config
        rO = cute.make_rmem_tensor_like(tile.acc_O, self.dtype)
        rO.store(tile.acc_O.load().to(self.dtype))
        to_smem = cute.make_tiled_copy_C(
            cute.make_copy_atom(CopyUniversalOp(), self.dtype), tile.tiled_mma
        ).get_slice(tidx)
        cute.copy(to_smem, to_smem.retile(rO), to_smem.partition_D(sO[None, None, 0]))
        cute.arch.sync_threads()

        copy = chunk_store_copy(self.dtype, cfg.num_threads, cfg.padded_dv)
        thr_copy = copy.get_slice(tidx)
        shape = (cfg.tile_m, cfg.padded_dv)
        gO = cute.local_tile(mO, shape, (tile.m_block, 0))  # (M, Dv)
        tOsO, tOgO = thr_copy.partition_S(sO[None, None, 0]), thr_copy.partition_D(gO)
        chunks = cute.make_rmem_tensor_like(tOsO)  # (CPY, CPY_M, CPY_K)
        cute.copy(copy, tOsO, chunks)
        rows = tile.band.seqlen.seqlen_q - tile.m_block * cfg.tile_m
        columns = None if cfg.head_dim_v == cfg.padded_dv else cfg.head_dim_v
        tOcO = thr_copy.partition_S(cute.make_identity_tensor(shape))
        copy_tile(copy, chunks, tOgO, tOcO, rows, columns)
