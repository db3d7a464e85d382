"""FlashAttention-3 forward for Hopper (sm_90a): TMA, wgmma, specialised warps.

A row tile is ``tile_m`` query rows of one (batch, head), or of all heads of a group, 64 per
consumer. A CTA computes O and LSE of one, or of one after the other (``blocks.tile_scheduler``):

    S = Q Kᵀ · scale        m = rowmax over the blocks seen        P = exp(S − m)
    O ← (O + P_old V_old) · exp(m_old − m)        l ← l · exp(m_old − m) + rowsum P
    at the end  O / l  and  LSE = m + ln l

See ``Fa3Fwd`` for who does what and who waits for whom.
"""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks.copies import shared_tile
from cute_fa.blocks.fp8 import Descales
from cute_fa.blocks.pipelines import WarpPipe, num_mbarriers, tma_pipe
from cute_fa.blocks.scores import ScoreScale, score_scale
from cute_fa.blocks.seqlen import Window
from cute_fa.blocks.signals import sync_cluster
from cute_fa.blocks.tile_scheduler import TileSchedule, tile_schedule
from cute_fa.blocks.tiles import (
    WARP_THREADS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
)
from cute_fa.blocks.transfers import Transfers, allocate_panels, allocate_q_and_o, columns_of
from cute_fa.fa3.config import TRANSPOSE_WARPS, Fa3FwdConfig
from cute_fa.fa3.fwd_context import Cta
from cute_fa.fa3.fwd_load import load
from cute_fa.fa3.fwd_mma import attend
from cute_fa.fa3.fwd_transpose import transpose


class Fa3Fwd:
    """The forward kernel of one ``Fa3FwdConfig``.

        role       warps                  registers   does
        LOAD       warp 0                 24 or 32    all TMA loads (fwd_load.load)
        TRANSPOSE  warps 1, 2 if fp8      40 or 32    V as fp8 products want it (fwd_transpose)
        (idle)     the others of 1–3                  give their registers to the consumers
        CONSUMER   4 warps per strip      240 or 160  products, softmax, results (fwd_mma.attend)

        pipe       kind      slots        producer (arrives)    consumer (arrives)
        pipe_q     TmaPipe   1 per strip  LOAD (1 + tx bytes)   its CONSUMER (1 per warp, if tiles
                                                                follow: is_persistent)
        pipe_k     TmaPipe   ``stages``   LOAD (1 + tx bytes)   CONSUMER (1 per warp)
        pipe_v     TmaPipe   ``stages``   LOAD (1 + tx bytes)   CONSUMER (1 per warp)
          of fp8   TmaPipe   ``stages``   LOAD (1 + tx bytes)   TRANSPOSE (1 per warp)
        pipe_vt    WarpPipe  ``stages``   TRANSPOSE (1 a warp)  CONSUMER (1 per warp)

    Of a pair of CTAs (is_paired), each LOAD fills half of every slot of pipe_k and pipe_v in both,
    each CTA's full barrier counts what comes from both, and each consumer releases slots in both.

        named barrier  threads  who
        TURN + w       256      consumer w waits, the consumer before it in the cycle arrives
        STRIP + w      128      consumer w, around its generic writes to its strips of Q and O

    The uses of the rings are the blocks of the CTA's tiles, right to left in each; here n is one of
    them. One consumer:

        tensor core   S = Q K(n)ᵀ   O += P V(n−1)                  S = Q K(n+1)ᵀ   O += P V(n) …
        softmax                     m, P of S, l        rescale O                  m, P of S, l …

    With has_turns, a consumer issues such a pair of products only in its turn, so that the softmax
    of one runs while the tensor core works for another:

        consumer 0   ▓ products ▓ softmax ░░░░ ▓ products ▓ softmax ░░░░
        consumer 1   ░░░░░░░░░░░░ ▓ products ▓ softmax ░░░░ ▓ products ▓ …
    """

    def __init__(self, config: Fa3FwdConfig) -> None:
        self.config = config

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
        *extras,  # descales of fp8 inputs, lengths of packed sequences: blocks.signature
    ):
        """Launch on ``stream``; only variants that have them read ``softcap`` and the window."""
        cfg = self.config
        descales, lengths = Descales.of(cfg, extras)
        window = Window.of(cfg, window_left, window_right)
        schedule = tile_schedule(cfg, mQ, mK, window, lengths)
        transfers = Transfers.of(cfg, mQ, mK, mV, mO)
        scores = score_scale(softmax_scale, softcap, cfg.has_softcap)
        self.kernel(transfers, mLSE, scores, schedule, descales).launch(
            grid=schedule.grid,
            block=[cfg.num_threads, 1, 1],
            cluster=[cfg.num_ctas, 1, 1] if cfg.is_paired else None,
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        transfers: Transfers,
        mLSE: cute.Tensor,
        scores: ScoreScale,
        schedule: TileSchedule,
        descales: Descales,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // WARP_THREADS)
        warpgroup = cute.arch.make_warp_uniform(tidx // WARPGROUP_THREADS)

        rank = None
        if cutlass.const_expr(cfg.is_paired):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())

        # -- storage
        smem = cutlass.memory.SmemAllocator()
        # (64, D, strip) and (64, Dv, strip)
        memory_q, sQ, sO = allocate_q_and_o(smem, cfg, cfg.num_consumers)
        memory_k = allocate_panels(smem, cfg, cfg.stages * cfg.smem_k_bytes)
        memory_v = allocate_panels(smem, cfg, cfg.stages * cfg.smem_v_bytes)
        sK = shared_tile(memory_k, cfg.tile_n, cfg.panel_d, cfg.stages)  # (N, D, stage)
        sV = shared_tile(memory_v, cfg.tile_n, cfg.panel_dv, cfg.stages)  # (N, Dv, stage)
        sK_loaded = columns_of(rank, memory_k, cfg.tile_n, cfg.panel_d, cfg.stages)
        sV_loaded = columns_of(rank, memory_v, cfg.tile_n, cfg.panel_dv, cfg.stages)
        sVt = None
        if cutlass.const_expr(cfg.is_fp8):
            memory_vt = allocate_panels(smem, cfg, cfg.stages * cfg.smem_v_bytes)
            sVt = shared_tile(memory_vt, cfg.padded_dv, cfg.tile_n // 2, cfg.stages)

        # -- pipes
        consumers = cfg.num_consumer_warps
        v_consumers = TRANSPOSE_WARPS if cfg.is_fp8 else consumers
        q_consumers = WARPGROUP_WARPS if cfg.is_persistent else 0  # of one strip
        mbar_q = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.num_consumers, q_consumers))
        mbar_k = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, consumers))
        mbar_v = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, v_consumers))
        pipe_q = tma_pipe("q", mbar_q, sQ, cfg.smem_q_bytes, q_consumers)
        ctas = {"num_ctas": cfg.num_ctas}
        pipe_k = tma_pipe("k", mbar_k, sK, cfg.smem_k_bytes, consumers, **ctas)
        pipe_v = tma_pipe("v", mbar_v, sV, cfg.smem_v_bytes, v_consumers, **ctas)
        pipes, pipe_vt = [pipe_q, pipe_k, pipe_v], None
        if cutlass.const_expr(cfg.is_fp8):
            mbar_vt = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, consumers))
            pipe_vt = WarpPipe("vt", mbar_vt, cfg.stages, consumers, 1, TRANSPOSE_WARPS)
            pipes.append(pipe_vt)
        if warp == 0:
            with cute.arch.elect_one():
                for pipe in pipes:
                    pipe.initialise()
                transfers.prefetch()
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(cfg.is_paired):
            sync_cluster()
        else:
            cute.arch.sync_threads()

        # -- roles
        cta = Cta(
            config=cfg,
            schedule=schedule,
            transfers=transfers,
            sQ=sQ,
            sO=sO,
            sK=sK,
            sV=sV,
            sK_loaded=sK_loaded,
            sV_loaded=sV_loaded,
            sVt=sVt,
            memory_q=memory_q,
            pipe_q=pipe_q,
            pipe_k=pipe_k,
            pipe_v=pipe_v,
            pipe_vt=pipe_vt,
            scores=scores,
            descales=descales,
            rank=rank,
        )
        if warpgroup == 0:
            cute.arch.setmaxregister_decrease(cfg.producer_registers)
            if warp == 0:
                load(cta)
            # DSL(4.8.1): a constant and a value in one condition make it one of the program's.
            if cutlass.const_expr(cfg.is_fp8):  # noqa: SIM102
                if warp >= 1 and warp <= TRANSPOSE_WARPS:
                    transpose(cta, warp - 1)
        else:
            cute.arch.setmaxregister_increase(cfg.consumer_registers)
            attend(cta, mLSE, warpgroup - 1, tidx % WARPGROUP_THREADS)
