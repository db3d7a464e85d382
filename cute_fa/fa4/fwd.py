"""FlashAttention-4 forward for Blackwell (sm_100a, sm_103a): tcgen05, tensor memory, 16 warps."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.block_range import key_blocks
from cute_fa.blocks.pipelines import num_mbarriers, tma_pipe
from cute_fa.blocks.scores import ScoreScale, score_scale
from cute_fa.blocks.seqlen import (
    DenseSequences,
    PackedSequences,
    Window,
    num_sequences,
    sequences,
)
from cute_fa.blocks.signals import Signal
from cute_fa.blocks.signature import DTYPES, fake_forward_arguments
from cute_fa.blocks.tiles import WARP_THREADS
from cute_fa.blocks.tma import shared_tiles, tma_load, tma_store
from cute_fa.fa4.config import (
    ELEMENT_BYTES,
    S_BUFFERS,
    SMEM_ALIGN_BYTES,
    TILE_M,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
    Fa4FwdConfig,
)
from cute_fa.fa4.fwd_context import CtaTile, Signals, Transfers
from cute_fa.fa4.fwd_correction import correct
from cute_fa.fa4.fwd_epilogue import store_o
from cute_fa.fa4.fwd_load import load
from cute_fa.fa4.fwd_mma import multiply
from cute_fa.fa4.fwd_softmax import softmax


def fake_arguments(config: Fa4FwdConfig) -> tuple:
    """Symbolic arguments to compile ``Fa4Fwd(config)`` with (cute.compile, --enable-tvm-ffi)."""
    return fake_forward_arguments(config)


class Fa4Fwd:
    """The forward kernel of one ``Fa4FwdConfig``."""

    def __init__(self, config: Fa4FwdConfig) -> None:
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
        *lengths,
    ):
        """Launch on ``stream``; only variants that have them read ``softcap`` and the window."""
        cfg = self.config
        window = Window.of(cfg, window_left, window_right)
        launched = sequences(mQ, mK, window, lengths)
        scores = score_scale(softmax_scale, softcap, cfg.has_softcap, clears_q=False)
        transfers = Transfers(
            q=tma_load(mQ, TILE_M, cfg.padded_d),
            k=tma_load(mK, cfg.tile_n, cfg.padded_d),
            v=tma_load(mV, cfg.tile_n, cfg.padded_dv),
            o=tma_store(mO, TILE_M, cfg.padded_dv),
        )
        heads = mQ.shape[-2]
        self.kernel(transfers, mLSE, heads // mK.shape[-2], scores, launched).launch(
            grid=[
                cute.ceil_div(launched.max_seqlen_q, cfg.tile_m),
                heads,
                num_sequences(mQ, lengths),
            ],
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
        launched: DenseSequences | PackedSequences,
    ):
        cfg = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // WARP_THREADS)
        warpgroup = cute.arch.make_warp_uniform(tidx // WARPGROUP_THREADS)
        thread = tidx % WARPGROUP_THREADS
        m_block, head, batch = cute.arch.block_idx()
        if cutlass.const_expr(cfg.is_causal):
            # Later rows see more keys: they start first, so that no long tile is left for the end.
            m_block = cute.arch.grid_dim()[0] - 1 - m_block
        sequence = launched.of(batch)

        # -- storage
        smem = cutlass.memory.SmemAllocator()
        memory_q = self._allocate(smem, cfg.num_q_tiles * cfg.smem_qo_bytes)
        memory_kv = self._allocate(smem, cfg.stages * cfg.smem_stage_bytes)
        qo = cfg.smem_qo_bytes // ELEMENT_BYTES
        slot = cfg.smem_stage_bytes // ELEMENT_BYTES
        sQ = shared_tiles(memory_q, TILE_M, cfg.padded_d, cfg.num_q_tiles, qo)
        sO = shared_tiles(memory_q, TILE_M, cfg.padded_dv, cfg.num_q_tiles, qo)
        sK = shared_tiles(memory_kv, cfg.tile_n, cfg.padded_d, cfg.stages, slot)  # (N, D, stage)
        sV = shared_tiles(memory_kv, cfg.tile_n, cfg.padded_dv, cfg.stages, slot)  # (N, Dv, stage)
        sFactor = self._row_values(smem, S_BUFFERS)  # (128, S buffer)
        sSum = self._row_values(smem, cfg.num_q_tiles)  # (128, Q tile)
        tmem_address = smem.allocate_array(cutlass.Int32, 2)

        # -- pipes
        mbar_q = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.num_q_tiles, 0))
        mbar_kv = smem.allocate_array(cutlass.Int64, num_mbarriers(cfg.stages, 1))
        pipe_q = tma_pipe("q", mbar_q, sQ, cfg.smem_q_bytes, 0)
        # K is announced here; of V, LOAD announces smem_v_bytes. MMA frees a slot by a commit.
        pipe_kv = tma_pipe("kv", mbar_kv, sK, cfg.smem_k_bytes, 1)
        signals = self._signals(smem)
        if warp == cfg.load_warp:
            with cute.arch.elect_one():
                for part in (pipe_q, pipe_kv, signals):
                    part.initialise()
                transfers.prefetch()
            cute.arch.mbarrier_init_fence()
        if warp == cfg.correction_warp:
            tmem.allocate(cfg.tmem_columns, tmem_address)
            tmem.fence_before_signal()
        cute.arch.sync_threads()
        tmem.fence_after_signal()

        # -- roles
        tile = CtaTile(
            config=cfg,
            sQ=sQ,
            sO=sO,
            sK=sK,
            sV=sV,
            sFactor=sFactor,
            sSum=sSum,
            tmem=tmem.allocated(tmem_address),
            pipe_q=pipe_q,
            pipe_kv=pipe_kv,
            signals=signals,
            scores=scores,
            sequence=sequence,
            blocks=key_blocks(sequence.band, m_block, cfg.tile_m, cfg.tile_n),
            m_block=m_block,
            head=head,
            head_kv=head // heads_per_kv,
        )
        if warpgroup < cfg.num_q_tiles:
            cute.arch.setmaxregister_increase(cfg.softmax_registers)
            softmax(tile, sequence.row_values(mLSE, head), warpgroup, thread)
        elif warpgroup == cfg.num_q_tiles:
            cute.arch.setmaxregister_decrease(cfg.correction_registers)
            correct(tile, thread)
        else:
            cute.arch.setmaxregister_decrease(cfg.other_registers)
            if warp == cfg.mma_warp:
                multiply(tile)
            elif warp == cfg.load_warp:
                load(tile, transfers)
            elif warp == cfg.epilogue_warp:
                store_o(tile, transfers.o)

    def _allocate(self, smem: cutlass.memory.SmemAllocator, num_bytes: int) -> cute.Pointer:
        """Shared memory for elements of the kernel's dtype, aligned for any swizzle."""
        elements = num_bytes * 8 // self.dtype.width
        return smem.allocate_array(self.dtype, elements, byte_alignment=SMEM_ALIGN_BYTES)

    def _row_values(self, smem: cutlass.memory.SmemAllocator, count: int) -> cute.Tensor:
        """``count`` fp32 numbers per row of a tile, (128, count)."""
        memory = smem.allocate_array(cutlass.Float32, TILE_M * count)
        return cute.make_tensor(memory, cute.make_layout((TILE_M, count)))

    def _signals(self, smem: cutlass.memory.SmemAllocator) -> Signals:
        """All signals: who arrives is in the class docstring."""
        cfg = self.config

        def signal(slots: int, arrivals: int) -> Signal:
            return Signal(smem.allocate_array(cutlass.Int64, slots), slots, arrivals)

        return Signals(
            s=signal(S_BUFFERS, 1),
            p=signal(S_BUFFERS, 2 * WARPGROUP_WARPS),
            p_rest=signal(S_BUFFERS, WARPGROUP_WARPS),
            o=signal(cfg.num_q_tiles, 1),
            sums=signal(cfg.num_q_tiles, WARPGROUP_WARPS),
            o_out=signal(cfg.num_q_tiles, WARPGROUP_WARPS),
        )
