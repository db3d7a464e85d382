"""One sequence of a batch: its lengths, its rows, and where its mask lets each row look.

Dense tensors (B, S, H, D) and packed ones (T, H, D) differ here only. A kernel is launched with a
``DenseSequences`` or a ``PackedSequences``; ``of(batch)`` gives a CTA its ``Sequence``, and all row
numbers after that are the sequence's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import cutlass
from cutlass import cute


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


class MaskConfig(Protocol):
    """What of a config decides where rows look."""

    @property
    def is_causal(self) -> bool: ...

    @property
    def has_window_left(self) -> bool: ...

    @property
    def has_window_right(self) -> bool: ...


@dataclass(frozen=True)
class Window:
    """Inclusive bounds around the diagonal as the caller gave them, None where there is none."""

    left: cutlass.Int32 | None
    right: cutlass.Int32 | None
    is_causal: cutlass.Constexpr

    @staticmethod
    def of(config: MaskConfig, left: cutlass.Int32, right: cutlass.Int32) -> Window:
        """The bounds that the variant has."""
        return Window(
            left if config.has_window_left else None,
            right if config.has_window_right else None,
            config.is_causal,
        )

    def around(self, seqlen: SeqlenInfo) -> Band:
        """The band of these bounds around the diagonal of a sequence; causal is right 0."""
        left = None if self.left is None else clamp_window(self.left, seqlen)
        right = None if self.right is None else clamp_window(self.right, seqlen)
        right = cutlass.Int32(0) if self.is_causal else right
        return Band(seqlen, left, right, is_within_k=self.is_causal)


@dataclass(frozen=True)
class Sequence:
    """What a CTA works on: sequence ``batch`` and its rows in the tensors of all of them.

    Attributes:
        offset_q, offset_k: its first row in packed tensors; None: tensors have a batch mode.
    """

    batch: cutlass.Int32
    band: Band
    offset_q: cutlass.Int32 | None = None
    offset_k: cutlass.Int32 | None = None

    @property
    def seqlen(self) -> SeqlenInfo:
        return self.band.seqlen

    def rows_q(self, mX: cute.Tensor, head: cutlass.Int32) -> cute.Tensor:
        """One head of mQ or mO, (rows, D), from the sequence's first row on.

        Of a packed tensor, the rows of the sequences behind it follow: bounds come from ``seqlen``.
        """
        return self._rows(mX, head, self.offset_q)

    def rows_k(self, mX: cute.Tensor, head: cutlass.Int32) -> cute.Tensor:
        """One head of mK or mV, (rows, D); as ``rows_q``."""
        return self._rows(mX, head, self.offset_k)

    def _rows(
        self, mX: cute.Tensor, head: cutlass.Int32, offset: cutlass.Int32 | None
    ) -> cute.Tensor:
        if offset is None:
            return mX[self.batch, None, head, None]
        return cute.domain_offset((offset, 0), mX[None, head, None])

    def row_values(self, mX: cute.Tensor, head: cutlass.Int32) -> cute.Tensor:
        """One head of mLSE or of another number per query row, (rows); as ``rows_q``."""
        if self.offset_q is None:
            return mX[self.batch, head, None]
        return cute.domain_offset((self.offset_q,), mX[head, None])


@dataclass(frozen=True)
class DenseSequences:
    """Sequences of one length for all queries and one for all keys."""

    band: Band

    @property
    def max_seqlen_q(self) -> cutlass.Int32:
        return self.band.seqlen.seqlen_q

    def of(self, batch: cutlass.Int32) -> Sequence:
        return Sequence(batch, self.band)


@dataclass(frozen=True)
class PackedSequences:
    """Sequences one behind the other, of which the first rows count if there is a seqused.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32, where each sequence begins; its end is the next.
        seqused_q, seqused_k: (B) int32 or None.
        max_seqlen_q: what the grid is made for.
        window: bounds, the same for all.
    """

    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None
    max_seqlen_q: cutlass.Int32
    window: Window

    def of(self, batch: cutlass.Int32) -> Sequence:
        """Lengths from global memory; a seqused beyond its sequence ends with the sequence."""
        offset_q, seqlen_q = _place(self.cu_seqlens_q, self.seqused_q, batch)
        offset_k, seqlen_k = _place(self.cu_seqlens_k, self.seqused_k, batch)
        band = self.window.around(SeqlenInfo(seqlen_q, seqlen_k))
        return Sequence(batch, band, offset_q, offset_k)


def _place(
    borders: cute.Tensor, used: cute.Tensor | None, batch: cutlass.Int32
) -> tuple[cutlass.Int32, cutlass.Int32]:
    """(first row, number of rows that count) of one sequence."""
    start = borders[batch]
    length = borders[batch + 1] - start
    if used is not None:
        length = cutlass.min(used[batch], length)
    return start, length


def sequences(
    mQ: cute.Tensor, mK: cute.Tensor, window: Window, lengths: tuple
) -> DenseSequences | PackedSequences:
    """The sequences of a launch, from its tensors and what followed the stream.

    Args:
        lengths: empty for dense tensors; else as the module ``signature`` lists them.
    """
    if lengths:
        return PackedSequences(*lengths, window)
    return DenseSequences(window.around(SeqlenInfo(mQ.shape[1], mK.shape[1])))


def num_sequences(mQ: cute.Tensor, lengths: tuple) -> cutlass.Int32:
    """B of a launch, from the same."""
    return cute.size(lengths[0]) - 1 if lengths else mQ.shape[0]
