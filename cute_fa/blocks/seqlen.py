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

    ``left`` and ``right`` are inclusive run-time bounds, None where the variant has none; a causal
    mask is right = 0. All queries below are half-open column ranges, not yet cut to the tensor on
    the left; ``stop_column`` is cut to Sk.
    """

    seqlen: SeqlenInfo
    left: cutlass.Int32 | None
    right: cutlass.Int32 | None

    def start_column(self, row):
        """First column that ``row`` sees; may be negative."""
        return row + self.seqlen.diagonal - self.left

    def stop_column(self, row):
        """One past the last column that ``row`` sees; may be negative, at most Sk."""
        if self.right is None:
            return self.seqlen.seqlen_k
        return cutlass.min(row + self.seqlen.diagonal + self.right + 1, self.seqlen.seqlen_k)


def clamp_window(bound: cutlass.Int32, seqlen: SeqlenInfo) -> cutlass.Int32:
    """A window bound no larger than Sq + Sk, which already reaches every column from every row.

    Without it, a bound near 2³¹ would overflow where it is added to a column.
    """
    return cutlass.min(bound, seqlen.seqlen_q + seqlen.seqlen_k)
