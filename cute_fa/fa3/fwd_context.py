"""What the roles of the FlashAttention-3 forward kernel share."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.fp8 import Descales, HeadDescales
from cute_fa.blocks.pipelines import Ring, TmaPipe, WarpPipe
from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.tile_scheduler import TileSchedule, WorkTile
from cute_fa.blocks.transfers import Transfers


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
    sK_loaded: cute.Tensor  # what this CTA loads of sK: all, or of a pair half the columns
    sV_loaded: cute.Tensor  # the same of sV
    sVt: cute.Tensor | None  # (Dv, N, stage) of fp8 inputs
    memory_q: cute.Pointer  # the first strip's first byte, not swizzled
    pipe_q: TmaPipe
    pipe_k: TmaPipe
    pipe_v: TmaPipe
    pipe_vt: WarpPipe | None
    scores: ScoreScale
    descales: Descales
    rank: cutlass.Int32 | None  # of a pair of CTAs, which this is

    def tile(self, work: WorkTile, uses: Uses) -> StripedTile:
        return StripedTile.of(self.config, self.schedule, work, uses)

    @property
    def pipe_pv(self) -> Ring:
        """The ring that O += PV reads."""
        return self.pipe_v if self.pipe_vt is None else self.pipe_vt


@dataclass(frozen=True)
class StripedTile(RowTile):
    """One tile of a CTA, in strips of 64 rows; each is one use of its slot of pipe_q."""

    def descales(self, cta: Cta) -> HeadDescales:
        """Those of the tile's K/V head."""
        return cta.descales.at(self.sequence.batch, self.head_kv)

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
        part = self.m_block
        if cta.rank is not None:
            part = part * cta.config.num_ctas + cta.rank
        return part * cta.config.num_consumers + consumer
