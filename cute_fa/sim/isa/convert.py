"""``cvt`` among all integer and floating-point types: PTX ISA section 9.7.9.21 and ``cvt.pack``.

Every conversion goes from the source value to one exact intermediate (an integer, or a float64 with
what it could not hold) and is rounded once from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.convert_small import (
    clamped_half,
    emit_from_small,
    emit_to_pair,
    emit_to_small,
)
from cute_fa.sim.isa.half import join_halves, narrow, widen
from cute_fa.sim.isa.minifloat import FORMATS
from cute_fa.sim.isa.rounding import (
    _directed,
    bf16_round,
    to_bf16,
    to_f16,
    to_f32,
    two_sum,
)
from cute_fa.sim.isa.types import DTYPE

Array = np.ndarray
F2, F4, F8 = np.float16, np.float32, np.float64
U2, U4, U8, I8 = np.uint16, np.uint32, np.uint64, np.int64

_INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}
_FLOATS = {"f16", "bf16", "f32", "f64"}
_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")


# --- semantics ------------------------------------------------------------------------------------


@library
def int_to_int(x: Array, target: str, saturate: bool) -> Array:
    """Integer to integer: wrap to the low bits, or clamp with ``.sat``."""
    dtype = np.dtype(DTYPE[target])
    if saturate:
        info = np.iinfo(dtype)
        source = np.iinfo(x.dtype)
        low, high = max(info.min, source.min), min(info.max, source.max)
        x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
    return x.astype(dtype)


@library
def int_to_float(x: Array, target: str, mode: str) -> Array:
    """Integer to float, rounded once in any mode."""
    if mode == "rn" and target in ("f32", "f64"):
        return x.astype(DTYPE[target])
    low = (x & x.dtype.type(0xFFFFFFFF if x.dtype.itemsize > 4 else 0)).astype(F8)
    high = (x - (x & x.dtype.type(0xFFFFFFFF))).astype(F8) if x.dtype.itemsize > 4 else x.astype(F8)
    value, residue = two_sum(high, low)
    return _round_to(value, residue, target, mode)


@library
def float_to_int(x: Array, target: str, mode: str) -> Array:
    """Float to integer: round to integral, clamp to the range.

    NaN gives 0, except that f64 sources and 64-bit targets give 1 << (width - 1).
    """
    dtype = np.dtype(DTYPE[target])
    info = np.iinfo(dtype)
    integral = _TO_INTEGRAL[mode](x.astype(F8))
    too_low, too_high = integral < F8(info.min), integral >= F8(info.max)
    nan = np.isnan(integral)
    inside = np.where(too_low | too_high | nan, F8(0), integral).astype(dtype)
    out = np.where(too_high, dtype.type(info.max), inside)
    out = np.where(too_low, dtype.type(info.min), out)
    if dtype.itemsize == 8 or x.dtype.type is F8:
        pattern = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)
        out = np.where(nan, pattern, out)
    return out.astype(dtype)


@library
def float_to_float(x: Array, target: str, mode: str) -> Array:
    """Float (numpy float16, 32 or 64) to f16, bf16 (uint16), f32 or f64, rounded once."""
    if target == "bf16" and x.dtype.type is F4:
        return bf16_round(x.view(U4), mode)
    if mode == "rn" and target == "f16" and x.dtype.type is F4:
        return narrow(x, "f16").view(F2)
    return _round_to(x.astype(F8), np.zeros(()), target, mode)


def _round_to(value: Array, residue: Array, target: str, mode: str) -> Array:
    if target == "f64":
        return value if mode == "rn" else _directed(value, residue, mode)
    function = {"f32": to_f32, "f16": to_f16, "bf16": to_bf16}[target]
    return function(value, residue, mode)


@library
def round_integral(x: Array, mode: str) -> Array:
    """``cvt.{rni,rzi,rmi,rpi}`` between equal float types: round to an integral value."""
    return _TO_INTEGRAL[mode](x)


@library
def half_pattern(x: Array) -> Array:
    """float16 values as uint16 patterns."""
    return x.view(U2)


@library
def relu_pattern(x: Array, kind: str) -> Array:
    """``.relu`` on 16-bit patterns: negatives and -0 become +0; NaN stays (as 0x7fff)."""
    negative = (x & U2(0x8000)) != 0
    value = widen(x, kind)
    return np.where(negative & ~np.isnan(value), U2(0), x)


@library
def saturate_finite(x: Array, kind: str) -> Array:
    """``.satfinite`` on 16-bit patterns: infinities become the largest number."""
    infinite = U2(0x7C00) if kind == "f16" else U2(0x7F80)
    return np.where((x & U2(0x7FFF)) == infinite, x - U2(1), x)


@library
def round_tf32(x: Array, mode: str, finite: bool, relu: bool) -> Array:
    """``cvt.rna|rn|rz.tf32.f32``: 10 explicit significand bits; the others become zero."""
    raw = x.view(U4)
    special = (raw & U4(0x7F800000)) == U4(0x7F800000)
    if mode == "rna":
        out = (raw + U4(0x1000)) & U4(0xFFFFE000)
    elif mode == "rn":
        out = (raw + (U4(0x0FFF) + ((raw >> U4(13)) & U4(1)))) & U4(0xFFFFE000)
    else:
        out = raw & U4(0xFFFFE000)
    if finite:
        overflow = (out & U4(0x7F800000)) == U4(0x7F800000)
        out = np.where(overflow, (raw & U4(0x80000000)) | U4(0x7F7FE000), out)
        special = np.isnan(x)
    out = np.where(special, np.where(np.isnan(x), U4(0x7FFFFFFF), raw), out)
    return np.where(np.signbit(x) & ~np.isnan(x), U4(0), out) if relu else out


@library
def convert_pack(a: Array, b: Array, target: str) -> Array:
    """``cvt.pack.sat.{u16,s16}.s32 d, a, b``: both clamped, a in the upper half."""
    return join_halves(int_to_int(a, target, True).view(U2), int_to_int(b, target, True).view(U2))


@library
def convert_pack_small(a: Array, b: Array, c: Array, target: str) -> Array:
    """``cvt.pack.sat.{u8,s8,u4,s4,u2,s2}.s32.b32 d, a, b, c``: a and b below the shifted c."""
    width = int(target[1:])
    signed = target[0] == "s"
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)
    mask = U4((1 << width) - 1)
    first, second = (np.clip(x, low, high).view(U4) & mask for x in (a, b))
    return (c << U4(2 * width)) | (first << U4(width)) | second


# --- emitters -------------------------------------------------------------------------------------


@pure("cvt", counter_class="convert")
def emit_cvt(e: Any) -> None:
    """``cvt{.rnd}{.ftz}{.relu}{.sat|.satfinite}.dtype.atype d, a{, b}`` (9.7.9.21)."""
    target, source = e.parts[-2], e.parts[-1]
    if target in ("f16x2", "bf16x2") and source == "f32":
        emit_to_pair(e, target[:-2])
    elif target == "tf32":
        mode = next(part for part in e.parts if part in _ROUNDINGS)
        flags = f"{'satfinite' in e.parts}, {'relu' in e.parts}"
        e.dst(f"round_tf32({e.src(1, 'f4')}, {mode!r}, {flags})", "u4")
    elif target[:-2] in FORMATS or target == "s2f6x2":
        emit_to_small(e, target, source)
    elif source[:-2] in FORMATS or source == "s2f6x2":
        emit_from_small(e, target[:-2], source[:-2])
    elif target in _INTEGERS and source in _INTEGERS:
        _emit_int_to_int(e, target, source)
    elif target in _INTEGERS and source in _FLOATS:
        mode = next((part for part in e.parts if part in _TO_INTEGRAL), "rni")
        _put(e, f"float_to_int({_float_source(e, source)}, {target!r}, {mode!r})", target)
    elif target in _FLOATS and source in _INTEGERS:
        expr = f"int_to_float({_int_source(e, source)}, {target!r}, {_mode(e)!r})"
        _put_float(e, expr, target)
    elif target in _FLOATS and source in _FLOATS:
        _emit_float_to_float(e, target, source)
    else:
        raise e.unsupported(f"conversion from .{source} to .{target}")


def _mode(e: Any) -> str:
    mode = next((part for part in e.parts if part in (*_ROUNDINGS, "rs")), "rn")
    if mode in ("rna", "rs"):
        raise e.unsupported(f"rounding .{mode} to this type")
    return mode


def _int_source(e: Any, source: str) -> str:
    """The integer source; a register wider than the type gives its low bits."""
    dtype = DTYPE[source]
    held = e.register_dtype(1)
    if held is None or held[1] == dtype[1]:
        return e.src(1, dtype)
    return f"{e.src(1, held)}.astype({dtype})"


def _float_source(e: Any, source: str) -> str:
    if source == "bf16":
        return f"bf16_to_f32({e.src(1, 'u2')})"
    text = e.src(1, DTYPE[source])
    return f"flush({text})" if "ftz" in e.parts and source == "f32" else text


def _put(e: Any, expr: str, target: str) -> None:
    """Assign an integer result; a register wider than the type gets it extended by its sign."""
    dtype = DTYPE[target]
    held = e.register_dtype(0)
    if held is None or held[1] == dtype[1]:
        e.dst(expr, dtype)
    else:
        wide = f"{dtype[0]}{held[1]}"
        e.dst(f"{expr}.astype({wide})", wide)


def _put_float(e: Any, expr: str, target: str) -> None:
    if target in ("f16", "bf16"):
        if target == "f16":
            expr = f"half_pattern({expr})"
        expr = clamped_half(e, expr, target)
        if "sat" in e.parts:
            expr = f"half_op('max', 'sat', {target!r}, {expr}, {e.constant(0, 'u2')})"
        e.dst(expr, "u2")
        return
    if "ftz" in e.parts and target == "f32":
        expr = f"flush({expr})"
    e.dst(f"saturate({expr})" if "sat" in e.parts else expr, DTYPE[target])


def _emit_int_to_int(e: Any, target: str, source: str) -> None:
    text = _int_source(e, source)
    if "sat" in e.parts:
        _put(e, f"int_to_int({text}, {target!r}, True)", target)
        return
    dtype = DTYPE[target]
    expr = text if dtype == DTYPE[source] else f"{text}.astype({dtype})"
    _put(e, expr, target)


def _emit_float_to_float(e: Any, target: str, source: str) -> None:
    text = _float_source(e, source)
    integral = next((part for part in e.parts if part in _TO_INTEGRAL), None)
    if integral is not None:
        text = f"round_integral({text}, {integral!r})"
        if target == source and target in ("f32", "f64"):
            _put_float(e, text, target)
            return
    if source == "bf16" and target == "f32":
        _put_float(e, text, target)
    else:
        _put_float(e, f"float_to_float({text}, {target!r}, {_mode(e)!r})", target)


@pure("cvt.pack", counter_class="convert")
def emit_cvt_pack(e: Any) -> None:
    """``cvt.pack.sat.type.s32{.b32} d, a, b{, c}`` (9.7.9.22)."""
    target = e.parts[3]
    a, b = e.src(1, "i4"), e.src(2, "i4")
    if len(e.operands) == 3:
        e.dst(f"convert_pack({a}, {b}, {target!r})", "u4")
    else:
        e.dst(f"convert_pack_small({a}, {b}, {e.src(3, 'u4')}, {target!r})", "u4")
