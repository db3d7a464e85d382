"""tcgen05 shared-memory descriptors (PTX ISA 9.7.16.4.1).

A descriptor has, in units of 16 bytes, the start address (bits 0-13), the leading (16-29) and the
stride byte offset (32-45). Bits 46-48 are the constant 0b001, 49-51 the base offset of the swizzle
pattern in units of 128 bytes, 52 says that the leading dimension is an address instead of an
offset, 53-60 are zero, and 61-63 are the swizzle. The layouts are those of wgmma
(:mod:`cute_fa.sim.canonical_layouts`), and one more: 128-byte swizzling whose atoms are 32 bytes,
with which the tensor core reads 32-bit elements along m or n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cute_fa.sim.canonical_layouts import (
    Extent,
    OperandLayout,
    chain,
    extent_of,
    k_major,
)

LEADING_IS_ABSOLUTE = 1 << 52

_SWIZZLES = {0: (0, 16), 1: (128, 32), 2: (128, 16), 4: (64, 16), 6: (32, 16)}
_CODES = {swizzle: code for code, swizzle in _SWIZZLES.items()}
_VERSION = 0b001


@dataclass(frozen=True)
class SharedDescriptor:
    """A decoded descriptor; offsets in bytes.

    Attributes:
        swizzle: bytes of the swizzle span: 0, 32, 64 or 128; None for a code that is not defined.
        atom: bytes that the swizzle keeps together: 16 or 32.
        absolute: ``leading`` is the address of the second half of a 48-byte k extent.
        constants: bits 46-48 and bits 53-60, which have fixed values.
    """

    start: int
    leading: int
    stride: int
    base_offset: int = 0
    swizzle: int | None = 0
    atom: int = 16
    absolute: bool = False
    constants: tuple[int, int] = (_VERSION, 0)

    @classmethod
    def decode(cls, bits: int) -> SharedDescriptor:
        """Decode 64 bits."""
        swizzle, atom = _SWIZZLES.get(bits >> 61 & 7, (None, 16))
        return cls(
            start=(bits & 0x3FFF) << 4,
            leading=(bits >> 16 & 0x3FFF) << 4,
            stride=(bits >> 32 & 0x3FFF) << 4,
            base_offset=bits >> 49 & 7,
            swizzle=swizzle,
            atom=atom,
            absolute=bool(bits & LEADING_IS_ABSOLUTE),
            constants=(bits >> 46 & 7, bits >> 53 & 0xFF),
        )

    def encode(self) -> int:
        """Inverse of :meth:`decode`, for a swizzle that is defined."""
        assert self.swizzle is not None
        bits = self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        bits |= self.constants[0] << 46 | self.base_offset << 49 | self.absolute << 52
        return bits | self.constants[1] << 53 | _CODES[self.swizzle, self.atom] << 61

    def faults(self) -> list[str]:
        """What is wrong with the descriptor itself, whatever is read through it."""
        found = []
        if self.swizzle is None:
            found.append("a swizzling mode of 3, 5 or 7 (bits 61-63)")
        if self.constants[0] != _VERSION:
            found.append(f"bits 46-48 are {self.constants[0]:#05b} and must be 0b001")
        if self.constants[1]:
            found.append(f"bits 53-60 are {self.constants[1]:#x} and must be 0")
        if self.absolute and (self.swizzle, self.atom) != (128, 16):
            found.append("an absolute leading address without 128-byte swizzling of 16-byte atoms")
        if self.absolute and self.base_offset:
            found.append("an absolute leading address with a base offset")
        return found


@lru_cache(maxsize=8192)
def k_major_chunks(bits: int, rows: int, chunks: int) -> np.ndarray:
    """Chunk numbers ``(rows, chunks)`` of what a descriptor says is K-major."""
    return k_major(SharedDescriptor.decode(bits), rows, chunks)


@lru_cache(maxsize=4096)
def chain_chunks(descriptors: tuple[int, ...], layout: OperandLayout) -> np.ndarray:
    """Chunks of the operands of several instructions, side by side along k."""
    return chain([SharedDescriptor.decode(bits) for bits in descriptors], layout)


@lru_cache(maxsize=4096)
def chain_extent(descriptors: tuple[int, ...], layout: OperandLayout) -> Extent:
    """Where the chunks of :func:`chain_chunks` lie."""
    return extent_of(chain_chunks(descriptors, layout))
