"""From raw scores q·k to the exponents of the softmax: scale, its sign, and softcap.

exp(scale·s − max) is evaluated as 2^(s·scale_log2 − max_log2), one FMA and one ex2 per score
(FlashAttention-2, section 3.1). That needs scale_log2 > 0, twice over: the row maximum is taken
over raw scores, and a masked score must stay −inf. So

    softmax_scale > 0   S is used as it is
    softmax_scale < 0   Q is negated in shared memory: (−Q)Kᵀ·|scale|, exact
    softmax_scale = 0   Q is cleared and the scale becomes 1: every visible score is 0

Kernels whose threads never touch Q let the tensor core negate it, and take scale_log2 = 2⁻¹²⁶ for
a scale of 0: every score below 2¹⁰⁰ is then less than 2⁻²⁶, as good as 0.

    softcap             S becomes tanh(S·scale/softcap), of either sign, and scale_log2 is
                        softcap·log2(e); the mask comes after the tanh
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import cute

from cute_fa.blocks.math import LOG2_E, tanh_from_exp2

SIGN_BITS = {8: 0x80808080, 16: 0x80008000}
"""The sign bits in a word of elements of so many bits."""

NEARLY_ZERO = 2.0**-126
"""The smallest normal fp32 number."""


@dataclass(frozen=True)
class ScoreScale:
    """How raw scores become exponents of 2.

    Attributes:
        scale: softmax_scale as the caller gave it.
        scale_log2: positive factor from (capped) scores to log2 units.
        cap_factor: 2·log2(e)·scale/softcap, what ``tanh_from_exp2`` wants; None without softcap.
    """

    scale: cutlass.Float32
    scale_log2: cutlass.Float32
    cap_factor: cutlass.Float32 | None

    def times(self, factor: cutlass.Float32) -> ScoreScale:
        """For raw scores that are too small by a positive ``factor``."""
        if self.cap_factor is not None:
            return replace(self, cap_factor=self.cap_factor * factor)
        # Not 0, by which a score of −∞ would become NaN.
        return replace(self, scale_log2=cute.arch.fmax(self.scale_log2 * factor, NEARLY_ZERO))


def score_scale(
    scale: cutlass.Float32,
    softcap: cutlass.Float32,
    has_softcap: bool,
    *,
    clears_q: bool = True,
) -> ScoreScale:
    """The ScoreScale of one launch; ``softcap`` is looked at only if the variant has it.

    Args:
        clears_q: whether the kernel calls ``fold_scale_sign``.
    """
    if has_softcap:
        return ScoreScale(scale, softcap * LOG2_E, scale / softcap * (2.0 * LOG2_E))
    magnitude = cutlass.select_(scale < 0.0, -scale, scale)
    of_zero = cutlass.Float32(1.0 if clears_q else NEARLY_ZERO)
    scale_log2 = cutlass.select_(scale == 0.0, of_zero, magnitude * LOG2_E)
    return ScoreScale(scale, scale_log2, None)


@cute.jit
def fold_scale_sign(tQsQ: cute.Tensor, scores: ScoreScale, element_bits: cutlass.Constexpr = 16):
    """Negate (scale < 0) or clear (scale = 0) this thread's own chunks of Q in shared memory.

    For variants without softcap. Call it between the thread's cp.async wait and the barrier that
    publishes Q. ``tQsQ`` is the destination partition of Q's copy, (CPY, CPY_M, CPY_K), of elements
    or of pairs of bytes.
    """
    if scores.scale <= 0.0:
        keep = cutlass.select_(scores.scale == 0.0, cutlass.Int32(0), cutlass.Int32(-1))
        flip = keep & cutlass.Int32(SIGN_BITS[element_bits] - (1 << 32))
        words_smem = cute.recast_tensor(tQsQ, cutlass.Int32)  # (CPY / 2, CPY_M, CPY_K)
        words = cute.make_rmem_tensor_like(words_smem)
        cute.autovec_copy(words_smem, words)
        words.store((words.load() & keep) ^ flip)
        cute.autovec_copy(words, words_smem)


def cap_scores(acc_S: cute.Tensor, scores: ScoreScale) -> None:
    """S ← tanh(S·scale/softcap) in place, if the variant has a softcap."""
    if scores.cap_factor is not None:
        for i in range(cute.size(acc_S)):
            acc_S[i] = tanh_from_exp2(acc_S[i] * scores.cap_factor)
