"""``tcgen05.mma`` on the tensor core: operands, products, accumulators (PTX ISA 9.7.16.10).

**Rounding.** Inputs are exact. The products of one instruction, and of a chain of instructions that
follow one another on one f32 accumulator, are summed by one float32 matrix product (BLAS: its order
of summation, round to nearest after each addition), to which the accumulator's old value is added
last. The hardware's order and its truncation of aligned products are not documented; this is as
accurate. f16 accumulators are rounded to nearest even after every instruction. Block-scaled
products are formed in float64, since two scale factors exceed the range of float32, and rounded
once; integers are exact and wrap around, or saturate if the descriptor asks for it.

Both CTAs of a pair supply half of A's rows and half of B's columns from the same offsets of their
own shared memory, and both receive their rows of D for all columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa.sim.async_shadow import AsyncShadow, report_warp
from cute_fa.sim.canonical_layouts import CHUNK, OperandLayout, outside
from cute_fa.sim.memory import WORDS
from cute_fa.sim.tensor_memory import Area, TensorMemory
from cute_fa.sim.umma_descriptors import chain_chunks, chain_extent
from cute_fa.sim.umma_instruction import PACKED4, InstructionDescriptor
from cute_fa.sim.umma_layout import Layout, Part, lanes_of, layout_of
from cute_fa.sim.umma_operands import (
    SUBPARTITION,
    decode_scales,
    decode_shared,
    decode_tensor_memory,
    decode_transposed,
    read_scales,
    scale_columns,
)
from cute_fa.sim.umma_queue import Commit, Operation, TensorQueues

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

_BITS = {"f16": 16, "bf16": 16, "tf32": 32}
_LANES = 128
CELL_BYTES = 4


@dataclass(frozen=True)
class Product:
    """What is the same for all instructions of a chain.

    Attributes:
        d: address of the accumulator, as lane and column.
        a_in_tmem: A comes from tensor memory.
        pair, ws: ``.cta_group::2``, ``.ws``.
        scale_vector: scale factors per row and instruction; 0 without block scaling.
        disabled: bits of the lanes that are not written, for each CTA; None for none.
        zero_columns: columns of B that count as zero, or None.
        shift: ``.ashift``: row i of A is row i + 1 of what is stored, but for the last one of every
            32 lanes, which stays.
    """

    form: InstructionDescriptor
    lane: int
    column: int
    a_in_tmem: bool
    pair: bool
    ws: bool
    scale_vector: int = 0
    disabled: tuple[bytes, ...] | None = None
    zero_columns: bytes | None = None
    shift: bool = False

    @cached_property
    def layout(self) -> Layout:
        """The accumulator in each CTA."""
        return layout_of(self.form.m, self.form.n, pair=self.pair, ws=self.ws)

    @cached_property
    def a_layout(self) -> OperandLayout:
        """How one CTA's A is read from shared memory."""
        return self._operand(self.layout.rows, self.form.a, self.form.transpose_a)

    @cached_property
    def b_layout(self) -> OperandLayout:
        """How one CTA's B is read from shared memory."""
        columns = self.form.n // (2 if self.pair else 1)
        return self._operand(columns, self.form.b, self.form.transpose_b)

    def _operand(self, rows: int, kind: str, transposed: bool) -> OperandLayout:
        per_chunk = CHUNK * 8 // self._bits(kind)
        return OperandLayout(rows, self.form.k, self.form.k // per_chunk, per_chunk, transposed)

    def _bits(self, kind: str) -> int:
        """Bits that an element takes, padding included."""
        return 4 if self.form.kind in PACKED4 else _BITS.get(kind, 8)

    @cached_property
    def a_columns(self) -> int:
        """Columns of tensor memory that one instruction's A takes."""
        return self.form.k * self._bits(self.form.a) // (8 * CELL_BYTES)

    @cached_property
    def chains(self) -> bool:
        """Whether several instructions may be summed as one product."""
        return self.form.d != "f16" and not self.form.saturate

    @cached_property
    def flops(self) -> int:
        """Multiply-adds of one instruction, times two."""
        return 2 * self.form.m * self.form.n * self.form.k

    @cached_property
    def shared_bytes(self) -> int:
        """Bytes of operands that one instruction reads from shared memory, in all CTAs."""
        layouts = [self.b_layout] if self.a_in_tmem else [self.b_layout, self.a_layout]
        rows = sum(layout.rows for layout in layouts)
        return rows * self.b_layout.chunks * CHUNK * (2 if self.pair else 1)

    @cached_property
    def a_bytes(self) -> int:
        """Bytes of A that it reads from tensor memory."""
        lanes = sum(self.layout.rows for _ in self.layout.parts)
        width = self.a_columns * CELL_BYTES if self.a_in_tmem else 0
        return lanes * width * (2 if self.pair else 1)

    @cached_property
    def d_bytes(self) -> int:
        """Bytes of tensor memory that D takes."""
        return self.form.m * self.form.n * CELL_BYTES


@lru_cache(maxsize=4096)
def product_of(form: InstructionDescriptor, lane: int, column: int, **options: Any) -> Product:
    """The one :class:`Product` with these fields."""
    return Product(form, lane, column, **options)


@dataclass(eq=False)
class Mma(Operation):
    """One executed ``tcgen05.mma``.

    Attributes:
        slots: the CTAs that take part, in rank order.
        a: descriptor, or address in tensor memory; b: descriptor.
        a_scales, b_scales: (column, first byte) of the scale factors.
        accumulate: D is added to; d_shift: after being divided by 2**d_shift.
    """

    product: Product
    slots: tuple[int, ...]
    a: int
    b: int
    accumulate: bool
    d_shift: int = 0
    a_scales: tuple[int, int] = (0, 0)
    b_scales: tuple[int, int] = (0, 0)

    # --- what it accesses -------------------------------------------------------------------------

    def begin(self, ctx: BlockContext, queues: TensorQueues) -> bool:
        """Check its accesses and mark them; False if it cannot be carried out."""
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        row = queues.row
        if not all(self._begin_shared(ctx, slot, queues) for slot in self.slots):
            return False
        for slot in self.slots:
            for area in self._tensor_reads(memory, slot):
                if not memory.begin_read(ctx, self.issuer, area, row):
                    return False
                self.reads.append(area)
            for area in self._accumulator(memory, slot):
                accumulates = self.accumulate
                if not memory.begin_write(ctx, self.issuer, area, row, accumulates=accumulates):
                    return False
                self.writes.append(area)
        return True

    def _begin_shared(self, ctx: BlockContext, slot: int, queues: TensorQueues) -> bool:
        areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        operands = [((self.b,), self.product.b_layout)]
        if not self.product.a_in_tmem:
            operands.append(((self.a,), self.product.a_layout))
        for descriptors, layout in operands:
            extent = chain_extent(descriptors, layout)
            text = outside(ctx.wave, extent)
            if text is not None:
                report_warp(ctx, "shared-out-of-bounds", text, self.issuer.slot, self.issuer.first)
                return False
            if areas.active:
                key = slot, descriptors[0], layout
                area = queues.operand_areas.get(key)
                if area is None:
                    area = areas.matrix(slot, chain_chunks(descriptors, layout), extent)
                    queues.operand_areas[key] = area
                areas.begin_read(ctx, self.issuer, area, queues.row)
                self.shared.append(area)
        return True

    def _accumulator(self, memory: TensorMemory, slot: int) -> Iterator[Area]:
        layout = self.product.layout
        lane, column = self.product.lane, self.product.column
        if layout.name == "F":
            lanes = layout.parts[0].index
            yield memory.area(slot, lane, np.asarray(lanes), column, layout.columns)
        else:
            yield memory.area(slot, lane, _LANES, column, layout.columns)

    def _tensor_reads(self, memory: TensorMemory, slot: int) -> Iterator[Area]:
        product = self.product
        if product.a_in_tmem:
            lane, column = self.a >> 16, self.a & 0xFFFF
            lanes: int | np.ndarray = _LANES
            if product.layout.name == "F":
                lanes = np.asarray(product.layout.parts[0].index)
            yield memory.area(slot, lane, lanes, column, product.a_columns)
        if product.scale_vector:
            rows = product.form.n // (2 if product.layout.name == "B" else 1)
            yield memory.area(slot, 0, _LANES, self.a_scales[0], scale_columns(product.layout.rows))
            yield memory.area(slot, 0, _LANES, self.b_scales[0], scale_columns(rows))

    # --- doing it ---------------------------------------------------------------------------------

    def execute(self, ctx: BlockContext, following: deque[Operation | Commit]) -> None:
        chain = [self]
        if self.product.chains:
            while following and self._joined_by(following[0]):
                chain.append(following.popleft())  # type: ignore[arg-type]
        _Chain(ctx, chain).run()

    def _joined_by(self, other: Operation | Commit) -> bool:
        return (
            isinstance(other, Mma)
            and other.accumulate
            and not other.d_shift
            and other.product is self.product
            and other.slots == self.slots
        )


class _Chain:
    """Products that follow one another on one accumulator, as one product along k."""

    def __init__(self, ctx: BlockContext, chain: list[Mma]) -> None:
        self.ctx = ctx
        self.chain = chain
        self.first = chain[0]
        self.product = self.first.product
        self.form = self.product.form
        self.wave = ctx.wave
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        self.cells = memory.cells

    def run(self) -> None:
        """Compute and store."""
        product, layout = self.product, self.product.layout
        of_ctas = [self._shared(slot, "b") for slot in self.first.slots]
        right = np.concatenate(of_ctas)  # (n, k)
        if product.zero_columns is not None:
            right[np.frombuffer(product.zero_columns, bool)] = 0
        for number, slot in enumerate(self.first.slots):
            rows = right
            if product.scale_vector:
                rows = right * self._b_scales(slot)
            left = None if product.a_in_tmem else self._left(self._shared(slot, "a"), slot)
            for part in layout.parts:
                lanes = lanes_of(part, product.lane)
                if left is None:
                    block = self._left(self._from_tensor_memory(slot, part), slot)
                else:
                    block = left
                whole = part.n0 == 0 and part.n1 == self.form.n
                value = self._multiply(block, rows if whole else rows[part.n0 : part.n1])
                self._store(number, slot, lanes, value)

    def _multiply(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The part's columns of D, transposed: ``(n, rows)``."""
        if self.form.d == "s32":
            wide = right.astype(np.float64) @ left.T.astype(np.float64)
            return wide.astype(np.int64)
        value = right @ left.T
        return value if self.form.sign > 0 else -value

    def _shared(self, slot: int, which: str) -> np.ndarray:
        """An operand from one CTA's shared memory: ``(rows, k)`` of the whole chain."""
        layout = self.product.a_layout if which == "a" else self.product.b_layout
        kind = self.form.a if which == "a" else self.form.b
        descriptors = tuple(getattr(mma, which) for mma in self.chain)
        chunks = chain_chunks(descriptors, layout)
        words = self.wave.smem[slot]
        flat = words[: words.size // CHUNK * CHUNK].view(WORDS[CHUNK])
        data = flat.take(chunks, mode="clip").view(np.uint8).reshape(chunks.shape[0], -1)
        if layout.transposed:
            return decode_transposed(data, kind, layout.rows)
        return decode_shared(data, kind, packed4=self.form.kind in PACKED4)

    def _from_tensor_memory(self, slot: int, part: Part) -> np.ndarray:
        """A's rows in the lanes of one part: ``(rows, k)`` of the whole chain."""
        width = self.product.a_columns
        addresses = [mma.a for mma in self.chain]
        column = addresses[0] & 0xFFFF
        lanes = lanes_of(part, addresses[0] >> 16)
        if all(address == addresses[0] + i * width for i, address in enumerate(addresses)):
            blocks = [self.cells[slot, column : column + width * len(addresses)]]
        else:
            starts = [address & 0xFFFF for address in addresses]
            blocks = [self.cells[slot, start : start + width] for start in starts]
        words = np.concatenate([block[:, lanes] for block in blocks])
        rows = np.ascontiguousarray(words.T)
        return decode_tensor_memory(rows, self.form.a, packed4=self.form.kind in PACKED4)

    def _left(self, left: np.ndarray, slot: int) -> np.ndarray:
        """A with its scale factors, and shifted if the instruction says so."""
        if self.product.shift:
            chunks = left.reshape(-1, SUBPARTITION, left.shape[1])  # as tcgen05.shift does
            left = np.concatenate([chunks[:, 1:], chunks[:, -1:]], axis=1).reshape(left.shape)
        return left * self._a_scales(slot) if self.product.scale_vector else left

    # --- scale factors ----------------------------------------------------------------------------

    def _a_scales(self, slot: int) -> np.ndarray:
        """float64 ``(rows, k)`` of the chain."""
        rows = self.product.layout.rows
        return self._scales(slot, [mma.a_scales for mma in self.chain], rows, (0, 1, 2, 3))

    def _b_scales(self, slot: int) -> np.ndarray:
        """float64 ``(n, k)``; with layout B, half of the columns in each half of the lanes."""
        places = [mma.b_scales for mma in self.chain]
        n = self.form.n
        if self.product.layout.name == "B":
            halves = [self._scales(slot, places, n // 2, pair) for pair in ((0, 1), (2, 3))]
            return np.concatenate(halves)
        return self._scales(slot, places, n, (0, 1, 2, 3))

    def _scales(
        self, slot: int, places: list[tuple[int, int]], rows: int, partitions: tuple[int, ...]
    ) -> np.ndarray:
        per_row = self.product.scale_vector
        copies = [
            np.concatenate(
                [
                    read_scales(self.cells[slot], column, rows, per_row, byte, partition)
                    for column, byte in places
                ],
                axis=1,
            )
            for partition in partitions
        ]
        if any((copy != copies[0]).any() for copy in copies[1:]):
            text = f"lane partitions {partitions} hold different scale factors"
            issuer = self.first.issuer
            report_warp(
                self.ctx,
                "tensor-scale-factors",
                text,
                issuer.slot,
                issuer.first,
                instr=self.first.instr,
            )
        assert self.form.scale is not None
        scales = decode_scales(copies[0], self.form.scale)
        return np.repeat(scales, self.form.k // per_row, axis=1)

    # --- accumulators -----------------------------------------------------------------------------

    def _store(self, number: int, slot: int, lanes: slice | np.ndarray, value: np.ndarray) -> None:
        """Add to the accumulator if it says so, round, and write what is not disabled."""
        column = self.product.column
        columns = slice(column, column + value.shape[0])
        cells = self.cells[slot, columns]
        if self.first.accumulate:
            value = self._accumulate(cells[:, lanes], value)
        raw = self._encode(value)
        disabled = self.product.disabled
        if disabled is None:
            cells[:, lanes] = raw
            return
        keep = np.frombuffer(disabled[number], bool)[lanes]
        cells[:, lanes] = np.where(keep, cells[:, lanes], raw)

    def _accumulate(self, old: np.ndarray, value: np.ndarray) -> np.ndarray:
        if self.form.d == "s32":
            return value + np.ascontiguousarray(old).view(np.int32)
        if self.form.d == "f16":
            base = old.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            base = np.ascontiguousarray(old).view(np.float32)
        if self.first.d_shift:
            base = np.ldexp(base, -self.first.d_shift)
        return value + base

    def _encode(self, value: np.ndarray) -> np.ndarray:
        """Results as 32-bit cells; f16 in the low half."""
        if self.form.d == "s32":
            if self.form.saturate:
                limit = np.iinfo(np.int32)
                value = np.clip(value, limit.min, limit.max)
            return value.astype(np.int32).view(np.uint32)
        if self.form.d == "f16":
            return value.astype(np.float16).view(np.uint16).astype(np.uint32)
        return value.astype(np.float32, copy=False).view(np.uint32)
