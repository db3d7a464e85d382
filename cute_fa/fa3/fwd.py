"""FlashAttention-3 forward for Hopper (sm_90a): TMA, wgmma, specialised warps.

One CTA computes O and LSE of ``tile_m`` query rows of one (batch, head), 64 per consumer:

    S = Q Kᵀ · scale        m = rowmax over the blocks seen        P = exp(S − m)
    O ← (O + P_old V_old) · exp(m_old − m)        l ← l · exp(m_old − m) + rowsum P
    at the end  O / l  and  LSE = m + ln l

See ``Fa3Fwd`` for who does what and who waits for whom.
"""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.block_range import key_blocks
from cute_fa.blocks.copies import shared_tile
from cute_fa.blocks.pipelines import num_mbarriers, tma_pipe
from cute_fa.blocks.scores import ScoreScale, score_scale
from cute_fa.blocks.seqlen import Band, SeqlenInfo, clamp_window
from cute_fa.blocks.signature import DTYPES, fake_forward_arguments
from cute_fa.blocks.tiles import WARP_THREADS
from cute_fa.blocks.tma import shared_tiles, tma_load, tma_store
from cute_fa.fa3.config import (
    ELEMENT_BYTES,
    SMEM_ALIGN_BYTES,
    STRIP_ROWS,
    WARPGROUP_THREADS,
    Fa3FwdConfig,
)
from cute_fa.fa3.fwd_context import CtaTile, Transfers
from cute_fa.fa3.fwd_load import load
from cute_fa.fa3.fwd_mma import attend


def fake_arguments(config: Fa3FwdConfig) -> tuple:
    """Symbolic arguments to compile ``Fa3Fwd(config)`` with (cute.compile, --enable-tvm-ffi)."""
    return fake_forward_arguments(config)


class Fa3Fwd:
    """The forward kernel of one ``Fa3FwdConfig``.

        role       warps                  registers   does
        LOAD       warp 0                 24 or 32    all TMA loads (fwd_load.load)
        (idle)     warps 1–3              24 or 32    give their registers to the consumers
        CONSUMER   4 warps per strip      240 or 160  products, softmax, results (fwd_mma.attend)

        pipe       kind      slots        producer (arrives)    consumer (arrives)
        pipe_q     TmaPipe   1 per strip  LOAD (1 + tx bytes)   its CONSUMER (none: one use)
        pipe_k     TmaPipe   ``stages``   LOAD (1 + tx bytes)   CONSUMER (1 per warp)
        pipe_v     TmaPipe   ``stages``   LOAD (1 + tx bytes)   CONSUMER (1 per warp)

        named barrier  threads  who
        TURN + w       256      consumer w waits, the consumer before it in the cycle arrives
        STRIP + w      128      consumer w, around its generic writes to its strip of Q and O

    Use n of the rings is block n_stop − 1 − n (right to left). One consumer:

        tensor core   S = Q K(n)ᵀ   O += P V(n−1)                  S = Q K(n+1)ᵀ   O += P V(n) …
        softmax                     m, P of S, l        rescale O                  m, P of S, l …

    With has_turns, a consumer issues such a pair of products only in its turn, so that the softmax
    of one runs while the tensor core works for another:

        consumer 0   ▓ products ▓ softmax ░░░░ ▓ products ▓ softmax ░░░░
        consumer 1   ░░░░░░░░░░░░ ▓ products ▓ softmax ░░░░ ▓ products ▓ …
    """

    def __init__(self, config: Fa3FwdConfig) -> None:
        self.config = config
        self.dtype = DTYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (B, Sq, Hq, D)
        mK: cute.Tensor,  # (B, Sk, Hk, D)
        mV: cute.Tensor,  # (B, Sk, Hk, Dv)
        mO: cute.Tensor,  # (B, Sq, Hq, Dv)
        mLSE: cute.Tensor,  # (B, Hq, Sq) fp32
        softmax_scale: cutlass.Float32,
        softcap: cutlass.Float32,
        window_left: cutlass.Int32,
        window_right: cutlass.Int32,
        stream,
    ):
        """Launch on ``stream``; only variants that have them read ``softcap`` and the window."""
        cfg = self.config
        batch, seqlen_q, heads, _ = mQ.shape
        seqlen = SeqlenInfo(seqlen_q, mK.shape[1])
        left = right = None
        if cutlass.const_expr(cfg.has_window_left):
            left = clamp_window(window_left, seqlen)
        if cutlass.const_expr(cfg.is_causal):
            right = cutlass.Int32(0)
        if cutlass.const_expr(cfg.has_window_right):
            right = clamp_window(window_right, seqlen)
        band = Band(seqlen, left, right, is_within_k=cfg.is_causal)
        scores = score_scale(softmax_scale, softcap, cfg.has_softcap)
        transfers = Transfers(
            q=tma_load(mQ, STRIP_ROWS, cfg.padded_d),
            k=tma_load(mK, cfg.tile_n, cfg.padded_d),
            v=tma_load(mV, cfg.tile_n, cfg.padded_dv),
            o=tma_store(mO, STRIP_ROWS, cfg.padded_dv),
        )
        self.kernel(transfers, mLSE, heads // mK.shape[2], scores, band).launch(
            grid=[cute.ceil_div(seqlen_q, cfg.tile_m), heads, batch],
            block=[cfg.num_threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        transfers: Transfers,
        mLSE: cute.Tensor,
        heads_per_kv: cutlass.Int32,
        scores: ScoreScale,
        band: Band,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // WARP_THREADS)
        warpgroup = cute.arch.make_warp_uniform(tidx // WARPGROUP_THREADS)
        m_block, head, batch = cute.arch.block_idx()
        if cutlass.const_expr(cfg.is_causal):
            # Later rows see more keys: they start first, so that no long tile is left for the end.
            m_block = cute.arch.grid_dim()[0] - 1 - m_block

        # -- storage
        smem = cutlass.memory.SmemAllocator()
        memory_q = self._allocate(smem, cfg.num_consumers * cfg.smem_strip_bytes)
        memory_k = self._allocate(smem, cfg.stages * cfg.smem_k_bytes)
        memory_v = self._allocate(smem, cfg.stages * cfg.smem_v_bytes)
        strip = cfg.smem_strip_bytes // ELEMENT_BYTES
        sQ = shared_tiles(memory_q, STRIP_ROWS, cfg.padded_d, cfg.num_consumers, strip)
        sO = shared_tiles(memory_q, STRIP_ROWS, cfg.padded_dv, cfg.num_consumers, strip)
        sK = shared_tile(memory_k, cfg.tile_n, cfg.padded_d, cfg.stages)  # (N, D, stage)
        sV = shared_tile(memory_v, cfg.tile_n, cfg.padded_dv, cfg.stages)  # (N, Dv, stage)

        # -- pipes
        consumers = cfg.num_consumer_warps
        mbar_q = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.num_consumers, 0))
        mbar_k = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, consumers))
        mbar_v = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, consumers))
        pipe_q = tma_pipe("q", mbar_q, sQ, cfg.smem_q_bytes, 0)
        pipe_k = tma_pipe("k", mbar_k, sK, cfg.smem_k_bytes, consumers)
        pipe_v = tma_pipe("v", mbar_v, sV, cfg.smem_v_bytes, consumers)
        if warp == 0:
            with cute.arch.elect_one():
                for pipe in (pipe_q, pipe_k, pipe_v):
                    pipe.initialise()
                transfers.prefetch()
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        # -- roles
        tile = CtaTile(
            config=cfg,
            sQ=sQ,
            sO=sO,
            sK=sK,
            sV=sV,
            memory_q=memory_q,
            pipe_q=pipe_q,
            pipe_k=pipe_k,
            pipe_v=pipe_v,
            scores=scores,
            band=band,
            blocks=key_blocks(band, m_block, cfg.tile_m, cfg.tile_n),
            m_block=m_block,
            head=head,
            head_kv=head // heads_per_kv,
            batch=batch,
        )
        if warpgroup == 0:
            cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if warp == 0:
                load(tile, transfers)
        else:
            cute.arch.setmaxregister_increase(cfg.consumer_registers)
            attend(tile, transfers.o, mLSE, warpgroup - 1, tidx % WARPGROUP_THREADS)

    def _allocate(self, smem: cutlass.memory.SmemAllocator, num_bytes: int) -> cute.Pointer:
        """Shared memory for elements of the kernel's dtype, aligned for any swizzle."""
        elements = num_bytes * 8 // self.dtype.width
        return smem.allocate_array(self.dtype, elements, byte_alignment=SMEM_ALIGN_BYTES)
