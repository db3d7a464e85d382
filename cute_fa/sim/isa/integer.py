"""Integer arithmetic, PTX ISA section 9.7.1 and the carry forms of 9.7.2.

The functions with the :func:`~cute_fa.sim.isa.library` mark state the semantics over arrays; the
emitters below them connect PTX forms to those functions or to a numpy ufunc. Two's-complement
wrap-around is numpy's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.types import DTYPE, INTEGERS, PACKED_INTEGERS, bits

Array = np.ndarray
U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I2, I4, I8 = np.int16, np.int32, np.int64

_UFUNC = {"add": "add", "sub": "subtract", "min": "minimum", "max": "maximum"}
_LIMITS = {"i4": (-(2**31), 2**31 - 1)}


# --- semantics ------------------------------------------------------------------------------------


@library
def add_sat(a: Array, b: Array) -> Array:
    """``add.sat.s32``: clamp to the range instead of wrapping (9.7.1.1)."""
    return np.clip(a.astype(I8) + b, *_LIMITS["i4"]).astype(I4)


@library
def sub_sat(a: Array, b: Array) -> Array:
    """``sub.sat.s32``: clamp to the range instead of wrapping (9.7.1.2)."""
    return np.clip(a.astype(I8) - b, *_LIMITS["i4"]).astype(I4)


@library
def mul_wide(a: Array, b: Array) -> Array:
    """``mul.wide``: the whole product in twice the width (9.7.1.3)."""
    wide = {I2: I4, I4: I8, U2: U4, U4: U8}[a.dtype.type]
    return np.multiply(a, b, dtype=wide)


@library
def mul_hi(a: Array, b: Array) -> Array:
    """``mul.hi``: upper half of the double-width product (9.7.1.3)."""
    kind = a.dtype.type
    if kind in (U8, I8):
        return _mul_hi64(a, b)
    width = a.dtype.itemsize * 8
    return (mul_wide(a, b) >> mul_wide(a, b).dtype.type(width)).astype(kind)


def _mul_hi64(a: Array, b: Array) -> Array:
    """Schoolbook product of 32-bit halves; the signed case subtracts the sign corrections."""
    ua, ub = a.view(U8), b.view(U8)
    low, shift = U8(0xFFFFFFFF), U8(32)
    a0, a1, b0, b1 = ua & low, ua >> shift, ub & low, ub >> shift
    middle = a1 * b0 + ((a0 * b0) >> shift)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> shift) + (other >> shift)
    if a.dtype.type is U8:
        return high
    zero = U8(0)
    high = high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
    return high.view(I8)


@library
def mul24_lo(a: Array, b: Array) -> Array:
    """``mul24.lo``: low 32 bits of the product of the lower 24 bits (9.7.1.5)."""
    return _low24(a) * _low24(b)


@library
def mul24_hi(a: Array, b: Array) -> Array:
    """``mul24.hi``: bits 16 to 47 of that product (9.7.1.5)."""
    kind = a.dtype.type
    wide = I8 if kind is I4 else U8
    return ((_low24(a).astype(wide) * _low24(b).astype(wide)) >> wide(16)).astype(kind)


def _low24(x: Array) -> Array:
    shift = x.dtype.type(8)
    return (x << shift) >> shift


@library
def mad_hi_sat(a: Array, b: Array, c: Array) -> Array:
    """``mad.hi.sat.s32`` and ``mad24.hi.sat.s32``'s final addition (9.7.1.4)."""
    return add_sat(mul_hi(a, b), c)


@library
def sad(a: Array, b: Array, c: Array) -> Array:
    """``sad``: c + |a - b|, the difference taken without overflow (9.7.1.7)."""
    larger = np.where(a < b, b, a)
    smaller = np.where(a < b, a, b)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return (c.view(unsigned) + (larger.view(unsigned) - smaller.view(unsigned))).view(a.dtype)


@library
def idiv(a: Array, b: Array) -> Array:
    """``div`` on integers: truncates toward zero; division by zero gives all ones (9.7.1.8).

    The ISA leaves division by zero unspecified; all ones is what GPUs return for it.
    """
    quotient = _magnitude(a) // _divisor(b)
    if a.dtype.kind == "i":
        quotient = np.where((a < 0) ^ (b < 0), np.zeros_like(quotient) - quotient, quotient)
    ones = ~quotient.dtype.type(0)
    return np.where(b == 0, ones, quotient).view(a.dtype)


@library
def irem(a: Array, b: Array) -> Array:
    """``rem``: remainder with the dividend's sign; by zero it gives the dividend (9.7.1.9)."""
    rest = _magnitude(a) % _divisor(b)
    if a.dtype.kind == "i":
        rest = np.where(a < 0, np.zeros_like(rest) - rest, rest)
    return np.where(b == 0, a, rest.view(a.dtype))


def _divisor(b: Array) -> Array:
    """|b|, or 1 where b is 0 (the result is replaced there)."""
    return np.where(b == 0, _unsigned(b).type(1), _magnitude(b))


def _unsigned(x: Array) -> np.dtype:
    return np.dtype(f"u{x.dtype.itemsize}")


def _magnitude(x: Array) -> Array:
    """|x| in the unsigned type of the same width, right for the most negative number too."""
    raw = x.view(_unsigned(x))
    return raw if x.dtype.kind == "u" else np.where(x < 0, np.zeros_like(raw) - raw, raw)


@library
def iabs(a: Array) -> Array:
    """``abs`` on integers; the most negative number stays itself (9.7.1.10)."""
    return np.where(a < 0, np.zeros_like(a) - a, a)


@library
def max_relu(a: Array, b: Array) -> Array:
    """``max.relu``: maximum, not below zero (9.7.1.13)."""
    return np.maximum(np.maximum(a, b), a.dtype.type(0))


@library
def min_relu(a: Array, b: Array) -> Array:
    """``min.relu``: minimum, not below zero (9.7.1.12)."""
    return np.maximum(np.minimum(a, b), a.dtype.type(0))


@library
def pairwise(a: Array, b: Array, operation: str, kind: str) -> Array:
    """Apply an integer operation to both 16-bit halves of 32-bit words (``.u16x2``, ``.s16x2``)."""
    dtype = I2 if kind == "s16x2" else U2
    mask, shift = U4(0xFFFF), U4(16)
    function = _PAIR_FUNCTIONS[operation]
    low = function(a.astype(U2).view(dtype), b.astype(U2).view(dtype))
    high = function(
        (a >> shift).astype(U2).view(dtype),
        (b >> shift).astype(U2).view(dtype),
    )
    return (low.view(U2).astype(U4) & mask) | (high.view(U2).astype(U4) << shift)


_PAIR_FUNCTIONS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "min.relu": min_relu,
    "max.relu": max_relu,
}


@library
def carry_of_sum(a: Array, b: Array, total: Array) -> Array:
    """Carry out of an unsigned ``a + b`` whose wrapped sum is ``total``."""
    return total < a


@library
def add_carry(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    """``addc``: a + b + carry and the carry out (9.7.2.2); unsigned arrays."""
    partial = a + b
    total = partial + carry.astype(a.dtype)
    return total, (partial < a) | (total < partial)


@library
def sub_borrow(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    """``subc``: a - (b + borrow) and the borrow out (9.7.2.4); unsigned arrays."""
    partial = a - b
    total = partial - borrow.astype(a.dtype)
    return total, (a < b) | (partial < borrow.astype(a.dtype))


@library
def dot_bytes(a: Array, b: Array, c: Array, types: str) -> Array:
    """``dp4a``: c + the dot product of four bytes (9.7.1.23); ``types`` as "u32.s32"."""
    total = c.astype(I8)
    type_a, type_b = types.split(".")
    for byte in range(4):
        total = total + _byte(a, byte, type_a) * _byte(b, byte, type_b)
    return total.astype(U8).astype(U4)


@library
def dot_pairs(a: Array, b: Array, c: Array, types: str, upper: bool) -> Array:
    """``dp2a``: c + the dot product of two 16-bit halves with two bytes (9.7.1.24)."""
    total = c.astype(I8)
    type_a, type_b = types.split(".")
    for item in range(2):
        half = (a >> U4(16 * item)).astype(U2)
        signed = half.view(I2) if type_a == "s32" else half
        total = total + signed.astype(I8) * _byte(b, item + (2 if upper else 0), type_b)
    return total.astype(U8).astype(U4)


def _byte(x: Array, index: int, type_name: str) -> Array:
    raw = (x >> U4(8 * index)).astype(U1)
    return (raw.view(np.int8) if type_name == "s32" else raw).astype(I8)


# --- emitters -------------------------------------------------------------------------------------


@pure("add", "sub", types=INTEGERS, modifiers="sat cc")
def emit_add_sub(e: Any) -> None:
    """``add|sub{.sat}{.cc}.type d, a, b`` (9.7.1.1, 9.7.1.2; .cc 9.7.2.1, 9.7.2.3)."""
    op = e.parts[0]
    dtype = DTYPE[e.type]
    if "sat" in e.parts:
        e.dst(f"{op}_sat({e.src(1, 'i4')}, {e.src(2, 'i4')})", "i4")
    elif "cc" in e.parts:
        code = f"u{bits(e.type) // 8}"
        a, b = e.src(1, code), e.src(2, code)
        if op == "add":
            total = e.dst(f"add({a}, {b})", code)
            e.set_carry(f"carry_of_sum({a}, {b}, {total})")
        else:
            e.dst(f"subtract({a}, {b})", code)
            e.set_carry(f"less({a}, {b})")
    else:
        e.dst(f"{_UFUNC[op]}({e.src(1, dtype)}, {e.src(2, dtype)})", dtype, ufunc=True)


@pure("addc", "subc", types=INTEGERS, modifiers="cc")
def emit_add_sub_carry(e: Any) -> None:
    """``addc|subc{.cc}.type d, a, b`` (9.7.2.2, 9.7.2.4)."""
    code = f"u{bits(e.type) // 8}"
    function = "add_carry" if e.parts[0] == "addc" else "sub_borrow"
    both = e.let(f"{function}({e.src(1, code)}, {e.src(2, code)}, {e.carry()})")
    e.dst(f"{both}[0]", code)
    if "cc" in e.parts:
        e.set_carry(f"{both}[1]")


@pure("mul", types=INTEGERS, modifiers="lo hi wide")
def emit_mul(e: Any) -> None:
    """``mul.lo|hi|wide.type d, a, b`` (9.7.1.3)."""
    dtype = DTYPE[e.type]
    a, b = e.src(1, dtype), e.src(2, dtype)
    if "lo" in e.parts:
        e.dst(f"multiply({a}, {b})", dtype, ufunc=True)
    elif "hi" in e.parts:
        e.dst(f"mul_hi({a}, {b})", dtype)
    elif "wide" in e.parts:
        e.dst(f"mul_wide({a}, {b})", f"{dtype[0]}{2 * int(dtype[1])}")
    else:
        raise e.unsupported("integer mul needs .lo, .hi or .wide")


@pure("mad", types=INTEGERS, modifiers="lo hi wide sat cc")
def emit_mad(e: Any) -> None:
    """``mad.lo|hi|wide{.sat}{.cc}.type d, a, b, c`` (9.7.1.4, 9.7.2.5)."""
    dtype = DTYPE[e.type]
    a, b = e.src(1, dtype), e.src(2, dtype)
    if "cc" in e.parts:
        _emit_mad_carry(e, a, b, None)
    elif "sat" in e.parts:
        e.dst(f"mad_hi_sat({a}, {b}, {e.src(3, dtype)})", dtype)
    elif "lo" in e.parts:
        e.dst(f"add(multiply({a}, {b}), {e.src(3, dtype)})", dtype, ufunc=True)
    elif "hi" in e.parts:
        e.dst(f"add(mul_hi({a}, {b}), {e.src(3, dtype)})", dtype, ufunc=True)
    elif "wide" in e.parts:
        wide = f"{dtype[0]}{2 * int(dtype[1])}"
        e.dst(f"add(mul_wide({a}, {b}), {e.src(3, wide)})", wide, ufunc=True)
    else:
        raise e.unsupported("mad needs .lo, .hi or .wide")


@pure("madc", types=INTEGERS, modifiers="lo hi cc")
def emit_madc(e: Any) -> None:
    """``madc.lo|hi{.cc}.type d, a, b, c``: with the carry in (9.7.2.6)."""
    dtype = DTYPE[e.type]
    _emit_mad_carry(e, e.src(1, dtype), e.src(2, dtype), e.carry())


def _emit_mad_carry(e: Any, a: str, b: str, carry: str | None) -> None:
    dtype = DTYPE[e.type]
    code = f"u{dtype[1]}"
    product = f"multiply({a}, {b})" if "lo" in e.parts else f"mul_hi({a}, {b})"
    raw = e.let(f"{product}.view({code})")
    carry_in = carry if carry is not None else e.constant(0, "b1")
    both = e.let(f"add_carry({raw}, {e.src(3, code)}, {carry_in})")
    e.dst(f"{both}[0]", code)
    if "cc" in e.parts:
        e.set_carry(f"{both}[1]")


@pure("mul24", types=("u32", "s32"), modifiers="lo hi")
def emit_mul24(e: Any) -> None:
    """``mul24.lo|hi.type d, a, b`` (9.7.1.5)."""
    dtype = DTYPE[e.type]
    e.dst(f"mul24_{e.parts[1]}({e.src(1, dtype)}, {e.src(2, dtype)})", dtype)


@pure("mad24", types=("u32", "s32"), modifiers="lo hi sat")
def emit_mad24(e: Any) -> None:
    """``mad24.lo|hi{.sat}.type d, a, b, c`` (9.7.1.6)."""
    dtype = DTYPE[e.type]
    product = f"mul24_{e.parts[1]}({e.src(1, dtype)}, {e.src(2, dtype)})"
    if "sat" in e.parts:
        e.dst(f"add_sat({product}, {e.src(3, dtype)})", dtype)
    else:
        e.dst(f"add({product}, {e.src(3, dtype)})", dtype, ufunc=True)


@pure("sad", types=INTEGERS, modifiers="")
def emit_sad(e: Any) -> None:
    """``sad.type d, a, b, c`` (9.7.1.7)."""
    dtype = DTYPE[e.type]
    e.dst(f"sad({e.src(1, dtype)}, {e.src(2, dtype)}, {e.src(3, dtype)})", dtype)


@pure("div", types=INTEGERS, modifiers="")
def emit_div(e: Any) -> None:
    """``div.type d, a, b`` (9.7.1.8)."""
    dtype = DTYPE[e.type]
    e.dst(f"idiv({e.src(1, dtype)}, {e.src(2, dtype)})", dtype)


@pure("rem", types=INTEGERS, modifiers="")
def emit_rem(e: Any) -> None:
    """``rem.type d, a, b`` (9.7.1.9)."""
    dtype = DTYPE[e.type]
    e.dst(f"irem({e.src(1, dtype)}, {e.src(2, dtype)})", dtype)


@pure("abs", types=("s16", "s32", "s64"), modifiers="")
def emit_abs(e: Any) -> None:
    """``abs.type d, a`` (9.7.1.10)."""
    dtype = DTYPE[e.type]
    e.dst(f"iabs({e.src(1, dtype)})", dtype)


@pure("neg", types=("s16", "s32", "s64"), modifiers="")
def emit_neg(e: Any) -> None:
    """``neg.type d, a`` (9.7.1.11)."""
    dtype = DTYPE[e.type]
    e.dst(f"negative({e.src(1, dtype)})", dtype, ufunc=True)


@pure("min", "max", types=INTEGERS, modifiers="relu")
def emit_min_max(e: Any) -> None:
    """``min|max{.relu}.type d, a, b`` (9.7.1.12, 9.7.1.13)."""
    dtype = DTYPE[e.type]
    if len(e.operands) != 3:
        raise e.unsupported("PTX has no integer minimum or maximum of three operands")
    a, b = e.src(1, dtype), e.src(2, dtype)
    if "relu" in e.parts:
        e.dst(f"{e.parts[0]}_relu({a}, {b})", dtype)
    else:
        e.dst(f"{_UFUNC[e.parts[0]]}({a}, {b})", dtype, ufunc=True)


@pure("add", "sub", "min", "max", types=PACKED_INTEGERS, modifiers="relu")
def emit_packed(e: Any) -> None:
    """``add|sub|min|max{.relu}.{u,s}16x2 d, a, b``: both halves (9.7.1.1, 9.7.1.12, 9.7.1.13)."""
    name = e.parts[0] + (".relu" if "relu" in e.parts else "")
    e.dst(f"pairwise({e.src(1, 'u4')}, {e.src(2, 'u4')}, {name!r}, {e.type!r})", "u4")


@pure("dp4a")
def emit_dp4a(e: Any) -> None:
    """``dp4a.atype.btype d, a, b, c`` (9.7.1.23)."""
    dtype = "u4" if e.parts[1:] == ("u32", "u32") else "i4"
    types = ".".join(e.parts[1:])
    call = f"dot_bytes({e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, dtype)}, {types!r})"
    e.dst(call, "u4")


@pure("dp2a")
def emit_dp2a(e: Any) -> None:
    """``dp2a.lo|hi.atype.btype d, a, b, c`` (9.7.1.24)."""
    mode, *types = e.parts[1:]
    dtype = "u4" if types == ["u32", "u32"] else "i4"
    arguments = f"{e.src(1, 'u4')}, {e.src(2, 'u4')}, {e.src(3, dtype)}"
    e.dst(f"dot_pairs({arguments}, {'.'.join(types)!r}, {mode == 'hi'})", "u4")
