"""The canonical layouts of matrices in shared memory (PTX ISA 9.7.15.5.1, 9.7.16.3.3).

wgmma and tcgen05 describe an operand by where it starts, two strides and a swizzle; the formats of
their descriptors differ, the layouts do not. An operand is *K-major* if the elements of a row of A
(or of a column of B) are adjacent, *MN-major* if those of one k are.

Everything is in chunks of 16 bytes, which no layout takes apart: a chunk number is a byte offset in
the CTA's shared memory divided by 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cute_fa.sim.addresses import SHARED_BASE

if TYPE_CHECKING:
    from cute_fa.sim.wave import Wave

CHUNK = 16
CORE_ROWS = 8

Extent = tuple[int, int, bool]
"""First chunk of a matrix, the one behind its last, and whether all of them belong to it."""


class Placement(Protocol):
    """What a decoded descriptor says of an operand's place; in bytes.

    Attributes:
        start: address of the first element.
        leading, stride: the two offsets; which way they lead depends on the layout.
        base_offset: of the swizzle pattern, in units of 128 bytes.
        swizzle: bytes of the swizzle span, 0 for none; atom: bytes that it keeps together.
    """

    @property
    def start(self) -> int: ...
    @property
    def leading(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def base_offset(self) -> int: ...
    @property
    def swizzle(self) -> int | None: ...
    @property
    def atom(self) -> int: ...


@dataclass(frozen=True)
class OperandLayout:
    """How one instruction reads one operand.

    Attributes:
        rows: rows of A, or columns of B, in one CTA.
        depth: k extent in elements; chunks: the same in chunks of a K-major operand.
        per_chunk: elements in a chunk.
        transposed: MN-major.
    """

    rows: int
    depth: int
    chunks: int
    per_chunk: int
    transposed: bool


def k_major(d: Placement, rows: int, chunks: int) -> np.ndarray:
    """Chunk numbers ``(rows, chunks)`` of a K-major operand, ``chunks`` of them along k."""
    row = np.arange(rows)[:, None]
    along = np.arange(chunks)[None]
    step, pitch = (CHUNK, d.swizzle) if d.swizzle else (d.leading, CHUNK)
    offset = row % CORE_ROWS * pitch + row // CORE_ROWS * d.stride + along * step
    return _swizzled(d, d.start + offset)


def mn_major(d: Placement, rows: int, depth: int, per_chunk: int) -> np.ndarray:
    """Chunk numbers ``(depth, rows / per_chunk)`` of an MN-major operand."""
    k = np.arange(depth)[:, None]
    block = np.arange(-(-rows // per_chunk))[None]
    if d.swizzle:
        lines = CORE_ROWS * CHUNK // d.atom  # of a swizzle atom along k
        wide = d.swizzle // CHUNK
        offset = block % wide * CHUNK + block // wide * d.leading
        offset = offset + k % lines * d.swizzle + k // lines * d.stride
    else:
        offset = block * d.stride + k % CORE_ROWS * CHUNK + k // CORE_ROWS * d.leading
    return _swizzled(d, d.start + offset)


def _swizzled(d: Placement, addresses: np.ndarray) -> np.ndarray:
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


def chain(placements: Sequence[Placement], layout: OperandLayout) -> np.ndarray:
    """Chunks of the operands of several instructions, side by side along k.

    Returns:
        ``(rows, chunks n)``, or ``(depth n, rows / per_chunk)`` if transposed.
    """
    if layout.transposed:
        parts = [mn_major(d, layout.rows, layout.depth, layout.per_chunk) for d in placements]
        return np.concatenate(parts, axis=0)
    return np.concatenate([k_major(d, layout.rows, layout.chunks) for d in placements], axis=1)


def extent_of(chunks: np.ndarray) -> Extent:
    """The extent of a matrix."""
    first, stop = int(chunks.min()), int(chunks.max()) + 1
    return first, stop, np.unique(chunks).size == stop - first


def outside(wave: Wave, extent: Extent) -> str | None:
    """What to say of a matrix that does not lie in the CTA's shared memory; None if it does."""
    low, stop = extent[0] * CHUNK, extent[1] * CHUNK
    if low >= SHARED_BASE and stop <= wave.smem_end:
        return None
    return f"a matrix lies in bytes {low:#x} to {stop:#x}"
