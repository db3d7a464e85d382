"""Attention over sequences of different lengths that are packed one behind the other.

The batch dimension is gone: q is (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv), out (Tq, Hq, Dv) and
the LSE (Hq, Tq). Sequence b is rows cu_seqlens[b] … cu_seqlens[b + 1] − 1, of which the first
seqused[b] count. Masks are those of each sequence by itself: its last query stands at its last key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem, KernelVariant


@dataclass(frozen=True)
class Packing:
    """Where each of B sequences lies, and how much of it counts, as numbers on the host.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: B + 1 row numbers that never fall, the first of them 0.
        seqused_q, seqused_k: B lengths, none longer than its sequence; None: all rows count.

    Raises:
        InvalidArgumentError: numbers that describe no packing.
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.cu_seqlens_q) != len(self.cu_seqlens_k):
            raise InvalidArgumentError(
                "cu_seqlens_q and cu_seqlens_k are of different batches",
                got=f"{len(self.cu_seqlens_q)} and {len(self.cu_seqlens_k)} numbers",
                expected="batch + 1 of each",
                fix="a sequence without queries or keys has two equal borders",
            )
        for side in ("q", "k"):
            name, used = f"cu_seqlens_{side}", getattr(self, f"seqused_{side}")
            _check_borders(name, getattr(self, name))
            if used is not None:
                _check_used(f"seqused_{side}", used, _lengths(getattr(self, name)))

    @classmethod
    def of_lengths(
        cls,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        seqused_q: Sequence[int] | None = None,
        seqused_k: Sequence[int] | None = None,
    ) -> Packing:
        """The packing of sequences of these lengths without a gap."""
        return cls(
            tuple(accumulate(lengths_q, initial=0)),
            tuple(accumulate(lengths_k, initial=0)),
            None if seqused_q is None else tuple(seqused_q),
            None if seqused_k is None else tuple(seqused_k),
        )

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.cu_seqlens_q) - 1

    @property
    def rows_q(self) -> tuple[range, ...]:
        """Of each sequence, the rows of q and out that count."""
        return _rows(self.cu_seqlens_q, self.seqused_q)

    @property
    def rows_k(self) -> tuple[range, ...]:
        """Of each sequence, the rows of k and v that count."""
        return _rows(self.cu_seqlens_k, self.seqused_k)


def _lengths(borders: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in pairwise(borders))


def _rows(borders: tuple[int, ...], used: tuple[int, ...] | None) -> tuple[range, ...]:
    counts = _lengths(borders) if used is None else used
    return tuple(
        range(start, start + count) for start, count in zip(borders[:-1], counts, strict=True)
    )


_RUNNING_TOTALS = "{name} = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"


def _check_borders(name: str, borders: tuple[int, ...]) -> None:
    if not borders or borders[0] != 0:
        raise InvalidArgumentError(
            f"{name} does not begin with 0",
            got=borders[0] if borders else "no number",
            expected="0, then where each sequence ends",
            fix=_RUNNING_TOTALS.format(name=name),
        )
    for index, (start, stop) in enumerate(pairwise(borders)):
        if stop < start:
            raise InvalidArgumentError(
                f"{name} falls",
                got=f"{start} at [{index}], {stop} at [{index + 1}]",
                expected="running totals of the lengths",
                fix=_RUNNING_TOTALS.format(name=name),
            )


def _check_used(name: str, used: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    if len(used) != len(lengths):
        raise InvalidArgumentError(
            f"{name} is of another batch",
            got=f"{len(used)} lengths",
            expected=f"{len(lengths)}, one for each sequence",
            fix="give the whole length where all rows count",
        )
    for index, (count, length) in enumerate(zip(used, lengths, strict=True)):
        if not 0 <= count <= length:
            raise InvalidArgumentError(
                f"{name}[{index}] is no part of its sequence",
                got=count,
                expected=f"0 to {length}",
                fix="it counts rows from the sequence's own first; cu_seqlens holds its length",
            )


@dataclass(frozen=True)
class VarlenProblem:
    """One attention forward over packed sequences.

    Attributes:
        padded: the same with every sequence as long as the longest: batch, heads, head dims, dtype,
            masking; its seqlen_q and seqlen_k are max_seqlen_q and max_seqlen_k.
        total_q, total_k: Tq, Tk, rows of the packed tensors.
        packing: the lengths, where the host knows them; costs are known only then.
        has_seqused_q, has_seqused_k: whether only the first rows of each sequence count.

    Raises:
        InvalidArgumentError: a packing of another batch, beyond the tensors or the longest length.
    """

    padded: AttentionProblem
    total_q: int
    total_k: int
    packing: Packing | None = None
    has_seqused_q: bool = False
    has_seqused_k: bool = False

    def __post_init__(self) -> None:
        packing = self.packing
        if packing is None:
            return
        if packing.batch != self.padded.batch:
            raise InvalidArgumentError(
                "the packing is of another batch",
                got=packing.batch,
                expected=self.padded.batch,
                fix="VarlenProblem.of(problem, packing) takes the batch from the packing",
            )
        for side in ("q", "k"):
            borders = getattr(packing, f"cu_seqlens_{side}")
            total = getattr(self, f"total_{side}")
            if borders[-1] > total:
                raise InvalidArgumentError(
                    f"cu_seqlens_{side} reaches beyond the rows of {side}",
                    got=borders[-1],
                    expected=f"at most {total}",
                    fix=f"end cu_seqlens_{side} with the number of packed rows",
                )
            longest = max(map(len, getattr(packing, f"rows_{side}")), default=0)
            limit = getattr(self.padded, f"seqlen_{side}")
            if longest > limit:
                raise InvalidArgumentError(
                    f"max_seqlen_{side} is smaller than a sequence",
                    got=limit,
                    expected=f"at least {longest}",
                    fix=f"max_seqlen_{side}={longest}",
                )
            if getattr(self, f"has_seqused_{side}") != (
                getattr(packing, f"seqused_{side}") is not None
            ):
                raise InvalidArgumentError(
                    f"has_seqused_{side} does not say what the packing does",
                    got=getattr(self, f"has_seqused_{side}"),
                    expected=getattr(packing, f"seqused_{side}") is not None,
                    fix="VarlenProblem.of(problem, packing) sets it",
                )
        if packing.cu_seqlens_q[-1] != self.total_q:
            raise InvalidArgumentError(
                "rows of q belong to no sequence",
                got=f"{self.total_q} rows, of which the sequences take {packing.cu_seqlens_q[-1]}",
                expected="cu_seqlens_q to end with the number of rows",
                fix="drop the rows, or make them a sequence of its own with seqused_q = 0",
            )

    @classmethod
    def of(cls, problem: AttentionProblem, packing: Packing) -> VarlenProblem:
        """The packed problem with these lengths and all else as in ``problem``, in tensors that
        hold just the packed rows."""
        longest_q, longest_k = (
            max(map(len, rows), default=0) for rows in (packing.rows_q, packing.rows_k)
        )
        return cls(
            replace(problem, batch=packing.batch, seqlen_q=longest_q, seqlen_k=longest_k),
            packing.cu_seqlens_q[-1],
            packing.cu_seqlens_k[-1],
            packing,
            packing.seqused_q is not None,
            packing.seqused_k is not None,
        )

    @property
    def variant(self) -> KernelVariant:
        """What a kernel must be compiled for to serve this problem."""
        return replace(
            self.padded.variant,
            is_varlen=True,
            has_seqused_q=self.has_seqused_q,
            has_seqused_k=self.has_seqused_k,
        )

    def require_packing(self) -> Packing:
        """The lengths.

        Raises:
            InvalidArgumentError: the host does not know them.
        """
        if self.packing is None:
            raise InvalidArgumentError(
                "the lengths of the sequences are not known on the host",
                expected="a packing",
                fix="VarlenProblem.of(problem, Packing.of_lengths(…))",
            )
        return self.packing

    def sequences(self) -> tuple[AttentionProblem, ...]:
        """Each sequence as a problem by itself, of batch 1; needs the lengths."""
        packing = self.require_packing()
        return tuple(
            replace(self.padded, batch=1, seqlen_q=len(rows_q), seqlen_k=len(rows_k))
            for rows_q, rows_k in zip(packing.rows_q, packing.rows_k, strict=True)
        )

    def flops(self) -> int:
        """Matrix-multiply FLOPs of all sequences; see ``AttentionProblem.flops``."""
        return sum(problem.flops() for problem in self.sequences())

    def ideal_hbm_bytes(self) -> int:
        """Bytes if each row that counts is read or written once."""
        return sum(problem.ideal_hbm_bytes() for problem in self.sequences())

    def standard_hbm_bytes(self) -> int:
        """Bytes of the unfused algorithm, one sequence after another."""
        return sum(problem.standard_hbm_bytes() for problem in self.sequences())
