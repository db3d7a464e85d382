"""Sets of lanes that execute together.

A wave's lanes form a grid ``(W, R, 32)``: warp of the CTA x CTA slot x lane. A :class:`LaneSet` is
a rectangle of warps and slots, so that registers are numpy *views* of it, plus a mask when not
every lane of the rectangle belongs to the set. Lane sets are immutable and interned by their space:
equal sets are the same object, and the results of unions and splits are kept, because loops ask
for the same ones again and again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Rect = tuple[int, int, int, int]  # w0, w1, c0, c1: half-open ranges of warps and CTA slots

WARP_LANES = 32
_MAX_INTERNED = 8192  # distinct lane sets kept before the cache starts afresh


class LaneSet:
    """An immutable, non-empty set of lanes of one wave; made by :class:`LaneSpace` only.

    Attributes:
        space: the grid it belongs to.
        rect: the tightest rectangle ``(w0, w1, c0, c1)`` around the lanes.
        mask: bool ``(w1-w0, c1-c0, 32)``, read-only, or None if the rectangle is full.
        lanes: number of lanes.
        warps: number of warps with at least one lane.
    """

    __slots__ = (
        "__weakref__",
        "_splits",
        "_unions",
        "_warp_any",
        "_warp_counts",
        "lanes",
        "mask",
        "rect",
        "shape",
        "space",
        "warps",
    )

    def __init__(self, space: LaneSpace, rect: Rect, mask: np.ndarray | None) -> None:
        w0, w1, c0, c1 = rect
        self.space = space
        self.rect = rect
        self.shape = (w1 - w0, c1 - c0, WARP_LANES)
        self.mask = mask
        self._warp_counts: np.ndarray | None = None
        self._warp_any: np.ndarray | None = None
        self._unions: dict[int, tuple[LaneSet, LaneSet]] = {}
        self._splits: dict[bytes, tuple[LaneSet | None, LaneSet | None]] = {}
        if mask is None:
            self.warps = self.shape[0] * self.shape[1]
            self.lanes = self.warps * WARP_LANES
        else:
            self.lanes = int(np.count_nonzero(mask))
            self.warps = int(np.count_nonzero(self.warp_counts))

    def __repr__(self) -> str:
        w0, w1, c0, c1 = self.rect
        how = "full" if self.mask is None else f"{self.lanes} lanes"
        return f"LaneSet(warps {w0}:{w1}, slots {c0}:{c1}, {how})"

    @property
    def warp_counts(self) -> np.ndarray:
        """Lanes per warp, int ``(w, c)``."""
        if self._warp_counts is None:
            if self.mask is None:
                self._warp_counts = np.full(self.shape[:2], WARP_LANES)
            else:
                self._warp_counts = np.count_nonzero(self.mask, axis=2)
        return self._warp_counts

    @property
    def warp_any(self) -> np.ndarray:
        """Which warps of the rectangle have a lane in the set, bool ``(w, c)``."""
        if self._warp_any is None:
            self._warp_any = self.warp_counts > 0
        return self._warp_any

    def full_mask(self) -> np.ndarray:
        """The set as a fresh bool array over the whole wave, ``(W, R, 32)``."""
        w0, w1, c0, c1 = self.rect
        out = np.zeros(self.space.shape, bool)
        out[w0:w1, c0:c1] = True if self.mask is None else self.mask
        return out

    def dense_mask(self) -> np.ndarray:
        """The set as a bool array over its own rectangle (read-only)."""
        if self.mask is not None:
            return self.mask
        return np.broadcast_to(np.True_, self.shape)

    def each_warp(self) -> Iterator[tuple[int, int]]:
        """``(warp, slot)`` of every warp with a lane in the set, in the wave's coordinates."""
        w0, _, c0, _ = self.rect
        for w, c in np.argwhere(self.warp_any):
            yield w0 + int(w), c0 + int(c)

    def within(self, mask: np.ndarray | None) -> LaneSet | None:
        """The lanes of the set where ``mask`` (over its rectangle) holds; None if empty."""
        if mask is None:
            return self
        return self.split(mask)[0]

    def split(self, where: np.ndarray) -> tuple[LaneSet | None, LaneSet | None]:
        """Part the set by a bool array over its rectangle: (where it is true, the others)."""
        chosen = where if self.mask is None else where & self.mask
        if chosen.shape != self.shape:
            chosen = np.broadcast_to(chosen, self.shape)
        count = int(np.count_nonzero(chosen))
        if count == self.lanes:
            return self, None
        if count == 0:
            return None, self
        key = np.packbits(chosen).tobytes()
        known = self._splits.get(key)
        if known is None:
            w0, w1, c0, c1 = self.rect
            others = ~chosen if self.mask is None else self.mask & ~chosen
            known = (
                self.space.from_mask(chosen, (w0, w1, c0, c1)),
                self.space.from_mask(others, (w0, w1, c0, c1)),
            )
            if len(self._splits) > 256:
                self._splits.clear()
            self._splits[key] = known
        return known

    def union(self, other: LaneSet) -> LaneSet:
        """All lanes of either set."""
        if other is self:
            return self
        known = self._unions.get(id(other))
        if known is not None and known[0] is other:
            return known[1]
        a, b = self.rect, other.rect
        rect = (min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))
        w0, _, c0, _ = rect
        mask = np.zeros((rect[1] - w0, rect[3] - c0, WARP_LANES), bool)
        for part in (self, other):
            p0, p1, q0, q1 = part.rect
            view = mask[p0 - w0 : p1 - w0, q0 - c0 : q1 - c0]
            if part.mask is None:
                view[...] = True
            else:
                view |= part.mask
        result = self.space.from_mask(mask, rect)
        assert result is not None  # a union of non-empty sets
        if len(self._unions) > 256:
            self._unions.clear()
        self._unions[id(other)] = (other, result)
        return result

    def minus(self, other: LaneSet) -> LaneSet | None:
        """The lanes of this set that are not in ``other``; None if there are none."""
        w0, w1, c0, c1 = self.rect
        return self.split(other.full_mask()[w0:w1, c0:c1])[1]


class LaneSpace:
    """The grid of a wave's lanes: ``num_warps`` x ``num_ctas`` x 32; makes and interns its sets."""

    def __init__(self, num_warps: int, num_ctas: int) -> None:
        self.shape = (num_warps, num_ctas, WARP_LANES)
        self._interned: dict[tuple[Rect, bytes | None], LaneSet] = {}

    def rectangle(self, w0: int, w1: int, c0: int, c1: int) -> LaneSet:
        """Every lane of warps ``w0:w1`` of the CTAs in slots ``c0:c1``."""
        return self._intern((w0, w1, c0, c1), None)

    def everything(self) -> LaneSet:
        """Every lane of the wave."""
        return self.rectangle(0, self.shape[0], 0, self.shape[1])

    def from_mask(self, mask: np.ndarray, rect: Rect | None = None) -> LaneSet | None:
        """The set where ``mask`` holds; the mask covers ``rect`` (default: the whole wave)."""
        w0, _, c0, _ = rect or (0, self.shape[0], 0, self.shape[1])
        occupied: np.ndarray = np.any(mask, axis=2)
        rows = np.flatnonzero(np.any(occupied, axis=1))
        if rows.size == 0:
            return None
        columns = np.flatnonzero(np.any(occupied, axis=0))
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        tight: Rect = (w0 + top, w0 + bottom, c0 + left, c0 + right)
        part = mask[top:bottom, left:right]
        return self._intern(tight, None if part.all() else part)

    def _intern(self, rect: Rect, mask: np.ndarray | None) -> LaneSet:
        key = (rect, None if mask is None else np.packbits(mask).tobytes())
        known = self._interned.get(key)
        if known is None:
            if mask is not None:
                mask = np.array(mask)
                mask.flags.writeable = False
            known = LaneSet(self, rect, mask)
            if len(self._interned) >= _MAX_INTERNED:
                self._interned.clear()
            self._interned[key] = known
        return known
