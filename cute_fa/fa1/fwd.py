"""FA1 forward: O = softmax(τ Q Kᵀ) V by the loop of the FlashAttention paper, Algorithm 1."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from cute_fa.blocks.block_range import key_blocks
from cute_fa.blocks.copies import async_load_copy, copy_tile, shared_tile
from cute_fa.blocks.math import LOG2_E
from cute_fa.blocks.query_range import query_blocks
from cute_fa.blocks.seqlen import Sequence, Window, num_sequences, sequences
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tiles import SMEM_ALIGN_BYTES
from cute_fa.fa1.config import Fa1FwdConfig
from cute_fa.fa1.fwd_context import Fa1Context, HeadTensors, SharedTensors, Visit
from cute_fa.fa1.fwd_scores import exponentials, scores
from cute_fa.fa1.fwd_update import update_output, update_statistics, write_unseen_rows


class Fa1Fwd:
    """One CTA per batch and query head; K/V blocks outside, Q blocks inside.

    Step (n_block, m_block), every line by all warps, `---` a barrier of the CTA:

        Q_i → sQ by cp.async                                   (K_j, V_j once per n_block)
        ---
        S_w = τ Q_i K_jwᵀ, mask                                warp w: its slice of the columns
        row max of S_w → sWarpMax[w]
        ---
        m̃ = max over w;  P_w = exp2(S_w − m̃);  row sum → sWarpSum[w]
        ---
        thread r < M: (m, l) of row r from HBM, new (m, l) to HBM, two scales → sScaleOld, sScaleNew
        for each tile_dv columns of O:
            P_w V_jw → sPartialO[w]
            ---
            O ← scale_old · O + scale_new · Σ_w sPartialO[w]    HBM → HBM
            --- (only before further columns)

    An element of O, and m and l of a row, belong to the same thread in every step: a thread reads
    from HBM only what it wrote itself, so program order is all the order this needs.
    """

    def __init__(self, config: Fa1FwdConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (B, Sq, Hq, D), or packed (Tq, Hq, D)
        mK: cute.Tensor,  # (B, Sk, Hk, D) or (Tk, Hk, D)
        mV: cute.Tensor,  # (B, Sk, Hk, Dv) or (Tk, Hk, Dv)
        mO: cute.Tensor,  # (B, Sq, Hq, Dv) or (Tq, Hq, Dv)
        mLSE: cute.Tensor,  # (B, Hq, Sq) or (Hq, Tq) fp32, natural log
        mOaccum: cute.Tensor,  # (B, Sq, Hq, Dv) or (Tq, Hq, Dv) fp32
        mRowMax: cute.Tensor,  # (B, Hq, Sq) or (Hq, Tq) fp32
        mRowSum: cute.Tensor,  # (B, Hq, Sq) or (Hq, Tq) fp32
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        stream,
        *lengths,  # of packed sequences: blocks.signature
    ):
        """Launch on grid (Hq, B); softcap and window bounds are read by variants that have them."""
        cfg = self.config
        # Scores in log2 units: τ S · log2 e, or softcap · tanh(τ S / softcap) · log2 e.
        if cutlass.const_expr(cfg.has_softcap):
            score_scale = softmax_scale / softcap * (2.0 * LOG2_E)
        else:
            score_scale = softmax_scale * LOG2_E
        tensors = (mQ, mK, mV, mO, mLSE, mOaccum, mRowMax, mRowSum)
        bounds = (window_left, window_right)
        self.kernel(tensors, score_scale, softcap * LOG2_E, bounds, lengths).launch(
            grid=[mQ.shape[-2], num_sequences(mQ, lengths), 1],
            block=[cfg.num_threads, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: tuple[cute.Tensor, ...],
        score_scale: Float32,
        softcap_log2: Float32,
        bounds: tuple[Int32, Int32],
        lengths: tuple,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        head, batch, _ = cute.arch.block_idx()
        mQ, mK = tensors[:2]
        sequence = sequences(mQ, mK, Window.of(cfg, *bounds), lengths).of(batch)
        ctx = Fa1Context(
            config=cfg,
            band=sequence.band,
            gmem=_select_head(tensors, head, sequence),
            smem=_allocate_shared(cfg),
            score_scale=score_scale,
            softcap_log2=softcap_log2,
            tidx=tidx,
            lane=tidx % cute.arch.WARP_SIZE,
            warp_idx=cute.arch.make_warp_uniform(tidx // cute.arch.WARP_SIZE),
        )
        write_unseen_rows(ctx)
        _all_steps(ctx)


@cute.jit
def _all_steps(ctx: Fa1Context):
    """The double loop: K/V blocks that any row sees, for each the Q blocks that see it."""
    cfg, gmem, smem = ctx.config, ctx.gmem, ctx.smem
    seqlen_q, seqlen_k = ctx.band.seqlen.seqlen_q, ctx.band.seqlen.seqlen_k
    m_blocks = cute.ceil_div(seqlen_q, cfg.tile_m)
    n_start, n_stop = Int32(0), Int32(0)
    if m_blocks > 0:
        n_start = key_blocks(ctx.band, Int32(0), cfg.tile_m, cfg.tile_n).n_start
        n_stop = key_blocks(ctx.band, m_blocks - 1, cfg.tile_m, cfg.tile_n).n_stop
    for n_block in cutlass.range(n_start, n_stop, unroll=1):
        # Every warp's reads of sK and sV lie before the last barrier of the step before.
        _load_rows(gmem.gK, smem.sK, n_block, seqlen_k, ctx.tidx, cfg.num_threads)
        _load_rows(gmem.gV, smem.sV, n_block, seqlen_k, ctx.tidx, cfg.num_threads)
        m_start, m_stop = query_blocks(ctx.band, n_block, cfg.tile_m, cfg.tile_n)
        for m_block in cutlass.range(m_start, m_stop, unroll=1):
            blocks = key_blocks(ctx.band, m_block, cfg.tile_m, cfg.tile_n)
            visit = Visit(
                m_block=m_block,
                n_block=n_block,
                is_first=n_block == blocks.n_start,
                is_last=n_block == blocks.n_stop - 1,
                is_masked=(n_block < blocks.n_full_start) | (n_block >= blocks.n_full_stop),
            )
            _load_rows(gmem.gQ, smem.sQ, m_block, seqlen_q, ctx.tidx, cfg.num_threads)
            cute.arch.cp_async_commit_group()
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()
            acc_S = scores(ctx, visit)
            tOrP = exponentials(ctx, acc_S)
            update_statistics(ctx, visit)
            update_output(ctx, visit, tOrP)


@cute.jit
def _load_rows(
    gX: cute.Tensor,  # (rows, D)
    sX: cute.Tensor,  # (tile, columns, chunks)
    block: Int32,
    num_rows: Int32,
    tidx: Int32,
    num_threads: cutlass.Constexpr,
):
    """cp.async of one block of rows; what lies outside gX arrives as zeros."""
    sX = cute.group_modes(sX, 1, 3)  # (tile, (columns, chunks)) = (tile, D padded)
    rows, columns = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    tiled_copy = async_load_copy(gX.element_type, num_threads, columns)
    thr_copy = tiled_copy.get_slice(tidx)
    gX_tile = cute.local_tile(gX, (rows, columns), (block, 0))
    copy_tile(
        tiled_copy,
        thr_copy.partition_S(gX_tile),
        thr_copy.partition_D(sX),
        thr_copy.partition_S(cute.make_identity_tensor((rows, columns))),
        num_rows - block * rows,
        gX.shape[1],
    )


def _select_head(tensors: tuple[cute.Tensor, ...], head: Int32, sequence: Sequence) -> HeadTensors:
    mQ, mK, mV, mO, mLSE, mOaccum, mRowMax, mRowSum = tensors
    head_kv = head // (mQ.shape[-2] // mK.shape[-2])
    return HeadTensors(
        gQ=sequence.rows_q(mQ, head),
        gK=sequence.rows_k(mK, head_kv),
        gV=sequence.rows_k(mV, head_kv),
        gO=sequence.rows_q(mO, head),
        gLSE=sequence.row_values(mLSE, head),
        gOaccum=sequence.rows_q(mOaccum, head),
        gRowMax=sequence.row_values(mRowMax, head),
        gRowSum=sequence.row_values(mRowSum, head),
    )


def _allocate_shared(cfg: Fa1FwdConfig) -> SharedTensors:
    dtype = DTYPES[cfg.dtype]
    allocator = cutlass.memory.SmemAllocator()

    def tile(rows: int, columns: int, chunks: int = 1) -> cute.Tensor:
        elements = rows * columns * chunks
        memory = allocator.allocate_array(dtype, elements, byte_alignment=SMEM_ALIGN_BYTES)
        return shared_tile(memory, rows, columns, chunks)

    def f32(shape: tuple[int, ...], stride: tuple[int, ...]) -> cute.Tensor:
        return allocator.allocate_tensor(Float32, cute.make_layout(shape, stride=stride), 16)

    row_stride = cfg.partial_o_stride
    return SharedTensors(
        sQ=tile(cfg.tile_m, cfg.padded_d),
        sK=tile(cfg.tile_n, cfg.padded_d),
        sV=tile(cfg.tile_n, cfg.tile_dv, cfg.padded_dv // cfg.tile_dv),
        sPartialO=f32(
            (cfg.num_warps, cfg.tile_m, cfg.tile_dv), (cfg.tile_m * row_stride, row_stride, 1)
        ),
        sWarpMax=f32((cfg.num_warps, cfg.tile_m), (cfg.tile_m, 1)),
        sWarpSum=f32((cfg.num_warps, cfg.tile_m), (cfg.tile_m, 1)),
        sScaleOld=f32((cfg.tile_m,), (1,)),
        sScaleNew=f32((cfg.tile_m,), (1,)),
    )
