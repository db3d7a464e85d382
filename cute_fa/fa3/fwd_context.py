"""What the roles of the FlashAttention-3 forward kernel share."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.block_range import KeyBlocks
from cute_fa.blocks.pipelines import TmaPipe
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.seqlen import Band
from cute_fa.blocks.tma import TmaTensor


@dataclass(frozen=True)
class Transfers:
    """Everything that moves by TMA."""

    q: TmaTensor  # (64, D) strips
    k: TmaTensor  # (N, D) tiles
    v: TmaTensor  # (N, Dv) tiles
    o: TmaTensor  # (64, Dv) strips

    def prefetch(self) -> None:
        """Bring all tensor maps near; by one thread."""
        for tensor in (self.q, self.k, self.v, self.o):
            tensor.prefetch()


@dataclass(frozen=True)
class CtaTile:
    """What one CTA works on, and where."""

    config: cutlass.Constexpr
    sQ: cute.Tensor  # (64, D, strip)
    sO: cute.Tensor  # (64, Dv, strip), in Q's place at the end
    sK: cute.Tensor  # (N, D, stage)
    sV: cute.Tensor  # (N, Dv, stage)
    memory_q: cute.Pointer  # the strips' first byte, not swizzled
    pipe_q: TmaPipe
    pipe_k: TmaPipe
    pipe_v: TmaPipe
    scores: ScoreScale
    band: Band
    blocks: KeyBlocks
    m_block: cutlass.Int32
    head: cutlass.Int32
    head_kv: cutlass.Int32
    batch: cutlass.Int32
