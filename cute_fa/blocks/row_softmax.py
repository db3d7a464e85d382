"""The online softmax of one row per thread, with rescaling only when it matters.

FlashAttention-4: while a row's maximum has not grown by more than a threshold since the one that
its exponents are relative to, that one stays. P is then at most 2^threshold instead of 1, O and the
sum need no rescaling, and the result is the same: whatever is subtracted cancels in O / l. For the
same reason the anchor may lie p_exponent below the maximum from the start: P, the sum and O are
then 2^p_exponent times as large, and nothing takes that back.

As in ``blocks.softmax`` the state is in log2 units, the anchor already multiplied by scale_log2 and
rounded, so that its rounding cancels too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import cute

from cute_fa.blocks.math import LN_2, NEG_INF, exp2
from cute_fa.blocks.packed_math import Pair, add2, both, exp2_polynomial, fma2, fmax_nan, mul2
from cute_fa.blocks.softmax import BlockWeight, finite_anchor


def row_maximum(row_S: cute.Tensor) -> cutlass.Float32:
    """Maximum of a row (N,), three values an instruction, in four chains.

    NaN if one score is, so that the anchor becomes NaN, and O and LSE with it: the clamp of a
    polynomial would drop the score's own.
    """
    chains = [row_S[c] for c in range(4)]
    for c in range(4, cute.size(row_S), 2):
        chain = (c // 2) % 4
        chains[chain] = fmax_nan(chains[chain], row_S[c], row_S[c + 1])
    return fmax_nan(chains[0], chains[1], fmax_nan(chains[2], chains[3]))


def _tree_sum(terms: list[Pair]) -> Pair:
    """Even and odd sums. As a tree, for a serial sum is scheduled late, and keeps every exponential
    in a register of its own until then."""
    while len(terms) > 1:
        pairs = [add2(terms[i], terms[i + 1]) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


@dataclass(frozen=True)
class RowSoftmax:
    """Running statistics of one row.

    Attributes:
        anchor_log2: (1,) what is subtracted from exponents; −∞ while the row has seen no key.
        sums: (2,) of the exponentials in even and in odd columns.
        scale_log2: positive factor from scores to log2 units.
        threshold: how far the maximum may grow beyond the one that the anchor was set by, in log2
            units.
        p_exponent: how far below the maximum the anchor is set, in log2 units.
        weight: of the values of the block at hand; P is to have it, the sums are not. None for 1.
    """

    anchor_log2: cute.Tensor
    sums: cute.Tensor
    scale_log2: cutlass.Float32
    threshold: cutlass.Constexpr
    p_exponent: cutlass.Constexpr = 0.0
    weight: BlockWeight | None = None

    @staticmethod
    def start(scale_log2: cutlass.Float32, threshold: float, p_exponent: float = 0.0) -> RowSoftmax:
        """A row that has seen no key yet."""
        anchor_log2 = cute.make_rmem_tensor(1, cutlass.Float32)
        sums = cute.make_rmem_tensor(2, cutlass.Float32)
        anchor_log2.fill(NEG_INF)
        sums.fill(0.0)
        return RowSoftmax(anchor_log2, sums, scale_log2, threshold, p_exponent)

    def of_block(self, scale_log2: cutlass.Float32, weight: BlockWeight | None) -> RowSoftmax:
        """The same statistics, for a block whose scores or values have another scale."""
        return replace(self, scale_log2=scale_log2, weight=weight)

    def absorb_maximum(self, row_S: cute.Tensor) -> cutlass.Float32:
        """Take in a block's maximum; returns what sums and O have to be multiplied by, often 1.

        The sums are multiplied here.
        """
        old = self.anchor_log2[0]
        largest = row_maximum(row_S) * self.scale_log2
        if self.weight is not None:
            largest = largest + self.weight.log2
        if self.p_exponent != 0.0:
            largest = largest - self.p_exponent
        new = fmax_nan(old, largest)
        # Of two −∞ the difference is NaN, and the comparison false: then new is −∞ as well.
        is_near = new - old <= self.threshold
        # A row that has seen no key has nothing to rescale: its O and sums are 0.
        stays = is_near | (old == NEG_INF)
        factor = cutlass.select_(stays, cutlass.Float32(1.0), exp2(old - finite_anchor(new)))
        self.anchor_log2[0] = cutlass.select_(is_near, old, new)
        self.sums[0], self.sums[1] = mul2((self.sums[0], self.sums[1]), both(factor))
        return factor

    def exponentiate(
        self, row_S: cute.Tensor, start: int, stop: int, polynomial_pairs: tuple[int, ...]
    ) -> None:
        """Columns start … stop − 1 of S ← P = 2^(S·scale_log2 − anchor), added to the sums.

        Args:
            polynomial_pairs: the pairs, counted from ``start``, that the FMA pipe computes.
        """
        scale = both(self.scale_log2)
        addend = -finite_anchor(self.anchor_log2[0])
        if self.weight is not None:
            addend = addend + self.weight.log2
        addends = both(addend)
        terms = []
        for pair in range((stop - start) // 2):
            c = start + 2 * pair
            x = fma2((row_S[c], row_S[c + 1]), scale, addends)
            if pair in polynomial_pairs:
                p = exp2_polynomial(x)
            else:
                p = (exp2(x[0]), exp2(x[1]))
            row_S[c], row_S[c + 1] = p
            terms.append(p)
        total = _tree_sum(terms)
        if self.weight is not None:
            total = mul2(total, both(self.weight.inverse))
        self.sums[0], self.sums[1] = add2((self.sums[0], self.sums[1]), total)

    def total(self) -> cutlass.Float32:
        """The sum of the row's exponentials, relative to the anchor."""
        return self.sums[0] + self.sums[1]

    def lse(self) -> cutlass.Float32:
        """The row's natural-log LSE, −∞ if it has seen no key."""
        total = self.total()
        log_sum = self.anchor_log2[0] + cute.math.log2(total, fastmath=True)
        return cutlass.select_(total == 0.0, cutlass.Float32(NEG_INF), log_sum * LN_2)
