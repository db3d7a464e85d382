"""Correct rounding on numpy: fused operations, directed rounding, subnormal flushing.

numpy rounds each operation to nearest even. A result that PTX rounds once from the exact value (a
fused multiply-add, a directed rounding) is built here from a float64 value and the sign of what
float64 could not hold: the pair (value, residue) stands for ``value + residue`` exactly enough to
round it correctly.
"""

from __future__ import annotations

import numpy as np

from cute_fa.sim.isa import library

Array = np.ndarray
F2, F4, F8 = np.float16, np.float32, np.float64
U2, U4, U8, I8 = np.uint16, np.uint32, np.uint64, np.int64

_EXACT = np.zeros(())  # the residue of a float64 that holds the exact value
_F32_TINY = F4(2.0**-126)  # smallest normal
_HALF_ULP_MASK = U8((1 << 29) - 1)  # the bits that float32 does not keep of a float64
_HALF_ULP_TIE = U8(1 << 28)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Knuth's exact sum: (rounded a + b, what the rounding lost)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def round_to_odd(value: Array, residue: Array) -> Array:
    """float64 with its last bit set if inexact, so that a later rounding cannot go wrong.

    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.)
    """
    raw = value.view(I8)
    inexact = (residue != 0) & np.isfinite(value) & np.isfinite(residue)
    move = inexact & ((raw & I8(1)) == 0)
    away = (residue > 0) == (value > 0)
    stepped = np.where(away, raw + I8(1), raw - I8(1)).view(F8)
    # The only even pattern with a neighbour of the other sign is zero itself.
    stepped = np.where(value == 0, np.copysign(F8(5e-324), residue), stepped)
    return np.where(move, stepped, value)


def to_f32(value: Array, residue: Array, mode: str) -> Array:
    """Round ``value + residue`` once to float32; ``mode`` is rn, rz, rm or rp."""
    if mode == "rn":
        return round_to_odd(value, residue).astype(F4)
    nearest = value.astype(F4)
    gap = value - nearest.astype(F8)
    error = np.where(gap != 0, gap, np.where(np.isfinite(residue), residue, 0.0))
    return _directed(nearest, error, mode)


def _directed(nearest: Array, error: Array, mode: str) -> Array:
    """Correct a nearest rounding to a directed one; ``error`` has the sign of exact - nearest."""
    kind = nearest.dtype.type
    down = np.nextafter(nearest, kind(-np.inf))
    up = np.nextafter(nearest, kind(np.inf))
    if mode == "rm":
        return np.where(error < 0, down, nearest)
    if mode == "rp":
        return np.where(error > 0, up, nearest)
    toward_zero = np.where(nearest > 0, down, up)
    too_far = ((nearest > 0) & (error < 0)) | ((nearest < 0) & (error > 0))
    return np.where(too_far, toward_zero, nearest)


def _signed_zero(total: Array, a: Array, b: Array, mode: str) -> Array:
    """A sum with the sign that an exact zero has: - when rounding down, unless both are +0."""
    if mode != "rm":
        return total
    return np.where((total == 0) & (np.signbit(a) | np.signbit(b)), F8(-0.0), total)


@library
def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """``fma.rn.f32``: one rounding (9.7.3.6).

    The product of two float32 is exact in float64. Rounding the float64 sum again is wrong only if
    it sits exactly between two float32, or in the subnormal range: then the residue decides.
    """
    product = np.multiply(a, b, dtype=F8)
    total = product + c
    raw = total.view(U8)
    doubtful = ((raw & _HALF_ULP_MASK) == _HALF_ULP_TIE) | (np.abs(total) < _F32_TINY)
    if np.count_nonzero(doubtful) and np.count_nonzero(doubtful & (total != 0)):
        _, residue = two_sum(product, np.asarray(c, F8))
        return to_f32(total, residue, "rn")
    return total.astype(F4)


@library
def fma_f32_directed(a: Array, b: Array, c: Array, mode: str) -> Array:
    """``fma.rz|rm|rp.f32`` (9.7.3.6)."""
    product = np.multiply(a, b, dtype=F8)
    total, residue = two_sum(product, np.asarray(c, F8))
    return to_f32(_signed_zero(total, product, c, mode), residue, mode)


@library
def add_f32_directed(a: Array, b: Array, mode: str) -> Array:
    """``add.rz|rm|rp.f32`` (9.7.3.3)."""
    total, residue = two_sum(np.asarray(a, F8), np.asarray(b, F8))
    return to_f32(_signed_zero(total, a, b, mode), residue, mode)


@library
def mul_f32_directed(a: Array, b: Array, mode: str) -> Array:
    """``mul.rz|rm|rp.f32`` (9.7.3.5)."""
    return to_f32(np.multiply(a, b, dtype=F8), _EXACT, mode)


@library
def div_f32_directed(a: Array, b: Array, mode: str) -> Array:
    """``div.rz|rm|rp.f32`` and ``rcp`` (9.7.3.8, 9.7.3.13): the remainder tells the direction."""
    quotient = np.divide(a, b, dtype=F4)
    remainder = a.astype(F8) - quotient.astype(F8) * b.astype(F8)
    error = np.where(np.isfinite(remainder), remainder * np.sign(b), 0.0)
    overflown = np.isinf(quotient) & np.isfinite(a) & (b != 0)
    error = np.where(overflown, -np.sign(quotient), error)
    return _directed(quotient, error, mode)


@library
def sqrt_f32_directed(a: Array, mode: str) -> Array:
    """``sqrt.rz|rm|rp.f32`` (9.7.3.15)."""
    root = np.sqrt(a, dtype=F4)
    remainder = a.astype(F8) - root.astype(F8) * root.astype(F8)
    return _directed(root, np.where(np.isfinite(remainder), remainder, 0.0), mode)


@library
def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """``fma.rn.f64``: one rounding, from error-free transforms (9.7.3.6).

    Exact except where the product or its error over- or underflows, or the two error terms together
    sit exactly on a rounding boundary.
    """
    product = a * b
    error = _product_error(a, b, product)
    total, residue = two_sum(product, c)
    corrected = total + (residue + error)
    return np.where(np.isfinite(corrected), corrected, product + c)


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """a*b - product by Dekker's splitting."""
    splitter = F8(134217729.0)
    high_a = a * splitter - (a * splitter - a)
    high_b = b * splitter - (b * splitter - b)
    low_a, low_b = a - high_a, b - high_b
    return ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


@library
def add_f64_directed(a: Array, b: Array, mode: str) -> Array:
    """``add.rz|rm|rp.f64`` (9.7.3.3)."""
    total, residue = two_sum(a, b)
    total = _signed_zero(total, a, b, mode)
    return _directed(total, np.where(np.isfinite(residue), residue, 0.0), mode)


@library
def mul_f64_directed(a: Array, b: Array, mode: str) -> Array:
    """``mul.rz|rm|rp.f64`` (9.7.3.5), exact away from over- and underflow of the error term."""
    product = a * b
    error = _product_error(a, b, product)
    return _directed(product, np.where(np.isfinite(error), error, 0.0), mode)


@library
def flush(x: Array) -> Array:
    """``.ftz``: subnormal float32 become zero of the same sign (9.7.3, "subnormal numbers")."""
    return np.multiply(x, np.abs(x) >= _F32_TINY, dtype=F4)


@library
def saturate(x: Array) -> Array:
    """``.sat``: clamp to [0, 1]; NaN becomes +0 (9.7.3)."""
    kind = x.dtype.type
    return np.fmin(np.fmax(x, kind(0)), kind(1)) + kind(0)


def to_f16(value: Array, residue: Array, mode: str) -> Array:
    """Round ``value + residue`` (float64) once to float16."""
    if mode == "rn":
        return round_to_odd(value, residue).astype(F2)
    nearest = value.astype(F2)
    gap = value - nearest.astype(F8)
    return _directed(nearest, np.where(gap != 0, gap, np.nan_to_num(residue)), mode)


def to_bf16(value: Array, residue: Array, mode: str) -> Array:
    """Round ``value + residue`` (float64) once to bfloat16, as uint16."""
    odd = round_to_odd(value, residue)
    single = odd.astype(F4)
    gap = odd - single.astype(F8)
    toward_zero = _directed(single, np.where(np.isnan(gap), 0.0, gap), "rz")
    # float32 truncated and made odd if inexact: rounding it again is then correct.
    raw = toward_zero.view(U4) | (toward_zero.astype(F8) != odd).astype(U4)
    raw = np.where(np.isfinite(odd), raw, single.view(U4))
    return bf16_round(raw, mode)


@library
def bf16_round(raw: Array, mode: str) -> Array:
    """float32 bit patterns rounded to bfloat16 (uint16); NaN becomes 0x7fff."""
    high = raw >> U4(16)
    if mode == "rn":
        rounded = (raw + (U4(0x7FFF) + (high & U4(1)))) >> U4(16)
    else:
        inexact = (raw & U4(0xFFFF)) != 0
        negative = (raw >> U4(31)) != 0
        step = {"rz": np.False_, "rm": inexact & negative, "rp": inexact & ~negative}[mode]
        rounded = high + np.asarray(step, U4)
    nan = (raw & U4(0x7FFFFFFF)) > U4(0x7F800000)
    if np.count_nonzero(nan):
        rounded = np.where(nan, U4(0x7FFF), rounded)
    special = (raw & U4(0x7FFFFFFF)) == U4(0x7F800000)
    if mode != "rn" and np.count_nonzero(special):
        rounded = np.where(special, high, rounded)
    return rounded.astype(U2)


@library
def bf16_to_f32(x: Array) -> Array:
    """bfloat16 (uint16) as float32, exactly."""
    return (x.astype(U4) << U4(16)).view(F4)
