"""tcgen05 shared-memory descriptors, and where they put matrix elements (PTX ISA 9.7.16.4.1).

A descriptor has, in units of 16 bytes, the start address (bits 0-13), the leading (16-29) and the
stride byte offset (32-45). Bits 46-48 are the constant 0b001, 49-51 the base offset of the swizzle
pattern in units of 128 bytes, 52 says that the leading dimension is an address instead of an
offset, 53-60 are zero, and 61-63 are the swizzle.

The canonical layouts (9.7.16.3.3) are those of wgmma, and one more: 128-byte swizzling whose atoms
are 32 bytes, with which the tensor core reads 32-bit elements along m or n. Everything is in chunks
of 16 bytes, which no layout takes apart. An operand is *K-major* if the elements of a row of A (or
of a column of B) are adjacent, *MN-major* if those of one k are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNK = 16
CORE_ROWS = 8
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
def k_major_chunks(bits: int, rows: int, depth: int = 2) -> np.ndarray:
    """Chunk numbers ``(rows, depth)`` of a K-major operand, ``depth`` chunks along k."""
    d = SharedDescriptor.decode(bits)
    row = np.arange(rows)[:, None]
    along = np.arange(depth)[None]
    step, pitch = (CHUNK, d.swizzle) if d.swizzle else (d.leading, CHUNK)
    offset = d.start + row % CORE_ROWS * pitch + row // CORE_ROWS * d.stride + along * step
    if d.absolute:  # what would leave the 128-byte line goes on in the second buffer
        line = d.start % 128 + along * CHUNK
        offset = np.where(line >= 128, offset - d.start + d.leading - (128 - d.start % 128), offset)
    return _swizzle(d, offset)


@lru_cache(maxsize=8192)
def mn_major_chunks(bits: int, rows: int, depth: int, per_chunk: int) -> np.ndarray:
    """Chunk numbers ``(depth, rows / per_chunk)`` of an MN-major operand.

    Args:
        depth: elements along k; per_chunk: elements in 16 bytes.
    """
    d = SharedDescriptor.decode(bits)
    k = np.arange(depth)[:, None]
    block = np.arange(-(-rows // per_chunk))[None]
    if d.swizzle:
        lines = CORE_ROWS * 16 // d.atom  # of a swizzle atom along k
        wide = d.swizzle // CHUNK
        offset = block % wide * CHUNK + block // wide * d.leading
        offset = offset + k % lines * d.swizzle + k // lines * d.stride
    else:
        offset = block * d.stride + k % CORE_ROWS * CHUNK + k // CORE_ROWS * d.leading
    return _swizzle(d, d.start + offset)


def _swizzle(d: SharedDescriptor, addresses: np.ndarray) -> np.ndarray:
    """Byte addresses to chunk numbers, swizzled on absolute address bits (5.5.7).

    16-byte atoms: bits 4 and up are exchanged with bits 7 and up. 32-byte atoms: bits 5-6 with
    bits 7-8, so that the pattern repeats every 512 bytes.
    """
    chunks = addresses >> 4
    if d.swizzle:
        line = (chunks >> 3) - d.base_offset
        if d.atom == 32:
            chunks ^= (line & 3) << 1
        else:
            chunks ^= line & (d.swizzle // CHUNK - 1)
    return chunks


@dataclass(frozen=True)
class OperandLayout:
    """How one instruction reads one operand from shared memory.

    Attributes:
        rows: rows of A, or columns of B, in one CTA.
        depth: k extent in elements; chunks: the same in 16-byte chunks of a K-major operand.
        per_chunk: elements in 16 bytes.
        transposed: MN-major.
    """

    rows: int
    depth: int
    chunks: int
    per_chunk: int
    transposed: bool


@lru_cache(maxsize=4096)
def chain_chunks(descriptors: tuple[int, ...], layout: OperandLayout) -> np.ndarray:
    """Chunks of the operands of several instructions, side by side along k.

    Returns:
        ``(rows, chunks n)``, or ``(depth n, rows / per_chunk)`` if transposed.
    """
    if layout.transposed:
        parts = [
            mn_major_chunks(bits, layout.rows, layout.depth, layout.per_chunk)
            for bits in descriptors
        ]
        return np.concatenate(parts, axis=0)
    parts = [k_major_chunks(bits, layout.rows, layout.chunks) for bits in descriptors]
    return np.concatenate(parts, axis=1)


@lru_cache(maxsize=4096)
def chain_extent(descriptors: tuple[int, ...], layout: OperandLayout) -> tuple[int, int, bool]:
    """First chunk of :func:`chain_chunks`, the one behind the last, and whether all are read."""
    chunks = chain_chunks(descriptors, layout)
    first, stop = int(chunks.min()), int(chunks.max()) + 1
    return first, stop, np.unique(chunks).size == stop - first
