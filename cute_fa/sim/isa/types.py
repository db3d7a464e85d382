"""PTX's fundamental types (ISA section 5.2) as numpy dtypes, and register classes by width."""

from __future__ import annotations

import numpy as np

DTYPE: dict[str, str] = {
    "pred": "b1",
    "b8": "u1",
    "u8": "u1",
    "s8": "i1",
    "b16": "u2",
    "u16": "u2",
    "s16": "i2",
    "f16": "f2",
    "bf16": "u2",  # numpy has no bfloat16: the upper half of a float32
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "f4",
    "f16x2": "u4",
    "bf16x2": "u4",
    "u16x2": "u4",
    "s16x2": "u4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "f8",
    "f32x2": "u8",
}
"""numpy dtype (kind and bytes) in which a value of each PTX type is held."""

NUMPY: dict[str, np.dtype] = {
    code: np.dtype("?" if code == "b1" else code) for code in set(DTYPE.values())
}
"""numpy's dtype objects by the codes above; predicates are bool."""

SIGNED = ("s16", "s32", "s64")
UNSIGNED = ("u16", "u32", "u64")
BITS = ("b16", "b32", "b64")
INTEGERS = SIGNED + UNSIGNED
PACKED_INTEGERS = ("u16x2", "s16x2")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def bits(type_name: str) -> int:
    """Width of a PTX type in bits (predicates: 1)."""
    if type_name == "pred":
        return 1
    if type_name == "b128":
        return 128
    return NUMPY[DTYPE[type_name]].itemsize * 8


def register_class(type_name: str) -> str:
    """Register file of a declared type: "p", "h" (16 bits), "r" (32), "d" (64) or "q" (128)."""
    name = type_name.lstrip(".")
    if name == "b8" or name in ("u8", "s8"):
        return "h"  # PTX allows 8-bit registers; they are kept in the 16-bit file
    return {1: "p", 16: "h", 32: "r", 64: "d", 128: "q"}[bits(name)]


CLASS_DTYPE = {"p": "b1", "h": "u2", "r": "u4", "d": "u8"}
"""The dtype in which each register file is stored."""
