"""Half-precision arithmetic: ``.f16``, ``.bf16`` and their packed forms, PTX ISA section 9.7.4, and
the mixed-precision ``add|sub|fma.f32.{f16,bf16}`` of 9.7.5.

Operands are widened to float32, where sums and products of 11-bit (8-bit) significands may be
rounded first without changing the result: float32 has more than twice as many bits plus two. Fused
multiply-adds go through float64 with the residue. bfloat16 values travel as uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cute_fa.sim.isa import floating, library, pure
from cute_fa.sim.isa.rounding import bf16_round, bf16_to_f32, to_bf16, to_f16, two_sum
from cute_fa.sim.isa.types import HALVES

Array = np.ndarray
F2, F4, F8, U2, U4 = np.float16, np.float32, np.float64, np.uint16, np.uint32
_F16_TINY = F4(2.0**-14)
_NAN = {"f16": U2(0x7FFF), "bf16": U2(0x7FFF)}


# --- semantics ------------------------------------------------------------------------------------


def widen(x: Array, kind: str) -> Array:
    """16-bit patterns (uint16) of ``f16`` or ``bf16`` as float32, exactly."""
    return x.view(F2).astype(F4) if kind == "f16" else bf16_to_f32(x)


def narrow(x: Array, kind: str) -> Array:
    """float32 rounded to nearest even ``f16`` or ``bf16``, as uint16; NaN becomes 0x7fff."""
    if kind == "bf16":
        return bf16_round(x.view(U4), "rn")
    out = x.astype(F2).view(U2)
    nan = np.isnan(x)
    return np.where(nan, _NAN[kind], out) if np.count_nonzero(nan) else out


def _flush16(x: Array, kind: str) -> Array:
    """``.ftz`` of f16: subnormals become zero of the same sign (float32 values)."""
    return x * (np.abs(x) >= _F16_TINY) if kind == "f16" else x


def _fma16(a: Array, b: Array, c: Array, kind: str) -> Array:
    """Fused multiply-add of float32-widened halves, rounded once; uint16."""
    total, residue = two_sum(np.multiply(a, b, dtype=F8), np.asarray(c, F8))
    if kind == "bf16":
        return to_bf16(total, residue, "rn")
    out = to_f16(total, residue, "rn").view(U2)
    nan = np.isnan(total)
    return np.where(nan, _NAN[kind], out) if np.count_nonzero(nan) else out


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": floating.min_number,
    "max": floating.max_number,
    "min.NaN": floating.min_nan,
    "max.NaN": floating.max_nan,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "ex2": np.exp2,
}


def _apply(operation: str, flags: str, kind: str, sources: tuple[Array, ...]) -> Array:
    """One half-precision operation on uint16 patterns; ``flags``: any of ftz, sat, relu."""
    values = [widen(x, kind) for x in sources]
    if "ftz" in flags:
        values = [_flush16(x, kind) for x in values]
    if operation == "fma":
        out = _fma16(values[0], values[1], values[2], kind)
    elif operation in _UNARY:
        out = narrow(_UNARY[operation](values[0]), kind)
    elif operation.endswith("xorsign"):
        magnitudes = [np.abs(x) for x in values]
        result = _BINARY[operation.removesuffix(".xorsign")](magnitudes[0], magnitudes[1])
        out = narrow(floating.xorsign(result, values[0], values[1]), kind)
    else:
        result = values[0]
        for value in values[1:]:
            result = _BINARY[operation](result, value)
        out = narrow(result, kind)
    if not flags:
        return out
    result = widen(out, kind)
    if "ftz" in flags:
        result = _flush16(result, kind)
    if "sat" in flags:
        result = np.fmin(np.fmax(result, F4(0)), F4(1)) + F4(0)
    if "relu" in flags:
        result = np.where(np.isnan(result), result, np.maximum(result, F4(0)) + F4(0))
    return narrow(result, kind)


@library
def half_op(operation: str, flags: str, kind: str, *sources: Array) -> Array:
    """``operation`` on ``f16`` or ``bf16`` patterns (uint16) (9.7.4)."""
    return _apply(operation, flags, kind, sources)


@library
def half2_op(operation: str, flags: str, kind: str, *sources: Array) -> Array:
    """``operation`` on both halves of packed ``f16x2`` or ``bf16x2`` words (uint32) (9.7.4)."""
    low = _apply(operation, flags, kind, tuple(x.astype(U2) for x in sources))
    high = _apply(operation, flags, kind, tuple((x >> U4(16)).astype(U2) for x in sources))
    return low.astype(U4) | (high.astype(U4) << U4(16))


@library
def widen_half(x: Array, kind: str) -> Array:
    """The exact float32 of 16-bit patterns (9.7.5)."""
    return widen(x, kind)


@library
def join_halves(high: Array, low: Array) -> Array:
    """Two uint16 patterns as one 32-bit word."""
    return low.astype(U4) | (high.astype(U4) << U4(16))


# --- emitters -------------------------------------------------------------------------------------


def _emit(e: Any, operation: str, count: int) -> None:
    packed = e.type.endswith("x2")
    kind, dtype = (e.type[:-2], "u4") if packed else (e.type, "u2")
    flags = ".".join(flag for flag in ("ftz", "sat", "relu") if flag in e.parts)
    sources = ", ".join(e.src(i, dtype) for i in range(1, count + 1))
    function = "half2_op" if packed else "half_op"
    e.dst(f"{function}({operation!r}, {flags!r}, {kind!r}, {sources})", dtype)


@pure("add", "sub", "mul", types=HALVES, modifiers="rn rz rm rp ftz sat f32")
def emit_arithmetic(e: Any) -> None:
    """``add|sub|mul{.rn}{.ftz}{.sat}.f16|f16x2|bf16|bf16x2 d, a, b`` (9.7.4.1 to 9.7.4.3).

    Also ``add|sub{.rnd}{.sat}.f32.f16|bf16 d, a, c``: a is widened, c and d are f32 (9.7.5.1, .2).
    """
    if e.parts[-2] != "f32":
        _emit(e, e.parts[0], 2)
        return
    a, c = f"widen_half({e.src(1, 'u2')}, {e.type!r})", e.src(2, "f4")
    mode = floating.rounding_of(e)
    if e.parts[0] == "mul":
        raise e.unsupported("PTX has no mixed-precision mul")
    if e.parts[0] == "sub":
        c = f"negative({c})"
    expr = f"add({a}, {c})" if mode == "rn" else f"add_f32_directed({a}, {c}, {mode!r})"
    e.dst(f"saturate({expr})" if "sat" in e.parts else expr, "f4")


@pure("fma", types=HALVES, modifiers="rn rz rm rp ftz sat relu f32", counter_class="fma")
def emit_fma(e: Any) -> None:
    """``fma.rn{.ftz}{.sat}{.relu}.f16|f16x2|bf16|bf16x2 d, a, b, c`` (9.7.4.4).

    Also ``fma.rnd{.sat}.f32.f16|bf16 d, a, b, c``: a and b are widened (9.7.5.3).
    """
    e.count("fmas", 2 if e.type.endswith("x2") else 1)
    if e.parts[-2] != "f32":
        _emit(e, "fma", 3)
        return
    a, b = (f"widen_half({e.src(i, 'u2')}, {e.type!r})" for i in (1, 2))
    mode = floating.rounding_of(e)
    if mode == "rn":
        expr = f"fma_f32({a}, {b}, {e.src(3, 'f4')})"
    else:
        expr = f"fma_f32_directed({a}, {b}, {e.src(3, 'f4')}, {mode!r})"
    e.dst(f"saturate({expr})" if "sat" in e.parts else expr, "f4")


@pure("min", "max", types=HALVES, modifiers="ftz NaN xorsign abs")
def emit_min_max(e: Any) -> None:
    """``min|max{.ftz}{.NaN}{.xorsign.abs}.f16… d, a, b{, c}`` (9.7.4.8, 9.7.4.9)."""
    operation = e.parts[0] + (".NaN" if "NaN" in e.parts else "")
    if "abs" in e.parts:
        if "xorsign" not in e.parts or len(e.operands) != 3:
            raise e.unsupported(".abs only goes with .xorsign, and with two operands")
        operation += ".xorsign"
    _emit(e, operation, len(e.operands) - 1)


@pure("neg", "abs", types=HALVES, modifiers="")
def emit_sign(e: Any) -> None:
    """``neg|abs.f16|f16x2|bf16|bf16x2 d, a``: acts on the sign bits (9.7.4.5, 9.7.4.6)."""
    packed = e.type.endswith("x2")
    dtype = "u4" if packed else "u2"
    sign = 0x80008000 if packed else 0x8000
    if "ftz" in e.parts:
        raise e.unsupported(".ftz")
    if e.parts[0] == "neg":
        e.dst(f"bitwise_xor({e.src(1, dtype)}, {e.constant(sign, dtype)})", dtype, ufunc=True)
    else:
        rest = sign ^ (0xFFFFFFFF if packed else 0xFFFF)
        e.dst(f"bitwise_and({e.src(1, dtype)}, {e.constant(rest, dtype)})", dtype, ufunc=True)


@pure("ex2", "tanh", types=HALVES, modifiers="approx ftz", counter_class="mufu")
def emit_function(e: Any) -> None:
    """``ex2.approx{.ftz}|tanh.approx.f16|f16x2|bf16|bf16x2 d, a`` (9.7.4.10, 9.7.4.11)."""
    if e.parts[0] == "ex2":
        e.count("exponentials", 2 if e.type.endswith("x2") else 1)
    _emit(e, e.parts[0], 1)
