"""What the modifiers of memory instructions say: state space, element size, vector length."""

from __future__ import annotations

import re
from functools import lru_cache

from cute_fa.ptx import Imm, Instr, Kernel

_TYPE = re.compile(r"(?:b|u|s|f|bf)(\d+)(x2)?")
_VECTOR = re.compile(r"v(\d)")

SPACES = ("shared", "global", "local", "param", "const")

STRONG = frozenset(("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio", "sc"))
"""Modifiers that make an access strong (PTX ISA 8.4): two such accesses never race."""


def element_bits(parts: tuple[str, ...]) -> int:
    """Bits of the instruction's type, which is the last modifier that names one.

    Raises:
        ValueError: no modifier is a type.
    """
    for part in reversed(parts):
        match = _TYPE.fullmatch(part)
        if match:
            return int(match[1]) * (2 if match[2] else 1)
    raise ValueError(f"no type among {'.'.join(parts)}")


def vector_length(parts: tuple[str, ...]) -> int:
    """Elements per thread: 1, 2, 4 or 8."""
    for part in parts:
        match = _VECTOR.fullmatch(part)
        if match:
            return int(match[1])
    return 1


def space_of(parts: tuple[str, ...]) -> str:
    """The state space: one of ``SPACES``, or "generic" where none is named."""
    for part in parts:
        name = part.partition("::")[0]
        if name in SPACES:
            return name
    return "generic"


def is_strong(instr: Instr) -> bool:
    """Whether the access is atomic, volatile or otherwise strong."""
    return instr.op in ("atom", "red") or not STRONG.isdisjoint(instr.parts)


@lru_cache(maxsize=64)
def has_shared_atomics(kernel: Kernel) -> bool:
    """Whether the kernel has atomics or reductions that may be on shared memory."""
    return any(
        instr.op in ("atom", "red")
        and "async" not in instr.parts
        and space_of(instr.parts) in ("shared", "generic")
        for instr in kernel.body
    )


def shared_access_bytes(instr: Instr) -> int | None:
    """Bytes that one thread's access to shared memory has; None if it cannot touch shared memory.

    Bulk copies and tensor-core reads of shared memory move multiples of 16 bytes.
    """
    parts = instr.parts
    if parts[:2] == ("st", "bulk"):
        return 8
    if instr.op in ("ld", "st", "atom", "red") and space_of(parts) in ("shared", "generic"):
        if "async" in parts:
            return element_bits(parts) // 8
        return element_bits(parts) // 8 * vector_length(parts)
    if instr.op in ("ldmatrix", "stmatrix"):
        return 16
    if instr.op == "mbarrier":
        return 8
    if parts[:2] == ("tcgen05", "alloc"):
        return 4
    if instr.op == "cp" and "async" in parts and len(instr.operands) >= 3:
        size = instr.operands[2]
        return size.value if "bulk" not in parts and isinstance(size, Imm) else 16
    return None
