"""Where the rows and columns of an accumulator lie in tensor memory (PTX ISA 9.7.16.10.5).

The ISA names seven layouts by M, CTA group and ``.ws``. Each is a number of *parts*: some lanes
that hold the CTA's rows in order, for a range of D's columns. Rows of A that come from tensor
memory lie in the same lanes, once for each part.

======  =====================  ==========================================================
layout  M                      parts in one CTA
======  =====================  ==========================================================
A, D    256 (pair), 128        lanes 0-127 are 128 rows, all of N
B, E    128 (pair), 64 (.ws)   lanes 0-63 are 64 rows of the first half of N, 64-127 of the second
F       64                     16 lanes of each 32 are 64 rows, all of N
G       32 (.ws)               each 32 lanes are 32 rows of a quarter of N
======  =====================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LANES = 128


@dataclass(frozen=True)
class Part:
    """Lanes of one part, counted from the accumulator's own, and the columns ``n0:n1`` of D."""

    lanes: slice | tuple[int, ...]
    n0: int
    n1: int

    @property
    def index(self) -> slice | np.ndarray:
        """The lanes as an index."""
        return self.lanes if isinstance(self.lanes, slice) else np.array(self.lanes)


@dataclass(frozen=True)
class Layout:
    """The accumulator of one CTA.

    Attributes:
        name: letter in the ISA; rows: rows of D in this CTA.
        columns: columns of tensor memory that it takes.
        alignments: lanes at which it may begin.
    """

    name: str
    rows: int
    columns: int
    parts: tuple[Part, ...]
    alignments: tuple[int, ...]


@lru_cache(maxsize=256)
def layout_of(m: int, n: int, *, pair: bool, ws: bool) -> Layout:
    """The layout of a dense product of shape m × n (over both CTAs of a pair)."""
    rows = m // 2 if pair else m
    if rows == LANES:
        name = "A" if pair else "D"
        return Layout(name, rows, n, (Part(slice(0, LANES), 0, n),), (0,))
    if rows == 64 and not pair and not ws:
        lanes = tuple(32 * (row // 16) + row % 16 for row in range(64))
        return Layout("F", rows, n, (Part(lanes, 0, n),), (0, 16))
    count = LANES // rows
    width = n // count
    parts = tuple(
        Part(slice(i * rows, (i + 1) * rows), i * width, (i + 1) * width) for i in range(count)
    )
    return Layout(
        {(64, True): "B", (64, False): "E"}.get((rows, pair), "G"), rows, width, parts, (0,)
    )


def lanes_of(part: Part, lane: int) -> slice | np.ndarray:
    """The lanes of a part of an accumulator that begins at ``lane``."""
    index = part.index
    if isinstance(index, slice):
        return slice(index.start + lane, index.stop + lane)
    return index + lane
