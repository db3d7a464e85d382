"""Comparison and selection: PTX ISA sections 9.7.6 (``set``, ``setp``, ``selp``, ``slct``) and
9.7.7 (half precision).

Ordered comparisons are false if an operand is NaN, the forms that end in ``u`` are true.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa.sim.isa import library, pure
from cute_fa.sim.isa.half import widen
from cute_fa.sim.isa.types import DTYPE

Array = np.ndarray
U4 = np.uint32

_PLAIN = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_UNSIGNED = {"lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal"}
# The complement of each: a "ltu" b is not (a >= b).
_UNORDERED = {
    "ltu": "greater_equal",
    "leu": "greater",
    "gtu": "less_equal",
    "geu": "less",
}
_JOIN = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
_FLOAT_TYPES = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


# --- semantics ------------------------------------------------------------------------------------


@library
def compare_equal_unordered(a: Array, b: Array) -> Array:
    """``equ``: equal, or either is NaN (9.7.6, "unordered comparisons")."""
    return (a == b) | np.isnan(a) | np.isnan(b)


@library
def compare_not_equal_ordered(a: Array, b: Array) -> Array:
    """``ne`` on floats: different and neither is NaN (numpy's != is true for NaN)."""
    return (a < b) | (a > b)


@library
def compare_numbers(a: Array, b: Array) -> Array:
    """``num``: neither is NaN."""
    return ~(np.isnan(a) | np.isnan(b))


@library
def compare_nan(a: Array, b: Array) -> Array:
    """``nan``: at least one is NaN."""
    return np.isnan(a) | np.isnan(b)


@library
def half_values(x: Array, kind: str) -> Array:
    """16-bit patterns as float32 for a comparison."""
    return widen(x, kind)


@library
def low_half(x: Array) -> Array:
    """Bits 0 to 15 of 32-bit words, as uint16."""
    return x.astype(np.uint16)


@library
def high_half(x: Array) -> Array:
    """Bits 16 to 31 of 32-bit words, as uint16."""
    return (x >> U4(16)).astype(np.uint16)


@library
def select_by_sign(a: Array, b: Array, c: Array) -> Array:
    """``slct``: a where c >= 0, b elsewhere, NaN included (9.7.6.4)."""
    return np.where(c >= 0, a, b)


# --- emitters -------------------------------------------------------------------------------------


def comparison(e: Any, op: str, a: str, b: str, *, is_float: bool) -> str:
    """Expression of ``a op b``."""
    if op in _UNSIGNED:
        return f"{_UNSIGNED[op]}({a}, {b})"
    if not is_float:
        if op not in _PLAIN:
            raise e.unsupported(f"comparison .{op} on integers")
        return f"{_PLAIN[op]}({a}, {b})"
    if op == "ne":
        return f"compare_not_equal_ordered({a}, {b})"
    if op in _PLAIN:
        return f"{_PLAIN[op]}({a}, {b})"
    if op == "equ":
        return f"compare_equal_unordered({a}, {b})"
    if op == "neu":
        return f"not_equal({a}, {b})"
    if op in _UNORDERED:
        return f"invert({_UNORDERED[op]}({a}, {b}))"
    if op in ("num", "nan"):
        return f"compare_{'numbers' if op == 'num' else 'nan'}({a}, {b})"
    raise e.unsupported(f"comparison .{op}")


def _operands(e: Any, kind: str) -> tuple[str, str]:
    texts = []
    for index in (1, 2):
        text = e.src(index, DTYPE[kind])
        if kind in ("f16", "bf16"):
            text = f"half_values({e.src(index, 'u2')}, {kind!r})"
        elif "ftz" in e.parts and kind == "f32":
            text = f"flush({text})"
        texts.append(text)
    return texts[0], texts[1]


@pure("setp")
def emit_setp(e: Any) -> None:
    """``setp.cmp{.boolop}{.ftz}.type p{|q}, a, b{, {!}c}`` (9.7.6.2, 9.7.7.2).

    p = (a cmp b) boolop c and q = !(a cmp b) boolop c; for f16x2 and bf16x2 p is the low half's
    result and q the high half's.
    """
    if e.type in ("f16x2", "bf16x2"):
        _emit_setp_pair(e)
        return
    a, b = _operands(e, e.type)
    expr = comparison(e, e.parts[1], a, b, is_float=e.type in _FLOAT_TYPES)
    join = _JOIN.get(e.parts[2])
    first, second = e.destination_pair()
    if join is None and second is None:
        e.dst(expr, "b1", operand=first, ufunc=expr.split("(")[0] in _PLAIN.values())
        return
    result = e.let(expr)
    inverse = f"invert({result})"
    if join is not None:
        other = e.src(3, "b1")
        result, inverse = f"{join}({result}, {other})", f"{join}({inverse}, {other})"
    if second is not None:
        inverse = e.let(inverse)
    e.dst(result, "b1", operand=first)
    if second is not None:
        e.dst(inverse, "b1", operand=second)


def _emit_setp_pair(e: Any) -> None:
    kind = e.type[:-2]
    join = _JOIN.get(e.parts[2])
    first, second = e.destination_pair()
    results = []
    for half in ("low_half", "high_half"):
        a, b = (f"half_values({half}({e.src(i, 'u4')}), {kind!r})" for i in (1, 2))
        expr = comparison(e, e.parts[1], a, b, is_float=True)
        results.append(e.let(f"{join}({expr}, {e.src(3, 'b1')})" if join else expr))
    e.dst(results[0], "b1", operand=first)
    if second is not None:
        e.dst(results[1], "b1", operand=second)


@pure("set")
def emit_set(e: Any) -> None:
    """``set.cmp{.boolop}{.ftz}.dtype.stype d, a, b{, {!}c}`` (9.7.6.1, 9.7.7.1).

    True is all ones for integer results and 1.0 for floating-point ones.
    """
    result_type, source_type = e.parts[-2], e.parts[-1]
    join = _JOIN.get(e.parts[2])
    if source_type in ("f16x2", "bf16x2"):
        _emit_set_pair(e, result_type, source_type[:-2], join)
        return
    a, b = _operands(e, source_type)
    expr = comparison(e, e.parts[1], a, b, is_float=source_type in _FLOAT_TYPES)
    if join:
        expr = f"{join}({expr}, {e.src(3, 'b1')})"
    code, true = _TRUTH[result_type]
    e.dst(f"where({expr}, {e.constant(true, code)}, {e.constant(0, code)})", code)


_TRUTH = {
    "u32": ("u4", 0xFFFFFFFF),
    "s32": ("u4", 0xFFFFFFFF),
    "f32": ("u4", 0x3F800000),
    "u16": ("u2", 0xFFFF),
    "s16": ("u2", 0xFFFF),
    "f16": ("u2", 0x3C00),
    "bf16": ("u2", 0x3F80),
}


def _emit_set_pair(e: Any, result_type: str, kind: str, join: str | None) -> None:
    true = 0xFFFF if result_type not in ("f16x2", "bf16x2") else _TRUTH[result_type[:-2]][1]
    words = []
    for half, shift in (("low_half", 0), ("high_half", 16)):
        a, b = (f"half_values({half}({e.src(i, 'u4')}), {kind!r})" for i in (1, 2))
        expr = comparison(e, e.parts[1], a, b, is_float=True)
        if join:
            expr = f"{join}({expr}, {e.src(3, 'b1')})"
        words.append(f"where({expr}, {e.constant(true << shift, 'u4')}, {e.constant(0, 'u4')})")
    e.dst(f"bitwise_or({words[0]}, {words[1]})", "u4")


@pure("selp")
def emit_selp(e: Any) -> None:
    """``selp.type d, a, b, c``: a where the predicate c holds, else b (9.7.6.3)."""
    dtype = DTYPE[e.type]
    e.dst(f"where({e.src(3, 'b1')}, {e.src(1, dtype)}, {e.src(2, dtype)})", dtype)


@pure("slct")
def emit_slct(e: Any) -> None:
    """``slct{.ftz}.dtype.ctype d, a, b, c``: a where c >= 0, else b (9.7.6.4)."""
    dtype = DTYPE[e.parts[-2]]
    control = e.src(3, DTYPE[e.type])
    if "ftz" in e.parts:
        control = f"flush({control})"
    e.dst(f"select_by_sign({e.src(1, dtype)}, {e.src(2, dtype)}, {control})", dtype)
