"""wgmma shared-memory descriptors, and where they put matrix elements (PTX ISA 9.7.15.5.1).

A descriptor has, in units of 16 bytes, the start address (bits 0-13), the leading (16-29) and the
stride byte offset (32-45); bits 49-51 are the base offset of the swizzle pattern in units of 128
bytes, and bits 62-63 the swizzle. One instruction reads 32 bytes along k from each row, whatever
the element type.

Everything is in chunks of 16 bytes, which no layout takes apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

K_BYTES = 32  # along k of one wgmma
CHUNK = 16
CORE_ROWS = 8

_SPANS = (0, 128, 64, 32)  # bytes of the swizzle span by the descriptor's code


@dataclass(frozen=True)
class Descriptor:
    """A decoded matrix descriptor; all fields in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        """Decode 64 bits."""
        return cls(
            start=(bits & 0x3FFF) << 4,
            leading=(bits >> 16 & 0x3FFF) << 4,
            stride=(bits >> 32 & 0x3FFF) << 4,
            base_offset=bits >> 49 & 7,
            swizzle=_SPANS[bits >> 62 & 3],
        )

    def encode(self) -> int:
        """Inverse of :meth:`decode`."""
        bits = self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return bits | self.base_offset << 49 | _SPANS.index(self.swizzle) << 62


@lru_cache(maxsize=8192)
def k_major_chunks(bits: int, rows: int) -> np.ndarray:
    """Chunk numbers ``(rows, 2)`` of an operand whose rows run along k."""
    d = Descriptor.decode(bits)
    row = np.arange(rows)[:, None]
    along = np.arange(K_BYTES // CHUNK)[None]
    step, pitch = (CHUNK, d.swizzle) if d.swizzle else (d.leading, CHUNK)
    offset = row % CORE_ROWS * pitch + row // CORE_ROWS * d.stride + along * step
    return _swizzle(d, offset)


@lru_cache(maxsize=8192)
def mn_major_chunks(bits: int, rows: int) -> np.ndarray:
    """Chunk numbers ``(16, rows / 8)`` of a 16-bit operand whose elements of one k are adjacent."""
    d = Descriptor.decode(bits)
    k = np.arange(16)[:, None]
    row = np.arange(0, rows, CORE_ROWS)[None]
    if d.swizzle:
        per_span = d.swizzle // 2
        offset = row % per_span * 2 + row // per_span * d.leading
        offset = offset + k % CORE_ROWS * d.swizzle + k // CORE_ROWS * d.stride
    else:
        offset = row // CORE_ROWS * d.stride
        offset = offset + k % CORE_ROWS * CHUNK + k // CORE_ROWS * d.leading
    return _swizzle(d, offset)


def _swizzle(d: Descriptor, offset: np.ndarray) -> np.ndarray:
    chunks = (d.start + offset) >> 4
    if d.swizzle:
        chunks ^= (chunks >> 3) - d.base_offset & (d.swizzle // CHUNK - 1)
    return chunks


@lru_cache(maxsize=2048)
def chain_extent(
    descriptors: tuple[int, ...], rows: int, transposed: bool
) -> tuple[int, int, bool]:
    """First chunk of :func:`chain_chunks`, the one behind the last, and whether all are read."""
    chunks = chain_chunks(descriptors, rows, transposed)
    first, stop = int(chunks.min()), int(chunks.max()) + 1
    return first, stop, np.unique(chunks).size == stop - first


@lru_cache(maxsize=2048)
def chain_chunks(descriptors: tuple[int, ...], rows: int, transposed: bool) -> np.ndarray:
    """Chunks of the operands of several wgmmas, side by side along k.

    Returns:
        ``(rows, 2 n)``, or ``(16 n, rows / 8)`` if ``transposed``.
    """
    if transposed:
        return np.concatenate([mn_major_chunks(bits, rows) for bits in descriptors], axis=0)
    return np.concatenate([k_major_chunks(bits, rows) for bits in descriptors], axis=1)
