"""The online softmax of a row tile, in registers (FlashAttention-2, section 3.1.1).

State per row: the running maximum and the running sum of exponentials relative to it. Both are kept
in log2 units, the maximum already multiplied by scale_log2 *and rounded*: the same rounded number
then enters every exponent and the final LSE, so its rounding cancels even for huge scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.math import LN_2, NEG_INF, exp2, fma, quad_max, quad_sum
from cute_fa.blocks.mma import rows_by_columns


def row_max(scores: cute.Tensor, r: int) -> cutlass.Float32:
    """Maximum of row ``r`` over this thread's columns; two chains, to halve the dependency."""
    columns = cute.size(scores, mode=[1])
    even, odd = scores[r, 0], scores[r, 1]
    for c in range(2, columns, 2):
        even = cute.arch.fmax(even, scores[r, c])
        odd = cute.arch.fmax(odd, scores[r, c + 1])
    return cute.arch.fmax(even, odd)


def row_sum(scores: cute.Tensor, r: int) -> cutlass.Float32:
    """Sum of row ``r`` over this thread's columns, as a tree.

    A serial sum is scheduled late, and until then keeps every exponential in a register of its own
    beside its 16-bit copy: at D = 128 that spills.
    """
    terms = [scores[r, c] for c in range(cute.size(scores, mode=[1]))]
    while len(terms) > 1:
        pairs = [terms[i] + terms[i + 1] for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def rescale_rows(acc_O: cute.Tensor, rescale: cute.Tensor) -> None:
    """O ← O · rescale, row by row; acc_O ((2, 2), MMA_M, MMA_Dv), rescale (rows,)."""
    out = rows_by_columns(acc_O)
    for r in range(cute.size(rescale)):
        out[r, None].store(out[r, None].load() * rescale[r])


def finite_anchor(max_log2: cutlass.Float32) -> cutlass.Float32:
    """The maximum to subtract: 0 for a row without keys so far, else −inf − (−inf) is NaN."""
    return cutlass.select_(max_log2 == NEG_INF, cutlass.Float32(0.0), max_log2)


@dataclass(frozen=True)
class BlockWeight:
    """A positive weight w of all values of one block of keys: O = Σ w P V, but l = Σ P.

    P becomes w P by a sum of exponents, so that the running maximum is of weighted exponentials and
    bounds w P; l takes the weight out again, block by block.

    Attributes:
        log2, inverse: log2(w) and 1 / w.
    """

    log2: cutlass.Float32
    inverse: cutlass.Float32

    @staticmethod
    def of(weight: cutlass.Float32) -> BlockWeight:
        log2 = cute.math.log2(weight, fastmath=True)
        # Of the logarithm as rounded, so that the two cancel.
        return BlockWeight(log2, exp2(-log2))


@dataclass(frozen=True)
class OnlineSoftmax:
    """Running row statistics of a tile whose rows are spread over quads.

    Attributes:
        max_log2: (rows,) running maximum · scale_log2; the same in all four threads of a quad.
        sum_exp: (rows,) running sum of this thread's own columns; reduced over the quad at the end.
        scale_log2: positive factor from scores to log2 units.
        p_exponent: P and the sum are 2^p_exponent times as large as their formulas say.
    """

    max_log2: cute.Tensor
    sum_exp: cute.Tensor
    scale_log2: cutlass.Float32
    p_exponent: cutlass.Constexpr = 0.0

    @staticmethod
    def start(rows: int, scale_log2: cutlass.Float32, p_exponent: float = 0.0) -> OnlineSoftmax:
        """Statistics of ``rows`` rows that have seen no key yet."""
        max_log2 = cute.make_rmem_tensor(rows, cutlass.Float32)
        sum_exp = cute.make_rmem_tensor(rows, cutlass.Float32)
        max_log2.fill(NEG_INF)
        sum_exp.fill(0.0)
        return OnlineSoftmax(max_log2, sum_exp, scale_log2, p_exponent)

    @cute.jit
    def update(self, acc_S: cute.Tensor, acc_O: cute.Tensor, is_masked: cutlass.Constexpr):
        """Take in one score tile: S ← P = exp(S − max) in place, O ← O · exp(old max − max).

        acc_S is ((2, 2), MMA_M, MMA_N), −inf where masked; acc_O is ((2, 2), MMA_M, MMA_Dv). Only a
        masked tile can leave a row without any key so far.
        """
        scores, out = rows_by_columns(acc_S), rows_by_columns(acc_O)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            old_max = self.max_log2[r]
            new_max = cute.arch.fmax(old_max, quad_max(row_max(scores, r)) * self.scale_log2)
            anchor = new_max
            if cutlass.const_expr(is_masked):
                anchor = finite_anchor(new_max)
            rescale = exp2(old_max - anchor)
            out[r, None].store(out[r, None].load() * rescale)
            scores[r, None].store(exp2(fma(scores[r, None].load(), self.scale_log2, -anchor)))
            self.max_log2[r] = new_max
            self.sum_exp[r] = self.sum_exp[r] * rescale + row_sum(scores, r)

    @cute.jit
    def absorb(
        self,
        acc_S: cute.Tensor,
        is_masked: cutlass.Constexpr,
        scale_log2: cutlass.Float32 | None = None,
        weight: BlockWeight | None = None,
    ) -> cute.Tensor:
        """As ``update``, but leaves O alone: returns exp(old max − new max), (rows,).

        For kernels that rescale O later, because a product is still being added to it.

        Args:
            scale_log2: of this tile, if it is not that of all.
            weight: of this tile's values; P is to have it, the sum is not.
        """
        scores = rows_by_columns(acc_S)
        scale = self.scale_log2 if cutlass.const_expr(scale_log2 is None) else scale_log2
        more = 0.0 if cutlass.const_expr(weight is None) else weight.log2
        raised = more
        if cutlass.const_expr(self.p_exponent != 0.0):
            raised = more + self.p_exponent
        rescale = cute.make_rmem_tensor_like(self.max_log2)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            old_max = self.max_log2[r]
            tile_max = quad_max(row_max(scores, r)) * scale
            if cutlass.const_expr(weight is not None):
                tile_max = tile_max + more
            new_max = cute.arch.fmax(old_max, tile_max)
            anchor = new_max
            if cutlass.const_expr(is_masked):
                anchor = finite_anchor(new_max)
            rescale[r] = exp2(old_max - anchor)
            addend = -anchor
            if cutlass.const_expr(weight is not None or self.p_exponent != 0.0):
                addend = raised - anchor
            scores[r, None].store(exp2(fma(scores[r, None].load(), scale, addend)))
            self.max_log2[r] = new_max
            tile_sum = row_sum(scores, r)
            if cutlass.const_expr(weight is not None):
                tile_sum = tile_sum * weight.inverse
            self.sum_exp[r] = self.sum_exp[r] * rescale[r] + tile_sum
        return rescale

    @cute.jit
    def finish(self, acc_O: cute.Tensor, factor: cutlass.Float32 | None = None) -> cute.Tensor:
        """O ← O · factor / sum in place; returns the natural-log LSE (rows,), −inf for rows without
        keys."""
        out = rows_by_columns(acc_O)
        lse = cute.make_rmem_tensor_like(self.max_log2)
        for r in cutlass.range_constexpr(cute.size(self.sum_exp)):
            total = quad_sum(self.sum_exp[r])
            is_empty = total == 0.0
            inverse = cute.arch.rcp_approx(cutlass.select_(is_empty, cutlass.Float32(1.0), total))
            if cutlass.const_expr(factor is not None):
                inverse = inverse * factor
            out[r, None].store(out[r, None].load() * inverse)
            log_sum = self.max_log2[r] + cute.math.log2(total, fastmath=True)
            if cutlass.const_expr(self.p_exponent != 0.0):
                log_sum = log_sum - self.p_exponent
            lse[r] = cutlass.select_(is_empty, cutlass.Float32(NEG_INF), log_sum * LN_2)
        return lse
