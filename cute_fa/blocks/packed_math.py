"""Arithmetic on pairs of fp32 (f32x2: one instruction, two results), and 2^x without the MUFU.

The special function unit makes 16 exponentials a cycle and SM, the tensor core of a B200 4096
multiply-adds of 16-bit numbers: at head dim 128 the exponentials of a block take as long as both
products. FlashAttention-4 computes some of them on the FMA pipe instead, by Cody-Waite reduction
and a polynomial.
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import nvvm
from cutlass.cutlass_dsl import dsl_user_op

from cute_fa.exp2 import (
    COEFFICIENTS,
    MANTISSA_BITS,
    MIN_EXPONENT,
    ROUND_TO_INTEGER,
)

Pair = tuple[cutlass.Float32, cutlass.Float32]


@dsl_user_op
def fmax_nan(a, b, c=None, *, loc=None, ip=None) -> cutlass.Float32:
    """The largest of two or three (max.NaN.f32); NaN if one of them is."""
    a, b = (cutlass.Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b))
    if c is not None:
        c = cutlass.Float32(c).ir_value(loc=loc, ip=ip)
    return cutlass.Float32(nvvm.fmax(a, b, c=c, nan=True, loc=loc, ip=ip))


def both(x) -> Pair:
    """The pair (x, x)."""
    return cutlass.Float32(x), cutlass.Float32(x)


def fma2(a: Pair, b: Pair, c: Pair) -> Pair:
    """a·b + c with one rounding each."""
    return cute.arch.fma_packed_f32x2(a, b, c)


def mul2(a: Pair, b: Pair) -> Pair:
    return cute.arch.mul_packed_f32x2(a, b)


def add2(a: Pair, b: Pair) -> Pair:
    return cute.arch.add_packed_f32x2(a, b)


def sub2(a: Pair, b: Pair) -> Pair:
    return cute.arch.sub_packed_f32x2(a, b)


def exp2_polynomial(x: Pair) -> Pair:
    """2ˣ for x up to 127 on the FMA and integer pipes; relative error 1.03e-4, 2⁰ = 1, 2^−∞ = 0.

    x = n + f with n the nearest integer, which adding 1.5·2²³ leaves in the low bits of the sum;
    2ᶠ by the polynomial; n goes into the exponent by an integer addition. At the clamp, −127, that
    makes the exponent field 0, and for −127 itself the value 0.
    """
    x = tuple(cute.arch.fmax(value, MIN_EXPONENT) for value in x)
    shifted = add2(x, both(ROUND_TO_INTEGER))
    fraction = sub2(x, sub2(shifted, both(ROUND_TO_INTEGER)))
    power = both(COEFFICIENTS[-1])
    for coefficient in reversed(COEFFICIENTS[:-1]):
        power = fma2(power, fraction, both(coefficient))
    return tuple(_scale_exponent(p, n) for p, n in zip(power, shifted, strict=True))


def _scale_exponent(power: cutlass.Float32, shifted: cutlass.Float32) -> cutlass.Float32:
    """power · 2ⁿ, n in the low bits of ``shifted``, whose other bits leave at the top."""
    exponent = shifted.bitcast(cutlass.Int32) << MANTISSA_BITS
    return (power.bitcast(cutlass.Int32) + exponent).bitcast(cutlass.Float32)
