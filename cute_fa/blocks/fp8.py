"""FP8 (e4m3) tensors: their bytes in pairs, P as an operand, and the scales that belong to them.

TMA, swizzles, ldmatrix and stmatrix treat a tile of bytes as one of 16-bit *pairs*, half as wide;
only the tensor core sees single elements. A swizzle moves chunks of 16 bytes, so both views fit one
layout.

A stored number stands for itself times a descale (``cute_fa.quant``). What multiplies a whole tile
is left out of its product and applied to the result: S of query rows m and key block n is

    S = τ·dq[m]·dk[n] · (Q Kᵀ)              two scalars of the block, one factor of its scores

and dv, where V has one for all keys, multiplies O at the end. A dv[n] of each block weighs the
block's P instead, as if its scores were greater by ln dv[n] (``BlockWeight``).

P, at most 1, is rounded to e4m3, which has no numbers below 2⁻⁹. It is therefore kept 2⁸ times as
large (``plan.FP8_P_EXPONENT``; 2⁸ ≤ 448, the largest e4m3 number), and so is l: O / l stays as it
is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.plan import DESCALE_ROWS, TmaForwardPlan
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.softmax import BlockWeight
from cute_fa.blocks.tma import panel_swizzle

ELEMENT = cutlass.Float8E4M3FN
PAIR = cutlass.Int16


def pairs_of(mX: cute.Tensor) -> cute.Tensor:
    """A global tensor (…, D) of e4m3 numbers as (…, D / 2) of pairs; its last stride is 1."""
    *outer, columns = mX.shape
    strides = [stride // 2 for stride in mX.stride[:-1]]
    layout = cute.make_layout((*outer, columns // 2), stride=(*strides, 1))
    return cute.make_tensor(cute.recast_ptr(mX.iterator, dtype=PAIR), layout)


def bytes_of(sX: cute.Tensor) -> cute.Tensor:
    """A shared tile (rows, columns, stage) of pairs as (rows, 2·columns, stage) of e4m3 numbers."""
    swizzle = panel_swizzle(cute.size(sX, mode=[1]))
    pointer = cute.recast_ptr(sX.iterator, swizzle_=swizzle, dtype=ELEMENT)
    return cute.make_tensor(pointer, cute.recast_layout(ELEMENT.width, PAIR.width, sX.layout))


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2), 1, N / 8) as A of m64nNk32, ((4, 2, 2), 1, N / 32).

    Of 32 keys a thread holds, of a row, columns 2t + {0, 1} of four blocks of 8, and needs
    positions 4t … 4t + 3 and 16 + 4t … 16 + 4t + 3 of the operand. Taken in order, key 2t + {0, 1}
    of blocks 0 and 1 are the first four: the order of keys that ``blocks.transpose`` gives V.
    """
    (pair, half), mma_m, mma_n = acc.shape
    (pair_stride, half_stride), m_stride, n_stride = acc.stride
    layout = cute.make_layout(
        (((pair, 2), half, 2), mma_m, mma_n // 4),
        stride=(((pair_stride, n_stride), half_stride, 2 * n_stride), m_stride, 4 * n_stride),
    )
    return cute.make_tensor(acc.iterator, layout)


@dataclass(frozen=True)
class Descales:
    """The descales of a launch; all None where inputs have 16 bits.

    Attributes:
        q, k, v: (B, Hk, blocks) fp32, positive; B counts packed sequences too.
        is_by_block: whether every ``DESCALE_ROWS`` rows of a sequence, from its first on, have
            their own; else there is one block.
    """

    q: cute.Tensor | None = None
    k: cute.Tensor | None = None
    v: cute.Tensor | None = None
    is_by_block: cutlass.Constexpr = False

    @staticmethod
    def of(plan: TmaForwardPlan, extras: tuple) -> tuple[Descales, tuple]:
        """(descales, lengths) from what follows the stream (``blocks.signature``)."""
        if not plan.is_fp8:
            return Descales(), extras
        given, lengths = extras[:3], extras[3:]
        if not plan.has_block_descales:
            given = tuple(_with_one_block(x) for x in given)
        return Descales(*given, plan.has_block_descales), lengths

    def at(self, batch: cutlass.Int32, head_kv: cutlass.Int32) -> HeadDescales:
        """Those of one K/V head."""
        of_head = (None if x is None else x[batch, head_kv, None] for x in (self.q, self.k, self.v))
        return HeadDescales(*of_head, self.is_by_block)


def _with_one_block(descale: cute.Tensor) -> cute.Tensor:
    """(B, Hk) as (B, Hk, 1)."""
    one = cute.make_layout(1, stride=0)
    return cute.make_tensor(descale.iterator, cute.append(descale.layout, one))


@dataclass(frozen=True)
class HeadDescales:
    """The descales of one (batch, K/V head): q, k, v (blocks,), or all None."""

    q: cute.Tensor | None
    k: cute.Tensor | None
    v: cute.Tensor | None
    is_by_block: cutlass.Constexpr

    def scale(self, scores: ScoreScale, query, key) -> ScoreScale:
        """From raw scores of the blocks that hold ``query`` and ``key`` to exponents.

        ``query`` may be a row past the sequence's end, of which nothing is stored.
        """
        if self.q is None:
            return scores
        if self.is_by_block:
            query = cutlass.min(query, cute.size(self.q) * DESCALE_ROWS - 1)
        return scores.times(self._of(self.q, query) * self._of(self.k, key))

    def weight(self, key) -> BlockWeight | None:
        """What V's descale does to the P of ``key``'s block; None if it is the same for all."""
        return BlockWeight.of(self._of(self.v, key)) if self.is_by_block else None

    @property
    def of_out(self) -> cutlass.Float32 | None:
        """What O is to be multiplied by at the end; None for 1."""
        return None if self.q is None or self.is_by_block else self.v[0]

    def _of(self, x: cute.Tensor, row) -> cutlass.Float32:
        return x[row // DESCALE_ROWS] if self.is_by_block else x[0]
