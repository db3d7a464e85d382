"""Sequence lengths of one (batch, head) and where its mask lets each row look."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass


@dataclass(frozen=True)
class SeqlenInfo:
    """Lengths and the diagonal that aligns the last query with the last key (bottom right)."""

    seqlen_q: cutlass.Int32
    seqlen_k: cutlass.Int32

    @property
    def diagonal(self) -> cutlass.Int32:
        """Query row i stands at key column i + Sk − Sq; negative when there are more queries."""
        return self.seqlen_k - self.seqlen_q


@dataclass(frozen=True)
class Band:
    """The band of columns around the diagonal that a row attends to.

    Attributes:
        left, right: inclusive run-time bounds, None where the variant has none; causal is right 0.
        is_within_k: whether the right edge alone keeps every row below Sq off the columns past Sk,
            as a causal mask does.
    """

    seqlen: SeqlenInfo
    left: cutlass.Int32 | None
    right: cutlass.Int32 | None
    is_within_k: cutlass.Constexpr

    def left_edge(self, row):
        """First column of ``row`` inside the band; may be negative."""
        return row + self.seqlen.diagonal - self.left

    def right_edge(self, row):
        """One past the last column of ``row`` inside the band; may be negative or past Sk."""
        return row + self.seqlen.diagonal + self.right + 1

    def cuts(self, first_row, last_row, first_column, last_column) -> cutlass.Boolean:
        """Whether a tile (bounds inclusive) has any score outside the band or past Sk."""
        is_cut = cutlass.Boolean(False)
        if self.right is not None:
            is_cut = last_column >= self.right_edge(first_row)
        if not self.is_within_k:
            is_cut = is_cut | (last_column >= self.seqlen.seqlen_k)
        if self.left is not None:
            is_cut = is_cut | (first_column < self.left_edge(last_row))
        return is_cut

    def stop_column(self, row):
        """One past the last column that ``row`` sees; may be negative, at most Sk."""
        if self.right is None:
            return self.seqlen.seqlen_k
        return cutlass.min(self.right_edge(row), self.seqlen.seqlen_k)


def clamp_window(bound: cutlass.Int32, seqlen: SeqlenInfo) -> cutlass.Int32:
    """A window bound no larger than Sq + Sk, which already reaches every column from every row.

    Without it, a bound near 2³¹ would overflow where it is added to a column.
    """
    return cutlass.min(bound, seqlen.seqlen_q + seqlen.seqlen_k)
