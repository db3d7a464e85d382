"""What the roles of the FlashAttention-4 forward kernel share."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.block_range import KeyBlocks
from cute_fa.blocks.pipelines import TmaPipe
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.seqlen import Band, Sequence
from cute_fa.blocks.signals import Signal
from cute_fa.blocks.tma import TmaTensor


@dataclass(frozen=True)
class Transfers:
    """Everything that moves by TMA."""

    q: TmaTensor  # (128, D) tiles
    k: TmaTensor  # (N, D) blocks
    v: TmaTensor  # (N, Dv) blocks
    o: TmaTensor  # (128, Dv) tiles

    def prefetch(self) -> None:
        """Bring all tensor maps near; by one thread."""
        for tensor in (self.q, self.k, self.v, self.o):
            tensor.prefetch()


@dataclass(frozen=True)
class Signals:
    """What the roles tell each other; the class docstring of ``Fa4Fwd`` has the table."""

    s: Signal  # MMA → SOFTMAX, per S buffer
    p: Signal  # SOFTMAX (first part of P) and CORRECTION (O rescaled) → MMA, per S buffer
    p_rest: Signal  # SOFTMAX → MMA, per S buffer
    o: Signal  # MMA → CORRECTION, per Q tile
    sums: Signal  # SOFTMAX → CORRECTION, per Q tile
    o_out: Signal  # CORRECTION → EPILOGUE, per Q tile

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches them."""
        for signal in (self.s, self.p, self.p_rest, self.o, self.sums, self.o_out):
            signal.initialise()


@dataclass(frozen=True)
class CtaTile:
    """What one CTA works on, and where."""

    config: cutlass.Constexpr
    sQ: cute.Tensor  # (128, D, Q tile)
    sO: cute.Tensor  # (128, Dv, Q tile), in Q's place at the end
    sK: cute.Tensor  # (N, D, stage), in the slots of the ring
    sV: cute.Tensor  # (N, Dv, stage), in the same slots
    sFactor: cute.Tensor  # (128, S buffer) fp32: what each row of O has to be multiplied by
    sSum: cute.Tensor  # (128, Q tile) fp32
    tmem: cute.Pointer  # column 0 of the allocation
    pipe_q: TmaPipe
    pipe_kv: TmaPipe
    signals: Signals
    scores: ScoreScale
    sequence: Sequence
    blocks: KeyBlocks
    m_block: cutlass.Int32
    head: cutlass.Int32
    head_kv: cutlass.Int32

    @property
    def band(self) -> Band:
        return self.sequence.band

    def buffer(self, q_tile, j):
        """The S buffer of block ``j`` (counted from the right) of a Q tile."""
        return q_tile if self.config.num_q_tiles == 2 else j % 2

    def use(self, j):
        """Which use of its S buffer that is."""
        return j if self.config.num_q_tiles == 2 else j // 2

    def k_use(self, j):
        """The use of the ring that holds block ``j`` of K.

        MMA is one round of S buffers ahead with S = QKᵀ: one block with two Q tiles, whose order of
        need is K0 V0 K1 V1 …; two blocks with one: K0 K1 V0 K2 V1 ….
        """
        if self.config.num_q_tiles == 2:
            return 2 * j
        return cutlass.max(2 * j - 1, cutlass.Int32(0))

    def v_use(self, j):
        """The use of the ring that holds block ``j`` of V."""
        if self.config.num_q_tiles == 2:
            return 2 * j + 1
        return cutlass.min(2 * j + 2, 2 * self.blocks.count - 1)

    def tmem_s(self, buffer) -> cute.Pointer:
        return self.tmem + buffer * self.config.tile_n

    def tmem_p(self, buffer) -> cute.Pointer:
        return self.tmem_s(buffer) + self.config.tmem_p[0]

    def tmem_o(self, q_tile) -> cute.Pointer:
        return self.tmem + self.config.tmem_o[0] + q_tile * self.config.padded_dv
