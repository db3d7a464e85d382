"""Single- and double-precision arithmetic: PTX ISA section 9.7.3, with the packed ``.f32x2`` forms.

``add``, ``sub`` and ``mul`` without a rounding modifier round to nearest even and are not
contracted into fused operations (the ISA lets ptxas do so). The ``.approx`` functions are evaluated
to float32 accuracy, which is inside every error bound that the ISA states for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.rounding import flush
from cute_fa.sim.isa.types import DTYPE

Array = np.ndarray
F4, F8, U4 = np.float32, np.float64, np.uint32
FLOATS = ("f32", "f64")
_DIRECTED = ("rz", "rm", "rp")
_UFUNC = {"add": "add", "sub": "subtract", "mul": "multiply"}


# --- semantics ------------------------------------------------------------------------------------


@library
def max_number(a: Array, b: Array) -> Array:
    """``max``: the number if one operand is NaN; +0 is above -0 (9.7.3.12)."""
    return _fix_zeros(np.fmax(a, b), a, b, np.bitwise_and)


@library
def min_number(a: Array, b: Array) -> Array:
    """``min``: the number if one operand is NaN; -0 is below +0 (9.7.3.11)."""
    return _fix_zeros(np.fmin(a, b), a, b, np.bitwise_or)


@library
def max_nan(a: Array, b: Array) -> Array:
    """``max.NaN``: NaN if either operand is (9.7.3.12)."""
    return _canonical_nan(_fix_zeros(np.maximum(a, b), a, b, np.bitwise_and))


@library
def min_nan(a: Array, b: Array) -> Array:
    """``min.NaN``: NaN if either operand is (9.7.3.11)."""
    return _canonical_nan(_fix_zeros(np.minimum(a, b), a, b, np.bitwise_or))


def _fix_zeros(result: Array, a: Array, b: Array, join: Any) -> Array:
    """numpy does not order the zeros: where both operands are zero, join their sign bits."""
    zero = result == 0
    if not np.count_nonzero(zero):
        return result
    both = zero & (a == 0) & (b == 0)
    unsigned = np.dtype(f"u{result.dtype.itemsize}")
    signs = join(a.view(unsigned), b.view(unsigned)).view(result.dtype)
    return np.where(both, signs, result)


def _canonical_nan(x: Array) -> Array:
    if x.dtype.type is not F4:
        return x
    return np.where(np.isnan(x), U4(0x7FFFFFFF).view(F4), x)


@library
def xorsign(magnitude: Array, a: Array, b: Array) -> Array:
    """``.xorsign.abs``: the sign is the exclusive or of the operands' signs (9.7.3.11)."""
    return np.where(np.signbit(a) ^ np.signbit(b), -np.abs(magnitude), np.abs(magnitude))


@library
def exp2_approx(x: Array, ftz: bool) -> Array:
    """``ex2.approx{.ftz}.f32``: 2**x; float32-accurate where the ISA allows 2 ulp (9.7.3.21)."""
    result = np.exp2(x)
    return flush(result) if ftz else result


@library
def log2_approx(x: Array, ftz: bool) -> Array:
    """``lg2.approx{.ftz}.f32``: base-2 logarithm; negative numbers give NaN (9.7.3.20)."""
    return np.log2(flush(x) if ftz else x)


@library
def reciprocal(x: Array, ftz: bool) -> Array:
    """``rcp.approx{.ftz}.f32`` and ``rcp.rn``: 1/x, correctly rounded (9.7.3.13)."""
    if ftz:
        return flush(np.divide(F4(1), flush(x)))
    return np.divide(x.dtype.type(1), x)


@library
def reciprocal_sqrt(x: Array, ftz: bool) -> Array:
    """``rsqrt.approx{.ftz}``: 1/sqrt(x); -0 gives -inf (9.7.3.16)."""
    argument = flush(x) if ftz else x
    return (F8(1) / np.sqrt(argument, dtype=F8)).astype(x.dtype)


@library
def div_approx(a: Array, b: Array, ftz: bool) -> Array:
    """``div.approx.f32``: a * (1/b); 0 for a finite a when |b| is above 2**126 (9.7.3.8)."""
    if ftz:
        a, b = flush(a), flush(b)
    quotient = np.divide(a, b)
    huge = (np.abs(b) > F4(2.0**126)) & np.isfinite(b)
    lost = np.where(np.isinf(a), F4(np.nan), np.copysign(F4(0), quotient))
    quotient = np.where(huge, lost, quotient)
    return flush(quotient) if ftz else quotient


@library
def float_property(x: Array, what: str) -> Array:
    """``testp``: finite, infinite, number, notanumber, normal or subnormal (9.7.3.1)."""
    tiny = np.finfo(x.dtype).tiny
    size = np.abs(x)
    table = {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (size >= tiny),
        "subnormal": lambda: (size < tiny) & (size > 0),
    }
    return table[what]()


# --- emitters -------------------------------------------------------------------------------------


def rounding_of(e: Any) -> str:
    """The instruction's rounding modifier; rn if it has none."""
    for part in e.parts[1:]:
        if part in ("rn", "rz", "rm", "rp"):
            return part
    return "rn"


def _source(e: Any, index: int) -> str:
    """Operand ``index`` as the instruction's float type, flushed if it says ``.ftz``."""
    text = e.src(index, DTYPE[e.type])
    return f"flush({text})" if "ftz" in e.parts else text


def _finish(e: Any, expr: str, *, ufunc: bool = False) -> None:
    """Assign with the instruction's ``.ftz`` and ``.sat`` applied to the result."""
    if "ftz" in e.parts:
        expr, ufunc = f"flush({expr})", False
    if "sat" in e.parts:
        expr, ufunc = f"saturate({expr})", False
    e.dst(expr, DTYPE[e.type], ufunc=ufunc)


@pure("add", "sub", "mul", types=FLOATS, modifiers="rn rz rm rp ftz sat")
def emit_arithmetic(e: Any) -> None:
    """``add|sub|mul{.rnd}{.ftz}{.sat}.f32|f64 d, a, b`` (9.7.3.3 to 9.7.3.5)."""
    if e.parts[-2] in ("f16", "bf16"):
        raise e.unsupported("mixed-precision operand order")
    mode, op = rounding_of(e), e.parts[0]
    a, b = _source(e, 1), _source(e, 2)
    if mode == "rn":
        _finish(e, f"{_UFUNC[op]}({a}, {b})", ufunc=True)
        return
    if op == "sub":
        op, b = "add", f"negative({b})"
    _finish(e, f"{op}_{e.type}_directed({a}, {b}, {mode!r})")


@pure("fma", "mad", types=FLOATS, modifiers="rn rz rm rp ftz sat", counter_class="fma")
def emit_fma(e: Any) -> None:
    """``fma.rnd{.ftz}{.sat}.f32|f64 d, a, b, c``; ``mad`` is the same (9.7.3.6, 9.7.3.7)."""
    mode = rounding_of(e)
    a, b, c = _source(e, 1), _source(e, 2), _source(e, 3)
    e.count("fmas")
    if mode == "rn":
        _finish(e, f"fma_{e.type}({a}, {b}, {c})")
    elif e.type == "f32":
        _finish(e, f"fma_f32_directed({a}, {b}, {c}, {mode!r})")
    else:
        raise e.unsupported("directed rounding of fma.f64")


@pure("add", "sub", "mul", types=("f32x2",), modifiers="rn rz rm rp ftz")
def emit_packed(e: Any) -> None:
    """``add|sub|mul{.rnd}{.ftz}.f32x2 d, a, b``: both halves of 64-bit registers (9.7.3.3)."""
    mode, op = rounding_of(e), e.parts[0]
    a, b = _packed(e, 1), _packed(e, 2)
    if mode == "rn":
        expr = f"{_UFUNC[op]}({a}, {b})"
    else:
        if op == "sub":
            op, b = "add", f"negative({b})"
        expr = f"{op}_f32_directed({a}, {b}, {mode!r})"
    e.dst(f"{_packed_flush(e, expr)}.view(u8)", "u8")


@pure("fma", types=("f32x2",), modifiers="rn rz rm rp ftz", counter_class="fma")
def emit_packed_fma(e: Any) -> None:
    """``fma.rnd{.ftz}.f32x2 d, a, b, c`` (9.7.3.6)."""
    mode = rounding_of(e)
    arguments = f"{_packed(e, 1)}, {_packed(e, 2)}, {_packed(e, 3)}"
    e.count("fmas", 2)
    call = f"fma_f32({arguments})" if mode == "rn" else f"fma_f32_directed({arguments}, {mode!r})"
    e.dst(f"{_packed_flush(e, call)}.view(u8)", "u8")


def _packed(e: Any, index: int) -> str:
    """A 64-bit operand as float32 pairs along the last axis, ``(w, c, 64)``."""
    text = f"{e.full(index, 'u8')}.view(f4)"
    return f"flush({text})" if "ftz" in e.parts else text


def _packed_flush(e: Any, expr: str) -> str:
    return f"flush({expr})" if "ftz" in e.parts else expr


@pure("div", types=FLOATS, modifiers="approx full rn rz rm rp ftz")
def emit_div(e: Any) -> None:
    """``div.approx|full|rnd{.ftz}.f32``, ``div.rnd.f64`` (9.7.3.8)."""
    mode = rounding_of(e)
    a, b = _source(e, 1), _source(e, 2)
    if "approx" in e.parts:
        e.dst(f"div_approx({e.src(1, 'f4')}, {e.src(2, 'f4')}, {'ftz' in e.parts})", "f4")
    elif mode == "rn":
        _finish(e, f"divide({a}, {b})", ufunc=True)
    elif e.type == "f32":
        _finish(e, f"div_f32_directed({a}, {b}, {mode!r})")
    else:
        raise e.unsupported("directed rounding of div.f64")


@pure("rcp", types=FLOATS, modifiers="approx rn rz rm rp ftz", counter_class="mufu")
def emit_rcp(e: Any) -> None:
    """``rcp.approx|rnd{.ftz}.f32|f64 d, a`` (9.7.3.13)."""
    mode = rounding_of(e)
    x = e.src(1, DTYPE[e.type])
    if mode == "rn":
        e.dst(f"reciprocal({x}, {'ftz' in e.parts and e.type == 'f32'})", DTYPE[e.type])
    elif e.type == "f32":
        _finish(e, f"div_f32_directed({e.constant(0x3F800000, 'f4')}, {_source(e, 1)}, {mode!r})")
    else:
        raise e.unsupported("directed rounding of rcp.f64")


@pure("sqrt", types=FLOATS, modifiers="approx rn rz rm rp ftz", counter_class="mufu")
def emit_sqrt(e: Any) -> None:
    """``sqrt.approx|rnd{.ftz}.f32|f64 d, a`` (9.7.3.15)."""
    mode = rounding_of(e)
    if mode == "rn":
        _finish(e, f"sqrt({_source(e, 1)})", ufunc=True)
    elif e.type == "f32":
        _finish(e, f"sqrt_f32_directed({_source(e, 1)}, {mode!r})")
    else:
        raise e.unsupported("directed rounding of sqrt.f64")


@pure("rsqrt", types=FLOATS, modifiers="approx ftz", counter_class="mufu")
def emit_rsqrt(e: Any) -> None:
    """``rsqrt.approx{.ftz}.f32|f64 d, a`` (9.7.3.16)."""
    ftz = "ftz" in e.parts and e.type == "f32"
    e.dst(f"reciprocal_sqrt({e.src(1, DTYPE[e.type])}, {ftz})", DTYPE[e.type])


@pure("sin", "cos", types=("f32",), modifiers="approx ftz", counter_class="mufu")
def emit_trigonometric(e: Any) -> None:
    """``sin|cos.approx{.ftz}.f32 d, a`` (9.7.3.18, 9.7.3.19)."""
    _finish(e, f"{e.parts[0]}({_source(e, 1)})")


@pure("tanh", types=("f32",), modifiers="approx", counter_class="mufu")
def emit_tanh(e: Any) -> None:
    """``tanh.approx.f32 d, a`` (9.7.3.22)."""
    e.dst(f"tanh({e.src(1, 'f4')})", "f4", ufunc=True)


@pure("lg2", types=("f32",), modifiers="approx ftz", counter_class="mufu")
def emit_lg2(e: Any) -> None:
    """``lg2.approx{.ftz}.f32 d, a`` (9.7.3.20)."""
    e.dst(f"log2_approx({e.src(1, 'f4')}, {'ftz' in e.parts})", "f4")


@pure("ex2", types=("f32",), modifiers="approx ftz", counter_class="mufu")
def emit_ex2(e: Any) -> None:
    """``ex2.approx{.ftz}.f32 d, a`` (9.7.3.21)."""
    e.count("exponentials")
    e.dst(f"exp2_approx({e.src(1, 'f4')}, {'ftz' in e.parts})", "f4")


@pure("abs", types=FLOATS, modifiers="ftz")
def emit_abs(e: Any) -> None:
    """``abs{.ftz}.f32|f64 d, a`` (9.7.3.9)."""
    _finish(e, f"absolute({_source(e, 1)})", ufunc=True)


@pure("neg", types=FLOATS, modifiers="ftz")
def emit_neg(e: Any) -> None:
    """``neg{.ftz}.f32|f64 d, a`` (9.7.3.10)."""
    _finish(e, f"negative({_source(e, 1)})", ufunc=True)


@pure("copysign", types=FLOATS, modifiers="")
def emit_copysign(e: Any) -> None:
    """``copysign.f32|f64 d, a, b``: the sign of a, the magnitude of b (9.7.3.2)."""
    dtype = DTYPE[e.type]
    e.dst(f"copysign({e.src(2, dtype)}, {e.src(1, dtype)})", dtype, ufunc=True)


@pure("min", "max", types=FLOATS, modifiers="ftz NaN xorsign abs")
def emit_min_max(e: Any) -> None:
    """``min|max{.ftz}{.NaN}{.xorsign.abs}.f32 d, a, b`` and ``min|max{.ftz}{.NaN}{.abs}.f32 d, a,
    b, c`` (9.7.3.11, 9.7.3.12)."""
    function = f"{e.parts[0]}_{'nan' if 'NaN' in e.parts else 'number'}"
    sources = [_source(e, i) for i in range(1, len(e.operands))]
    given = sources
    if "abs" in e.parts:
        sources = [f"absolute({text})" for text in sources]
    expr = _fold(function, sources)
    if "xorsign" in e.parts:
        if len(given) != 2:
            raise e.unsupported(".xorsign of three operands")
        expr = f"xorsign({expr}, {given[0]}, {given[1]})"
    e.dst(expr, DTYPE[e.type])


def _fold(function: str, sources: list[str]) -> str:
    expr = f"{function}({sources[0]}, {sources[1]})"
    for further in sources[2:]:
        expr = f"{function}({expr}, {further})"
    return expr


@pure("testp", types=FLOATS)
def emit_testp(e: Any) -> None:
    """``testp.op.f32|f64 p, a`` (9.7.3.1)."""
    e.dst(f"float_property({e.src(1, DTYPE[e.type])}, {e.parts[1]!r})", "b1")
