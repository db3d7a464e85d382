"""wgmma shared-memory descriptors (PTX ISA 9.7.15.5.1).

A descriptor has, in units of 16 bytes, the start address (bits 0-13), the leading (16-29) and the
stride byte offset (32-45); bits 49-51 are the base offset of the swizzle pattern in units of 128
bytes, and bits 62-63 the swizzle. One instruction reads 32 bytes along k from each row, whatever
the element type. Where that is says :mod:`cute_fa.sim.canonical_layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cute_fa.sim.canonical_layouts import CHUNK, Extent, OperandLayout, chain, extent_of

K_BYTES = 32  # along k of one wgmma

_SPANS = (0, 128, 64, 32)  # bytes of the swizzle span by the descriptor's code


@dataclass(frozen=True)
class Descriptor:
    """A decoded matrix descriptor; all fields in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int

    @property
    def atom(self) -> int:
        """Bytes that the swizzle keeps together."""
        return 16

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


@lru_cache(maxsize=2048)
def chain_chunks(descriptors: tuple[int, ...], rows: int, transposed: bool) -> np.ndarray:
    """Chunks of the operands of several wgmmas, side by side along k.

    Returns:
        ``(rows, 2 n)``, or ``(16 n, rows / 8)`` if ``transposed``: 16-bit elements.
    """
    layout = OperandLayout(rows, 16, K_BYTES // CHUNK, 8, transposed)
    return chain([Descriptor.decode(bits) for bits in descriptors], layout)


@lru_cache(maxsize=2048)
def chain_extent(descriptors: tuple[int, ...], rows: int, transposed: bool) -> Extent:
    """Where the chunks of :func:`chain_chunks` lie."""
    return extent_of(chain_chunks(descriptors, rows, transposed))
