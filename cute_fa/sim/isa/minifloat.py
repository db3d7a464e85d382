"""Floats of 8 bits and fewer: e4m3, e5m2, e3m2, e2m3, e2m1, ue8m0, ue4m3 (PTX ISA section 5.2.3).

Positive codes count upward with the value, so that encoding is a search among the midpoints of
neighbouring values; the tie goes to the even code, as IEEE rounding does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

Array = np.ndarray
F4, F8, U1, U2 = np.float32, np.float64, np.uint8, np.uint16


@dataclass(frozen=True)
class Format:
    """A small float: fields, bias, the last finite positive code, its infinity and NaN codes."""

    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    nan_code: int | None = None
    inf_code: int | None = None
    is_signed: bool = True


FORMATS: dict[str, Format] = {
    "e4m3": Format(8, 4, 3, 7, 0x7E, nan_code=0x7F),
    "e5m2": Format(8, 5, 2, 15, 0x7B, nan_code=0x7F, inf_code=0x7C),
    "e3m2": Format(6, 3, 2, 3, 0x1F),
    "e2m3": Format(6, 2, 3, 1, 0x1F),
    "e2m1": Format(4, 2, 1, 1, 0x07),
    "ue8m0": Format(8, 8, 0, 127, 0xFE, nan_code=0xFF, is_signed=False),
    "ue4m3": Format(7, 4, 3, 7, 0x7E, nan_code=0x7F, is_signed=False),
}


@cache
def _values(name: str) -> Array:
    """float64 value of every positive finite code, ascending."""
    form = FORMATS[name]
    codes = np.arange(form.max_code + 1)
    exponent = codes >> form.mantissa_bits
    fraction = (codes & ((1 << form.mantissa_bits) - 1)) / float(1 << form.mantissa_bits)
    if form.mantissa_bits == 0:  # no subnormals and no zero
        return np.ldexp(1.0, exponent - form.bias)
    normal = np.ldexp(1.0 + fraction, exponent - form.bias)
    return np.where(exponent == 0, np.ldexp(fraction, 1 - form.bias), normal)


@cache
def _decode_table(name: str) -> Array:
    """float32 value of every code, signs, infinities and NaN included."""
    form = FORMATS[name]
    table = np.full(1 << form.bits, np.nan, F4)
    values = _values(name).astype(F4)
    table[: len(values)] = values
    if form.is_signed:
        sign = 1 << (form.bits - 1)
        table[sign : sign + len(values)] = -values
        if form.inf_code is not None:
            table[form.inf_code], table[sign + form.inf_code] = np.inf, -np.inf
    return table


def decode(codes: Array, name: str) -> Array:
    """float32 values of small-float codes (any unsigned dtype)."""
    return _decode_table(name)[codes]


def encode(x: Array, name: str, mode: str, relu: bool) -> Array:
    """float32 to small-float codes (uint8), saturating to finite values as ``.satfinite`` does.

    NaN becomes the format's NaN; formats without one get their largest number. ``mode`` is rn, or
    rz and rp, which only ue8m0 uses.
    """
    form = FORMATS[name]
    values = _values(name)
    size, nan = _magnitude(x)
    if mode == "rn":
        middles = (values[1:] + values[:-1]) / 2
        code = np.searchsorted(middles, size, side="left")
        tie = (code < len(middles)) & (middles[np.minimum(code, len(middles) - 1)] == size)
        code = code + (tie & (code % 2 == 1))
    elif mode == "rp":
        code = np.minimum(np.searchsorted(values, size, side="left"), form.max_code)
    else:
        code = np.maximum(np.searchsorted(values, size, side="right") - 1, 0)
    return _with_sign(code, x, nan, form, relu)


def encode_stochastic(x: Array, name: str, random: Array, relu: bool) -> Array:
    """float32 to small-float codes (uint8) by ``cvt.rs``, saturating to finite values (9.7.9.21).

    The magnitude is truncated; 16 random bits are added to the uppermost 16 of the discarded bits,
    and their carry rounds it up.

    Args:
        random: integers below 2**16.
    """
    form = FORMATS[name]
    values = _values(name)
    size, nan = _magnitude(x)
    code = np.searchsorted(values, size, side="right") - 1
    above = values[np.minimum(code + 1, form.max_code)]
    gap = np.where(above > values[code], above - values[code], np.inf)
    discarded = np.floor((size - values[code]) / gap * 65536.0)
    carry = np.where(np.isfinite(size), discarded, 0.0) + random >= 65536.0
    code = np.minimum(code + carry, form.max_code)
    return _with_sign(code, x, nan, form, relu)


def _magnitude(x: Array) -> tuple[Array, Array]:
    """(absolute values in float64, NaN as 0; where NaN is)."""
    size = np.abs(np.asarray(x, F8))
    nan = np.isnan(size)
    return np.where(nan, 0.0, size), nan


def _with_sign(code: Array, x: Array, nan: Array, form: Format, relu: bool) -> Array:
    """Codes of magnitudes with the signs of ``x``, and the format's NaN."""
    if form.is_signed:
        negative = np.signbit(x) & ~nan
        if relu:
            code = np.where(negative, 0, code)
        else:
            code = code | (negative.astype(np.int64) << (form.bits - 1))
    nan_code = form.max_code if form.nan_code is None else form.nan_code
    return np.where(nan, nan_code, code).astype(U1)
