"""FlashAttention-4 forward for Blackwell (sm_100a, sm_103a): tcgen05 and tensor memory.

A tile is two Q tiles of 128 rows (one, if O is too wide for two) of one (batch, head):

    S = Q Kᵀ            in tensor memory, by the tensor core
    a ← max(a, rowmax S) · scale_log2, if that is more than 8 above a; else a stays
    P = 2^(S·scale_log2 − a)      in S's place; some by a polynomial on the FMA pipe
    O ← O · 2^(a_old − a) + P V        l ← l · 2^(a_old − a) + rowsum P
    at the end  O / l  and  LSE = (a + log2 l) · ln 2

See ``Fa4Fwd`` for who does what and who waits for whom.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.fp8 import Descales
from cute_fa.blocks.launch_control import allocate_answers, read_all
from cute_fa.blocks.pipelines import num_mbarriers, tma_pipe
from cute_fa.blocks.scores import ScoreScale, score_scale
from cute_fa.blocks.seqlen import Window
from cute_fa.blocks.signals import LEADING_CTA, Signal, sync_cluster
from cute_fa.blocks.tile_scheduler import TileSchedule, tile_schedule
from cute_fa.blocks.tiles import (
    PANEL_ELEMENT_BYTES,
    WARP_THREADS,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
)
from cute_fa.blocks.tma import shared_tiles
from cute_fa.blocks.transfers import Transfers, allocate_panels, allocate_q_and_o
from cute_fa.fa4.config import TILE_M, Fa4FwdConfig
from cute_fa.fa4.fwd_context import Cta, Signals
from cute_fa.fa4.fwd_correction import correct
from cute_fa.fa4.fwd_epilogue import store_o
from cute_fa.fa4.fwd_load import load
from cute_fa.fa4.fwd_mma import multiply
from cute_fa.fa4.fwd_softmax import softmax
from cute_fa.fa4.tmem_map import S_BUFFERS


class Fa4Fwd:
    """The forward kernel of one ``Fa4FwdConfig``.

        role        warps (two Q tiles)  registers   does
        SOFTMAX i   0–3, 4–7             192 or 240  P, sums and LSE of Q tile i (fwd_softmax)
        CORRECTION  8–11                 80 or 168   rescales O, hands out O / l (fwd_correction)
        MMA         12                   48 or 96    issues all products (fwd_mma)
        LOAD        13                   48 or 96    all TMA loads (fwd_load)
        EPILOGUE    14                   48 or 96    all TMA stores (fwd_epilogue)
        SCHEDULER   15                   48 or 96    asks for tiles (blocks.launch_control), or idle

    With one Q tile there is one SOFTMAX warpgroup, everybody else is four warps lower, and the
    second numbers hold. Of a pair of CTAs, MMA of the first works for both. b is an S buffer, i a Q
    tile.

        pipe        slots       filled by            full when          freed by
        pipe_q      one per i   LOAD (1 + tx bytes)  it has landed      MMA (commit) or EPILOGUE (1)
        pipe_kv     ``stages``  LOAD (1 + tx bytes)  it has landed      MMA (commit)
        answers     2           SCHEDULER (1 + 16)   it has come        every warp (1)

        signal      slots  arrives                                      waits       says
        s           b      MMA (commit)                                 SOFTMAX     S is there
        p           b      SOFTMAX (4 warps) + CORRECTION (4 warps)     MMA         first part of P
                                                                                    and O are ready
        p_rest      b      SOFTMAX (4 warps)                            MMA         all of P is
        o           i      MMA (commit)                                 CORRECTION  O += P V is done
        sums        i      SOFTMAX (4 warps)                            CORRECTION  l is in sSum
        sums_taken  i      CORRECTION (4 warps)                         SOFTMAX     … and was read
        o_out       i      CORRECTION (4 warps)                         EPILOGUE    O / l is in sO
        o_gone      i      EPILOGUE (1 warp)                            CORRECTION  … and was read
        begun       1      LOAD (1 warp)                                SCHEDULER   it begins a tile
        q_landed    i      MMA (commit)                                 CORRECTION  Q has landed

        named barrier   threads  who
        RESCALE+4b+w    64       SOFTMAX warp w arrives, CORRECTION warp w waits: rows' factors

    Resident CTAs alone, which may take more than one tile, have sums_taken, empty barriers of
    pipe_q, and o_gone if O has places of its own; those with launch control, answers and begun. An
    S buffer needs no way back: whoever may write to it next has waited for its readers.

    In a pair of CTAs full slots, p and p_rest are the first one's, with the bytes and arrivals of
    both; commits arrive in both; SOFTMAX too waits at RESCALE; there are o_gone wherever CTAs are
    resident, and q_landed wherever O leaves from Q's place: arrivals in the other CTA say nothing
    about shared memory (``blocks.signals``). SCHEDULER of the first asks for both, when that of the
    other has told it, by begun, that there is room for the answer.

        tensor memory, columns   0        N        2N           2N + Dv       2N + 2Dv ≤ 512
                                 S₀ | P₀  S₁ | P₁  O₀           O₁

    P has 16 bits and lies in the lower half of its S. Per block of K and V, with two Q tiles:

        MMA        S₀    S₁    │ O₀    S₀   │ O₁    S₁   │ O₀ …
        SOFTMAX 0      ▓▓▓ P₀ ▓▓▓      ░░░░░░░ ▓▓▓ P₀ ▓▓▓
        SOFTMAX 1            ▓▓▓ P₁ ▓▓▓      ░░░░░░░ ▓▓▓ P₁ ▓▓▓
    """

    def __init__(self, config: Fa4FwdConfig) -> None:
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
        scores = score_scale(softmax_scale, softcap, cfg.has_softcap, clears_q=False)
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
        thread = tidx % WARPGROUP_THREADS
        rank, leads = None, None
        if cutlass.const_expr(cfg.is_paired):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
            leads = rank == LEADING_CTA

        # -- storage
        smem = cutlass.memory.SmemAllocator()
        # (128, D, Q tile) and (128, Dv, Q tile)
        _, sQ, sO = allocate_q_and_o(smem, cfg, cfg.num_q_tiles)
        memory_kv = allocate_panels(smem, cfg, cfg.stages * cfg.smem_stage_bytes)
        slot = cfg.smem_stage_bytes // PANEL_ELEMENT_BYTES
        sK = shared_tiles(memory_kv, cfg.k_rows, cfg.panel_d, cfg.stages, slot)  # (N, D, stage)
        sV = shared_tiles(memory_kv, cfg.tile_n, cfg.panel_dv, cfg.stages, slot)  # (N, Dv, stage)
        sFactor = self._row_values(smem, S_BUFFERS)  # (128, S buffer)
        sSum = self._row_values(smem, cfg.num_q_tiles)  # (128, Q tile)
        if cutlass.const_expr(cfg.has_launch_control):
            answers = allocate_answers(smem, cfg.scheduler_warp + 1, leads)
            schedule = replace(schedule, answers=answers)
        tmem_address = smem.allocate_array(cutlass.Int32, 2)

        # -- pipes
        q_consumers = 1 if cfg.is_resident else 0
        mbar_q = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.num_q_tiles, q_consumers))
        mbar_kv = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, 1))
        pipe_q = tma_pipe("q", mbar_q, sQ, cfg.smem_q_bytes, q_consumers, leads)
        # Checked with K's bytes; LOAD announces K's or V's, whichever it puts into a slot.
        pipe_kv = tma_pipe("kv", mbar_kv, sK, cfg.smem_k_bytes, 1, leads)
        signals = self._signals(smem)
        if warp == cfg.load_warp:
            with cute.arch.elect_one():
                for part in (pipe_q, pipe_kv, signals, schedule.answers):
                    if cutlass.const_expr(part is not None):
                        part.initialise()
                transfers.prefetch()
            cute.arch.mbarrier_init_fence()
        if warp == cfg.correction_warp:
            tmem.allocate(cfg.tmem_map.columns, tmem_address, cfg.is_paired)
        cute.arch.sync_threads()
        if cutlass.const_expr(cfg.is_paired):
            sync_cluster()

        # -- roles
        cta = Cta(
            config=cfg,
            schedule=schedule,
            transfers=transfers,
            sQ=sQ,
            sO=sO,
            sK=sK,
            sV=sV,
            sFactor=sFactor,
            sSum=sSum,
            tmem_address=tmem_address,
            pipe_q=pipe_q,
            pipe_kv=pipe_kv,
            signals=signals,
            scores=scores,
            descales=descales,
            rank=rank,
        )
        if warpgroup < cfg.num_q_tiles:
            cute.arch.setmaxregister_increase(cfg.softmax_registers)
            softmax(cta, mLSE, warpgroup, thread)
        elif warpgroup == cfg.num_q_tiles:
            cute.arch.setmaxregister_decrease(cfg.correction_registers)
            correct(cta, thread)
        else:
            cute.arch.setmaxregister_decrease(cfg.other_registers)
            if warp == cfg.mma_warp:
                if cutlass.const_expr(not cfg.is_paired) or leads:
                    multiply(cta)
                elif cutlass.const_expr(cfg.has_launch_control):
                    read_all(schedule.answers)
            elif warp == cfg.load_warp:
                load(cta)
            elif warp == cfg.epilogue_warp:
                store_o(cta)
            elif cutlass.const_expr(cfg.has_launch_control):
                read_all(schedule.answers, asks=True)
        if cutlass.const_expr(cfg.is_paired):
            # Nobody of either CTA uses the other's shared or tensor memory any more.
            sync_cluster(orders_tmem=True)
            if warp == cfg.correction_warp:
                tmem.release(tmem.allocated(tmem_address), cfg.tmem_map.columns, is_paired=True)

    def _row_values(self, smem: cutlass.memory.SmemAllocator, count: int) -> cute.Tensor:
        """``count`` fp32 numbers per row of a tile, (128, count)."""
        memory = smem.allocate_array(cutlass.Float32, TILE_M * count)
        return cute.make_tensor(memory, cute.make_layout((TILE_M, count)))

    def _signals(self, smem: cutlass.memory.SmemAllocator) -> Signals:
        """The table of signals in the class docstring; those of resident CTAs may be empty."""
        cfg = self.config
        warps = WARPGROUP_WARPS

        def signal(slots: int, arrivals: int) -> Signal:
            return Signal(smem.allocate_array(cutlass.Int64, slots), slots, arrivals)

        def with_mma(slots: int, arrivals: int) -> Signal:
            return replace(signal(slots, arrivals), orders_tmem=True, is_paired=cfg.is_paired)

        def maybe(exists: bool, arrivals: int) -> Signal | None:
            return signal(cfg.num_q_tiles, arrivals) if exists else None

        return Signals(
            s=with_mma(S_BUFFERS, 1),
            p=with_mma(S_BUFFERS, 2 * warps * cfg.num_ctas),
            p_rest=with_mma(S_BUFFERS, warps * cfg.num_ctas),
            o=with_mma(cfg.num_q_tiles, 1),
            sums=signal(cfg.num_q_tiles, warps),
            o_out=signal(cfg.num_q_tiles, warps),
            sums_taken=maybe(cfg.is_resident, warps),
            o_gone=maybe(cfg.has_o_gone, 1),
            q_landed=with_mma(cfg.num_q_tiles, 1) if cfg.has_q_landed else None,
        )
