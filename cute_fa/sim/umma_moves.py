"""``tcgen05.cp`` and ``tcgen05.shift`` on the tensor core (PTX ISA 9.7.16.9).

**Copies** read rows of 16 or 32 bytes from shared memory, laid out as a K-major operand of that
width, and write row r to a lane of its own, or to several lanes. The ISA has no figure for the
lanes; they are those that programs rely on. With decompression, 16 elements of 4 or 6 bits, packed
from the low bits up and padded to 16 bytes, become 16 bytes: 6-bit elements in bits 0 to 5, 4-bit
elements in bits 2 to 5, where the matrix unit expects e2m1.

**Shifts** move 32 bytes of each lane to the lane below, in each quarter of the lanes for itself;
the last lane of a quarter keeps what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim.addresses import SHARED_BASE
from cute_fa.sim.async_shadow import AsyncShadow, report_warp
from cute_fa.sim.canonical_layouts import CHUNK
from cute_fa.sim.memory import WORDS
from cute_fa.sim.tensor_memory import LANES, Area, TensorMemory
from cute_fa.sim.tensor_pieces import QUARTER_LANES
from cute_fa.sim.umma_descriptors import k_major_chunks
from cute_fa.sim.umma_queue import Commit, Operation

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

SHIFT_COLUMNS = 8  # 32 bytes


@dataclass(frozen=True)
class CopyShape:
    """A shape and multicast of ``tcgen05.cp``.

    Attributes:
        rows: rows in shared memory; chunks: 16-byte chunks of each.
        lanes: for each row the lanes that receive it, ``(rows, copies)``, from the address on.
    """

    rows: int
    chunks: int
    lanes: tuple[tuple[int, ...], ...]


def _shapes() -> dict[str, CopyShape]:
    def consecutive(rows: int, chunks: int) -> CopyShape:
        return CopyShape(rows, chunks, tuple((row,) for row in range(rows)))

    halves = tuple((row, row + 64) for row in range(64))
    neighbours = tuple((row + row // 32 * 32, row + row // 32 * 32 + 32) for row in range(64))
    return {
        "128x256b": consecutive(128, 2),
        "128x128b": consecutive(128, 1),
        "4x256b": CopyShape(4, 2, tuple((QUARTER_LANES * row,) for row in range(4))),
        "64x128b.warpx2::02_13": CopyShape(64, 1, halves),
        "64x128b.warpx2::01_23": CopyShape(64, 1, neighbours),
        "32x128b.warpx4": CopyShape(
            32, 1, tuple(tuple(row + 32 * warp for warp in range(4)) for row in range(32))
        ),
    }


COPY_SHAPES = _shapes()


def decompress(chunks: np.ndarray, source: str) -> np.ndarray:
    """``.b8x16.b4x16_p64`` and ``.b8x16.b6x16_p32`` on chunks of 16 bytes.

    Args:
        chunks: uint8 ``(…, 16)``.
        source: ``b4x16_p64`` or ``b6x16_p32``.
    """
    if source == "b4x16_p64":
        packed = chunks[..., :8, None] >> np.array([0, 4], np.uint8) & np.uint8(15)
        return packed.reshape(chunks.shape) << np.uint8(2)
    triples = chunks[..., :12].reshape(*chunks.shape[:-1], 4, 3).astype(np.uint32)
    words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    codes = words[..., None] >> np.array([0, 6, 12, 18], np.uint32) & np.uint32(63)
    return codes.astype(np.uint8).reshape(chunks.shape)


@dataclass(eq=False)
class Copy(Operation):
    """One executed ``tcgen05.cp``.

    Attributes:
        slots: the CTAs that take part; each copies from its own shared memory.
        address: in tensor memory; descriptor: of the rows in shared memory.
        source: format to decompress, or None.
    """

    shape: CopyShape
    slots: tuple[int, ...]
    address: int
    descriptor: int
    source: str | None

    @property
    def chunks(self) -> np.ndarray:
        """Chunk numbers of the rows in shared memory, ``(rows, chunks)``."""
        return k_major_chunks(self.descriptor, self.shape.rows, self.shape.chunks)

    def begin(self, ctx: BlockContext, row: int) -> bool:
        """Check its accesses and mark them; False if it cannot be carried out."""
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        shadow: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        chunks = self.chunks
        low, stop = int(chunks.min()) * CHUNK, int(chunks.max() + 1) * CHUNK
        if stop > ctx.wave.smem_end or low < SHARED_BASE:
            text = f"a copy to tensor memory reads bytes {low:#x} to {stop:#x}"
            report_warp(ctx, "shared-out-of-bounds", text, self.issuer.slot, self.issuer.first)
            return False
        lanes = np.sort(np.array(self.shape.lanes).reshape(-1))
        for slot in self.slots:
            area = memory.area(
                slot, self.address >> 16, lanes, self.address & 0xFFFF, 4 * self.shape.chunks
            )
            if not memory.begin_write(ctx, self.issuer, area, row):
                return False
            self.writes.append(area)
            if shadow.active:
                source = shadow.chunks(slot, chunks)
                shadow.begin_read(ctx, self.issuer, source, row)
                self.shared.append(source)
        return True

    def execute(self, ctx: BlockContext, following: deque[Operation | Commit]) -> None:
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        column = self.address & 0xFFFF
        lanes = np.array(self.shape.lanes) + (self.address >> 16)
        for slot in self.slots:
            words = ctx.wave.smem[slot]
            flat = words[: words.size // CHUNK * CHUNK].view(WORDS[CHUNK])
            data = flat.take(self.chunks, mode="clip")
            if self.source is not None:
                parts = data.view(np.uint8).reshape(*data.shape, CHUNK)
                data = decompress(parts, self.source)
            rows = np.ascontiguousarray(data).view(np.uint32).reshape(self.shape.rows, -1)
            for copy in lanes.T:
                memory.data[slot, copy, column : column + rows.shape[1]] = rows


@dataclass(eq=False)
class Shift(Operation):
    """One executed ``tcgen05.shift.down``; attributes as for :class:`Copy`."""

    slots: tuple[int, ...]
    address: int

    def begin(self, ctx: BlockContext, row: int) -> bool:
        """Check its accesses and mark them; False if it cannot be carried out."""
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        for area in self._areas(memory):
            if not memory.begin_write(ctx, self.issuer, area, row, accumulates=True):
                return False
            self.writes.append(area)
        return True

    def _areas(self, memory: TensorMemory) -> Iterator[Area]:
        lane = self.address >> 16
        for slot in self.slots:
            yield memory.area(slot, lane, LANES - lane, self.address & 0xFFFF, SHIFT_COLUMNS)

    def execute(self, ctx: BlockContext, following: deque[Operation | Commit]) -> None:
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        for slot, lanes, columns in self._areas(memory):
            assert isinstance(lanes, slice)
            quarters = memory.cells[slot, columns, lanes].reshape(SHIFT_COLUMNS, -1, QUARTER_LANES)
            quarters[..., :-1] = quarters[..., 1:].copy()
