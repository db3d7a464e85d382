"""How the warps of ``tcgen05.ld`` and ``st`` lie in tensor memory (PTX ISA 9.7.16.2.3, 9.7.16.8).

Each warp of a warpgroup reaches a quarter of the lanes, 32 of them. An instruction run for many
warps of many CTAs is a few :class:`Piece` s, usually one: a rectangle of warps and CTAs that access
the same columns of their lanes. A piece is a view of the storage, and :func:`image` reorders the
view's axes so that they enumerate registers, warps, CTAs and threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

QUARTERS = 4  # warps of a warpgroup
QUARTER_LANES = 32
HALF_LANES = 16


class Piece(NamedTuple):
    """Warps of one warpgroup, in several CTAs, that access the same columns.

    Attributes:
        warps, slots: ranges of the wave's warps and CTA slots.
        columns: the columns.
        halves: which 16 of its 32 lanes each warp accesses: the lower, the upper, or both.
    """

    warps: slice
    slots: slice
    columns: slice
    halves: slice

    @property
    def quarters(self) -> slice:
        """The quarters of the lanes that belong to the warps."""
        first = self.warps.start % QUARTERS
        return slice(first, first + self.warps.stop - self.warps.start)

    @property
    def place(self) -> tuple[slice, slice, slice, slice]:
        """Index into arrays over slots, columns, quarters and halves."""
        return self.slots, self.columns, self.quarters, self.halves

    @property
    def shape(self) -> tuple[int, int]:
        """Warps and slots."""
        return self.warps.stop - self.warps.start, self.slots.stop - self.slots.start

    def shifted(self, columns: int) -> Piece:
        """The same some columns further on."""
        start, stop = self.columns.start + columns, self.columns.stop + columns
        return self._replace(columns=slice(start, stop))


@dataclass(frozen=True)
class Shape:
    """A data movement shape: what ``.x1`` of it moves for one warp.

    Attributes:
        lanes: 16 or 32.
        columns: 32-bit columns; for ``.16x32bx2`` of each of its two accesses.
        registers: of each thread.
    """

    lanes: int
    columns: int
    registers: int
    most: int  # the highest repeat factor


SHAPES = {
    "32x32b": Shape(32, 1, 1, 128),
    "16x64b": Shape(16, 2, 1, 128),
    "16x128b": Shape(16, 4, 2, 64),
    "16x256b": Shape(16, 8, 4, 32),
    "16x32bx2": Shape(16, 1, 1, 128),
}


def image(shape: str, cells: np.ndarray) -> np.ndarray:
    """A view of cells with its axes in the order register, warp, CTA, thread.

    With thread t and register v of a shape with four columns or more, t // 4 counts lanes and
    t % 4 columns; the 16 lanes are two groups of eight.

    Args:
        cells: ``(c, columns, w, halves, 16)``.

    Returns:
        a view that reshapes to ``(registers, w, c, 32)``; ``(registers, w, c, 16)`` for one access
        of ``.16x32bx2``.
    """
    c, columns, w = cells.shape[:3]
    if shape == "32x32b":  # lane t, column v
        return cells.transpose(1, 2, 0, 3, 4)
    if shape == "16x32bx2":  # lane t % 16, column v
        return cells[:, :, :, 0].transpose(1, 2, 0, 3)
    if shape == "16x64b":  # lane t // 4 + 8 (t % 2), column t // 2 % 2 + 2 v
        split = cells.reshape(c, columns // 2, 2, w, 2, 8)
        return split.transpose(1, 3, 0, 5, 2, 4)
    if shape == "16x128b":  # lane t // 4 + 8 (v % 2), column t % 4 + 4 (v // 2)
        split = cells.reshape(c, columns // 4, 4, w, 2, 8)
        return split.transpose(1, 4, 3, 0, 5, 2)
    if shape == "16x256b":  # lane t // 4 + 8 (v // 2 % 2), column v % 2 + 2 (t % 4) + 8 (v // 4)
        split = cells.reshape(c, columns // 8, 4, 2, w, 2, 8)
        return split.transpose(1, 5, 3, 4, 0, 6, 2)
    raise ValueError(f"no data movement shape {shape}")


def pieces(rect: tuple[int, int, int, int], keys: np.ndarray) -> list[tuple[int, Piece]]:
    """Part a rectangle of warps and CTAs by what they access.

    Args:
        rect: warps w0:w1, slots c0:c1.
        keys: int ``(w, c)``: one number for each access, equal where it is the same; negative where
            there is none.

    Returns:
        (key, piece) with columns and halves left open.
    """
    w0, w1, c0, c1 = rect
    out: list[tuple[int, Piece]] = []
    whole = slice(0, 0)
    first = int(keys.flat[0])
    if first >= 0 and (keys == first).all():
        for start, stop in _within_warpgroups(w0, w1):
            out.append((first, Piece(slice(start, stop), slice(c0, c1), whole, whole)))
        return out
    growing: dict[tuple[int, int, int], int] = {}  # (key, slots) of the last warp → number in out
    for w in range(w1 - w0):
        warp = w0 + w
        row = keys[w]
        borders = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), c1 - c0]
        now: dict[tuple[int, int, int], int] = {}
        for start, stop in pairwise(borders):
            key = int(row[start])
            if key < 0:
                continue
            run = key, c0 + start, c0 + stop
            number = growing.get(run) if warp % QUARTERS else None
            if number is None:
                slots = slice(c0 + start, c0 + stop)
                out.append((key, Piece(slice(warp, warp + 1), slots, whole, whole)))
                number = len(out) - 1
            else:
                piece = out[number][1]
                out[number] = key, piece._replace(warps=slice(piece.warps.start, warp + 1))
            now[run] = number
        growing = now
    return out


def _within_warpgroups(w0: int, w1: int) -> list[tuple[int, int]]:
    """Cut a range of warps at warpgroups."""
    cuts = [w0, *range(w0 // QUARTERS * QUARTERS + QUARTERS, w1, QUARTERS), w1]
    return list(pairwise(cuts))
