"""One row tile of a CTA that may take several, and where its roles stand in their pipes by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import cutlass

from cute_fa.blocks.block_range import KeyBlocks, key_blocks
from cute_fa.blocks.seqlen import Band, Sequence
from cute_fa.blocks.tile_scheduler import TileSchedule, WorkTile

Tile = TypeVar("Tile", bound="RowTile")


class TileConfig(Protocol):
    """What of a config decides which blocks a tile needs."""

    @property
    def tile_queries(self) -> int: ...

    @property
    def tile_n(self) -> int: ...


@dataclass(frozen=True)
class Uses:
    """Where a role stands in the pipes when a tile begins.

    Attributes:
        tiles: tiles of this CTA before it.
        blocks: K/V blocks of those.
    """

    tiles: cutlass.Int32
    blocks: cutlass.Int32

    @staticmethod
    def none() -> Uses:
        return Uses(cutlass.Int32(0), cutlass.Int32(0))


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

    @classmethod
    def of(
        cls: type[Tile], config: TileConfig, schedule: TileSchedule, work: WorkTile, uses: Uses
    ) -> Tile:
        """What there is to know about ``work``; each role finds it out by itself."""
        sequence = schedule.sequences.of(work.batch)
        blocks = key_blocks(sequence.band, work.m_block, config.tile_queries, config.tile_n)
        head_kv = work.head // schedule.heads_per_kv
        return cls(sequence, blocks, work.m_block, work.head, head_kv, uses)

    @property
    def band(self) -> Band:
        return self.sequence.band

    @property
    def uses_after(self) -> Uses:
        """Where the next tile begins."""
        return Uses(self.uses.tiles + 1, self.uses.blocks + self.blocks.count)
