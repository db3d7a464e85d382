"""Query heads of one K/V head as rows of one tile (GQA packing).

The G heads of a group read the same K and V. Packed, row r of a sequence stands for query r div G
of head r mod G of the group, so that few queries still fill a tile and one pass over K and V serves
all of them. Everything that a mask knows of a row is its query.

G divides the 64 rows of a TMA box, so it is a power of two, and in an accumulator the rows of a
thread, 8 or a multiple of 16 apart, are a constant number of queries apart: (r + d) div G is
r div G + d div G, since G divides d or the two rows lie in one group of G.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass


@dataclass(frozen=True)
class HeadGroup:
    """How rows of a tile stand for queries and heads.

    Attributes:
        size: G, a power of two; 1 if every head has tiles of its own.
    """

    size: cutlass.Constexpr

    @property
    def _bits(self) -> int:
        return self.size.bit_length() - 1

    def query(self, row):
        """The query of packed row ``row`` ≥ 0; a Python or a device integer."""
        return row if self.size == 1 else row >> self._bits

    def head(self, tile_head, row):
        """Its head of Q, in a tile of head ``tile_head`` (of K/V, if packed)."""
        if self.size == 1:
            return tile_head
        return tile_head * self.size + (row & (self.size - 1))
