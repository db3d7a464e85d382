"""``cvt`` between float32 and packed narrow floats: PTX ISA section 9.7.9.21.

Pairs of f16 and bf16, pairs and quadruples of the floats of 8 bits and fewer, pairs of the
fixed-point s2f6, and stochastic rounding (``.rs``) to all of them. The first value of a pair or
quadruple goes to the uppermost bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.isa import library
from cute_fa.sim.isa.half import join_halves, narrow
from cute_fa.sim.isa.minifloat import FORMATS, decode, encode, encode_stochastic
from cute_fa.sim.isa.rounding import bf16_round, to_f16

Array = np.ndarray
F2, F4, F8 = np.float16, np.float32, np.float64
U1, U2, U4 = np.uint8, np.uint16, np.uint32

_ONE = 0x7F7F  # a pair of ue8m0 scale factors of 1


# --- semantics ------------------------------------------------------------------------------------


@library
def pack_f16x2(high: Array, low: Array) -> Array:
    """``cvt.rn.f16x2.f32 d, a, b``: a in the upper half."""
    return narrow(low, "f16").astype(U4) | (narrow(high, "f16").astype(U4) << U4(16))


@library
def pack_bf16x2(high: Array, low: Array) -> Array:
    """``cvt.rn.bf16x2.f32 d, a, b``: a in the upper half."""
    upper, lower = high.view(U4), low.view(U4)
    nan = np.isnan(high) | np.isnan(low)
    if np.count_nonzero(nan):
        packed_low = bf16_round(lower, "rn").astype(U4)
        return packed_low | (bf16_round(upper, "rn").astype(U4) << U4(16))
    one, bias, shift = U4(1), U4(0x7FFF), U4(16)
    upper = (upper + (((upper >> shift) & one) + bias)) & U4(0xFFFF0000)
    return upper | ((lower + (((lower >> shift) & one) + bias)) >> shift)


@library
def stochastic_half(x: Array, random: Array, kind: str) -> Array:
    """``cvt.rs`` of float32 to one ``f16`` or ``bf16`` (uint16).

    The magnitude is truncated; the random bits (13 for f16, 16 for bf16) are added to the uppermost
    discarded bits, and their carry rounds it up.
    """
    if kind == "bf16":
        raw = x.view(U4)
        finite = (raw & U4(0x7F800000)) != U4(0x7F800000)
        rounded = ((raw & U4(0x7FFFFFFF)) + np.where(finite, random, U4(0))) & U4(0xFFFF0000)
        return bf16_round(np.where(np.isnan(x), raw, rounded | (raw & U4(0x80000000))), "rz")
    size = np.abs(x.astype(F8))
    below = to_f16(size, np.zeros(()), "rz").view(U2)
    exponent = np.maximum(below >> U2(10), U2(1)).astype(np.int64) - 25
    discarded = np.floor(np.ldexp(size - below.view(F2).astype(F8), 13 - exponent))
    finite = np.isfinite(x)
    carry = np.where(finite, discarded, 0.0) + (random & U4(0x1FFF)) >= 8192.0
    out = np.minimum(below + (carry & finite), U2(0x7C00)).astype(U2)
    sign = np.signbit(x).astype(U2) << U2(15)
    return np.where(np.isnan(x), U2(0x7FFF), out | sign)


@library
def random_half(word: Array, upper: bool) -> Array:
    """One of the two 16-bit random values in ``rbits``, as uint32."""
    return word >> U4(16) if upper else word & U4(0xFFFF)


@library
def encode_pair(high: Array, low: Array, name: str, mode: str, relu: bool) -> Array:
    """``cvt.…e4m3x2|e5m2x2|….f32 d, a, b``: two small floats, a in the upper bits, as uint16."""
    width = U2(FORMATS[name].bits if FORMATS[name].bits == 4 else 8)
    upper, lower = (encode(x, name, mode, relu).astype(U2) for x in (high, low))
    return lower | (upper << width)


@library
def encode_scales(high: Array, low: Array, mode: str, saturate: bool) -> Array:
    """``cvt.rz|rp{.satfinite}.ue8m0x2``: powers of two; above them NaN, or the largest."""
    codes = []
    for x in (high, low):
        code = encode(x, "ue8m0", mode, False)
        if not saturate:
            limit = F4(2.0**127) if mode == "rp" else F4(np.finfo(F4).max)
            code = np.where(np.abs(x) > limit, U1(0xFF), code)
        codes.append(code.astype(U2))
    return codes[1] | (codes[0] << U2(8))


@library
def encode_quadruple(
    a: Array, b: Array, e: Array, f: Array, random: Array, name: str, relu: bool
) -> Array:
    """``cvt.rs…e4m3x4|….f32 d, {a, b, e, f}, rbits`` as uint32, with a in the uppermost bits.

    a and b use the upper 16 random bits, e and f the lower; e2m1 the upper and the lower bytes of
    both 16-bit halves.
    """
    first, second = random >> U4(16), random & U4(0xFFFF)
    if name == "e2m1":
        first, second = (
            (first & U4(0xFF00)) | (second >> U4(8)),
            ((first & U4(0xFF)) << U4(8)) | (second & U4(0xFF)),
        )
    width = U4(4 if name == "e2m1" else 8)
    word = np.zeros((), U4)
    for x, bits in ((a, first), (b, first), (e, second), (f, second)):
        word = (word << width) | encode_stochastic(x, name, bits, relu).astype(U4)
    return word


@library
def decode_pair(x: Array, name: str, kind: str) -> Array:
    """``cvt.rn.f16x2.e4m3x2 d, a`` and the like: both small floats as packed halves (uint32)."""
    width = FORMATS[name].bits if FORMATS[name].bits == 4 else 8
    mask = U2((1 << FORMATS[name].bits) - 1)
    low = narrow(decode(x & mask, name), kind)
    high = narrow(decode((x >> U2(width)) & mask, name), kind)
    return join_halves(high, low)


def _scale_pair(scales: Array) -> tuple[Array, Array]:
    """(upper, lower) of two packed ue8m0 factors, as float64."""
    upper, lower = (decode(x & U2(0xFF), "ue8m0").astype(F8) for x in (scales >> U2(8), scales))
    return upper, lower


@library
def encode_fixed_pair(high: Array, low: Array, scales: Array, relu: bool) -> Array:
    """``cvt.rn.satfinite…s2f6x2``: two's complement with 6 fractional bits (5.2.4), as uint16.

    The values are divided by their ue8m0 factors first; NaN becomes the largest number.
    """
    codes = []
    for x, scale in zip((high, low), _scale_pair(scales), strict=True):
        units = np.clip(np.rint(x.astype(F8) / scale * 64), 0 if relu else -128, 127)
        codes.append(np.where(np.isnan(units), 127, units).astype(np.int8).view(U1).astype(U2))
    return codes[1] | (codes[0] << U2(8))


@library
def decode_fixed_pair(x: Array, scales: Array, saturate: bool, relu: bool) -> Array:
    """``cvt.rn…bf16x2.s2f6x2``: both numbers times their factors, as packed bf16 (uint32)."""
    halves = []
    for code, scale in zip((x >> U2(8), x & U2(0xFF)), _scale_pair(scales), strict=True):
        value = code.astype(U1).view(np.int8) / F8(64) * scale
        limit = F8(np.finfo(F4).max)
        value = np.clip(value, 0 if relu else -np.inf, np.inf)
        raw = np.where(np.abs(value) > limit, np.copysign(np.inf, value), value).astype(F4)
        half = narrow(raw, "bf16")
        if saturate:
            half = np.where((half & U2(0x7FFF)) == U2(0x7F80), half - U2(1), half)
        halves.append(half)
    return join_halves(halves[0], halves[1])


# --- emitters, called by convert.emit_cvt ---------------------------------------------------------


def clamped_half(e: Any, expr: str, kind: str) -> str:
    """The pattern of a half as ``.satfinite`` and ``.relu`` want it."""
    if "satfinite" in e.parts:
        expr = f"saturate_finite({expr}, {kind!r})"
    if "relu" in e.parts:
        expr = f"relu_pattern({expr}, {kind!r})"
    return expr


def emit_to_pair(e: Any, kind: str) -> None:
    """``cvt.rn|rz|rs{.relu}{.satfinite}.f16x2|bf16x2.f32 d, a, b{, rbits}``."""
    a, b = e.src(1, "f4"), e.src(2, "f4")
    mode = next((part for part in e.parts if part in ("rn", "rz", "rs")), None)
    if mode is None:
        raise e.unsupported("rounding mode")
    if mode == "rn" and not {"relu", "satfinite"} & set(e.parts):
        e.dst(f"pack_{kind}x2({a}, {b})", "u4")
        return
    halves = []
    for text, upper in ((a, True), (b, False)):
        if mode == "rs":
            expr = f"stochastic_half({text}, random_half({e.src(3, 'u4')}, {upper}), {kind!r})"
        else:
            expr = f"float_to_float({text}, {kind!r}, {mode!r})"
            if kind == "f16":
                expr = f"half_pattern({expr})"
        halves.append(clamped_half(e, expr, kind))
    e.dst(f"join_halves({halves[0]}, {halves[1]})", "u4")


def emit_to_small(e: Any, target: str, source: str) -> None:
    """Pairs and quadruples of small floats, ue8m0 scale factors and s2f6 from wider floats."""
    name, relu = target[:-2], "relu" in e.parts
    mode = next((part for part in e.parts if part in ("rn", "rz", "rp", "rs")), "")
    legal = {"ue8m0": ("rz", "rp")}.get(name, ("rs",) if target.endswith("x4") else ("rn",))
    if mode not in legal:
        raise e.unsupported(f"rounding of a conversion to .{target}")
    if target.endswith("x4"):
        _emit_quadruple(e, name, source, relu)
        return
    scales = _scales(e, 3 if source == "f32" else 2)
    if scales is not None and name != "s2f6":
        raise e.unsupported(f"scale factors of .{target}")
    if source == "f32":
        a, b = e.src(1, "f4"), e.src(2, "f4")
    elif source in ("f16x2", "bf16x2"):
        kind = source[:-2]
        word = e.src(1, "u4")
        a = f"half_values(high_half({word}), {kind!r})"
        b = f"half_values(low_half({word}), {kind!r})"
    else:
        raise e.unsupported(f"conversion from .{source} to .{target}")
    if name == "ue8m0":
        expr = f"encode_scales({a}, {b}, {mode!r}, {'satfinite' in e.parts})"
    elif name == "s2f6":
        expr = f"encode_fixed_pair({a}, {b}, {scales or e.constant(_ONE, 'u2')}, {relu})"
    else:
        expr = f"encode_pair({a}, {b}, {name!r}, {mode!r}, {relu})"
    e.dst(expr, "u2")


def _emit_quadruple(e: Any, name: str, source: str, relu: bool) -> None:
    values = e.operands[1]
    if source != "f32" or not isinstance(values, ptx.Vector) or len(values.items) != 4:
        raise e.unsupported("operands of a conversion to four small floats")
    items = ", ".join(e.value(item, "f4") for item in values.items)
    word = f"encode_quadruple({items}, {e.src(2, 'u4')}, {name!r}, {relu})"
    if name == "e2m1":
        e.dst(f"low_half({word})", "u2")
    else:
        e.dst(word, "u4")


def emit_from_small(e: Any, kind: str, name: str) -> None:
    """Pairs of small floats, of ue8m0 scale factors and of s2f6 to packed halves."""
    scales = _scales(e, 2)
    if name == "s2f6":
        flags = f"{'satfinite' in e.parts}, {'relu' in e.parts}"
        factors = scales or e.constant(_ONE, "u2")
        e.dst(f"decode_fixed_pair({e.src(1, 'u2')}, {factors}, {flags})", "u4")
        return
    if scales is not None:
        raise e.unsupported(f"scale factors of .{name}x2")
    expr = f"decode_pair({e.src(1, 'u2')}, {name!r}, {kind!r})"
    if "relu" in e.parts:
        expr = f"half2_op('max', 'relu', {kind!r}, {expr}, {e.constant(0, 'u4')})"
    e.dst(expr, "u4")


def _scales(e: Any, index: int) -> str | None:
    """The ``scale-factor`` operand of ``.scaled::n2::ue8m0``."""
    return e.src(index, "u2") if "scaled::n2::ue8m0" in e.parts else None
