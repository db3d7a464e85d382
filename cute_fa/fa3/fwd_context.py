"""What the roles of the FlashAttention-3 forward kernel share."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.block_range import KeyBlocks, key_blocks
from cute_fa.blocks.fp8 import Descales, HeadDescales
from cute_fa.blocks.pipelines import Ring, TmaPipe, WarpPipe
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.seqlen import Band, Sequence
from cute_fa.blocks.tile_scheduler import TileSchedule, WorkTile
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
class Cta:
    """What a CTA has for all its tiles; of fp8 inputs sQ, sK, sV and sVt count pairs of columns."""

    config: cutlass.Constexpr
    schedule: TileSchedule
    transfers: Transfers
    sQ: cute.Tensor  # (64, D, strip)
    sO: cute.Tensor  # (64, Dv, strip), in Q's place unless config.has_own_o
    sK: cute.Tensor  # (N, D, stage)
    sV: cute.Tensor  # (N, Dv, stage)
    sVt: cute.Tensor | None  # (Dv, N, stage) of fp8 inputs
    memory_q: cute.Pointer  # the first strip's first byte, not swizzled
    pipe_q: TmaPipe
    pipe_k: TmaPipe
    pipe_v: TmaPipe
    pipe_vt: WarpPipe | None
    scores: ScoreScale
    descales: Descales

    @property
    def pipe_pv(self) -> Ring:
        """The ring that O += PV reads."""
        return self.pipe_v if self.pipe_vt is None else self.pipe_vt


@dataclass(frozen=True)
class Uses:
    """Where a role stands in the pipes when a tile begins.

    Attributes:
        tiles: tiles of this CTA before it, each one use of every strip of Q.
        blocks: K/V blocks of those, the uses of both rings.
    """

    tiles: cutlass.Int32
    blocks: cutlass.Int32


@dataclass(frozen=True)
class RowTile:
    """One tile of a CTA.

    Attributes:
        sequence: whose rows they are.
        blocks: the K/V blocks that they see.
        m_block: which of the sequence's row tiles it is.
        head, head_kv: head of Q, or of K/V where a group shares the tile; head of K/V.
        uses: of the pipes, before it.
    """

    sequence: Sequence
    blocks: KeyBlocks
    m_block: cutlass.Int32
    head: cutlass.Int32
    head_kv: cutlass.Int32
    uses: Uses

    @staticmethod
    def of(cta: Cta, work: WorkTile, uses: Uses) -> RowTile:
        """What there is to know about ``work``; each role finds it out by itself."""
        cfg = cta.config
        sequence = cta.schedule.sequences.of(work.batch)
        blocks = key_blocks(sequence.band, work.m_block, cfg.tile_queries, cfg.tile_n)
        head_kv = work.head // cta.schedule.heads_per_kv
        return RowTile(sequence, blocks, work.m_block, work.head, head_kv, uses)

    def descales(self, cta: Cta) -> HeadDescales:
        """Those of the tile's K/V head."""
        return cta.descales.at(self.sequence.batch, self.head_kv)

    @property
    def band(self) -> Band:
        return self.sequence.band

    @property
    def first_use(self) -> cutlass.Int32:
        """Use of the rings for the right-most block; the others follow, from right to left."""
        return self.uses.blocks

    def block(self, n: cutlass.Int32) -> cutlass.Int32:
        """The block of use ``n`` of the rings."""
        return self.blocks.n_stop - 1 + self.first_use - n

    def use_of_q(self, cta: Cta, strip) -> cutlass.Int32:
        """Use of pipe_q for one of the tile's strips: each strip is a slot of its own."""
        return self.uses.tiles * cta.config.num_consumers + strip

    def strip(self, cta: Cta, consumer) -> cutlass.Int32:
        """Which strip of 64 rows of the sequence a consumer has."""
        return self.m_block * cta.config.num_consumers + consumer

    @property
    def uses_after(self) -> Uses:
        """Where the next tile begins."""
        return Uses(self.uses.tiles + 1, self.uses.blocks + self.blocks.count)
