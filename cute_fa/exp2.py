"""The polynomial 2^x of FlashAttention-4 in numbers, shared by its kernel and its reference.

2ᶠ ≈ 1 + c1·f + c2·f² + c3·f³ for f in [−½, ½]: the smallest maximum of the relative error, 1.02e-4,
among cubics that are exact at 0, where every row's largest score lies. 16-bit P rounds by 4.9e-4
(fp16) or 3.9e-3 (bf16).
"""

from __future__ import annotations

COEFFICIENTS = (1.0, 0.69328293, 0.24221100, 0.05500895)
MAX_RELATIVE_ERROR = 1.03e-4

ROUND_TO_INTEGER = 1.5 * 2.0**23
"""Added to |x| < 2²², leaves the nearest integer in the low bits of an fp32 number."""

MIN_EXPONENT = -127.0
MANTISSA_BITS = 23

CHUNK_COLUMNS = 32
"""Scores of a row that are exponentiated together; pairs of a chunk are numbered from its left."""


def polynomial_pairs(chunk: int, num_chunks: int, per_chunk: int) -> tuple[int, ...]:
    """The pairs of chunk ``chunk`` of a row whose 2^x is the polynomial, spread evenly.

    The first chunk and the last have half as many: there the special function unit would wait for
    the long chains of the polynomials, which compilers put first, or their end for them.
    """
    if chunk in (0, num_chunks - 1):
        per_chunk //= 2
    pairs = CHUNK_COLUMNS // 2
    return tuple((2 * i + 1) * pairs // (2 * per_chunk) for i in range(per_chunk))
