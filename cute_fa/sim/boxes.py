"""Boxes of tensors in global memory: reading, writing and reducing what a tensor copy names."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.sim.addresses import PARAM_BASE, PRIVATE_WINDOW_BYTES
from cute_fa.sim.memory import SECTOR_BYTES, GlobalMemory, Region
from cute_fa.sim.tensor_map import TensorMap, decode

if TYPE_CHECKING:
    from cute_fa.sim.wave import Wave

LIVE_BYTES = 64  # of a tensor map
ADDRESSES = 1 << 64
"""Addresses wrap around: ragged tensors are copied with strides that cancel by that."""

Slices = tuple[slice, ...]


@lru_cache(maxsize=256)
def decoded(data: bytes) -> TensorMap:
    """The map that ``data`` encodes."""
    return decode(data)


def map_at(wave: Wave, address: int) -> TensorMap:
    """The tensor map at a generic address: a parameter, or global memory.

    Raises:
        InvalidArgumentError: there is no tensor map at the address.
    """
    offset = address - PARAM_BASE
    if 0 <= offset < PRIVATE_WINDOW_BYTES:
        data = wave.params[offset : offset + LIVE_BYTES]
    else:
        region = wave.memory.resolve(address, LIVE_BYTES)
        if region is None:
            text = wave.memory.describe(address, LIVE_BYTES)
            raise InvalidArgumentError("a tensor map outside known memory", got=text)
        data = region.data[address - region.base : address - region.base + LIVE_BYTES].tobytes()
    if len(data) < LIVE_BYTES or address % 64:
        raise InvalidArgumentError(
            "a tensor map has to be 64-byte aligned and whole", got=f"address {address:#x}"
        )
    return decoded(bytes(data))


class Box:
    """One box of a tensor: where it lies, and which part of it is inside the tensor.

    Args:
        coordinates: of the box's first element, innermost first; may lie outside the tensor.

    Attributes:
        shape: elements in each dimension, outermost first.
        inside: slices of the box that lie in the tensor, outermost first; None if nothing does.
    """

    def __init__(self, tensor: TensorMap, coordinates: tuple[int, ...]) -> None:
        self.tensor = tensor
        self.shape = tensor.counts[::-1]
        self.first = tensor.address
        slices: list[slice] = []
        starts: list[int] = []
        self.inside: Slices | None = None
        for d, (start, extent, step, count) in enumerate(
            zip(coordinates, tensor.extents, tensor.steps, tensor.counts, strict=True)
        ):
            low = max(0, -(start // step)) if start < 0 else 0
            high = min(count, -(-(extent - start) // step))
            if high <= low:
                return
            slices.append(slice(low, high))
            starts.append((start + low * step) * tensor.strides[d])
        self.first = (self.first + sum(starts)) % ADDRESSES
        self.inside = tuple(slices[::-1])
        self.strides = tuple(a * b for a, b in zip(tensor.strides, tensor.steps, strict=True))[::-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Elements inside the tensor in each dimension, outermost first."""
        return () if self.inside is None else tuple(s.stop - s.start for s in self.inside)

    @property
    def nbytes(self) -> int:
        """Bytes inside the tensor."""
        return int(np.prod(self.lengths)) * self.tensor.element if self.inside else 0

    def span(self) -> int:
        """Bytes from the first to behind the last element inside the tensor."""
        last = sum((n - 1) * s for n, s in zip(self.lengths, self.strides, strict=True))
        return last + self.tensor.element

    def sectors(self) -> int:
        """32-byte sectors that the part inside the tensor touches, row by row."""
        rows = np.zeros(1, np.int64) + self.first
        for n, stride in zip(self.lengths[:-1], self.strides[:-1], strict=True):
            rows = (rows[:, None] + np.arange(n) * stride).reshape(-1)
        length = (self.lengths[-1] - 1) * self.strides[-1] + self.tensor.element
        ends = (rows + length - 1) // SECTOR_BYTES
        return int((ends - rows // SECTOR_BYTES + 1).sum())

    def locate(self, memory: GlobalMemory) -> tuple[Region | None, str | None]:
        """The region that holds the part inside the tensor, or what is wrong with it."""
        region = memory.resolve(self.first, self.span())
        if region is None:
            return None, memory.describe(self.first, self.span())
        return region, None

    def view(self, region: Region) -> np.ndarray:
        """The part inside the tensor, as a writable view of the region's memory."""
        dtype = np.dtype(f"u{self.tensor.element}")
        offset = self.first - region.base
        return np.ndarray(self.lengths, dtype, region.data, offset, self.strides)

    def read(self, region: Region | None) -> np.ndarray:
        """The whole box as bytes; outside the tensor it is zero, or NaN if the map says so."""
        dtype = np.dtype(f"u{self.tensor.element}")
        if region is not None and self.lengths == self.shape:
            return np.ascontiguousarray(self.view(region)).reshape(-1).view(np.uint8)
        filler = dtype.type(np.iinfo(dtype).max) if self.tensor.fill_nan else dtype.type(0)
        out = np.full(self.shape, filler, dtype)
        if region is not None and self.inside is not None:
            out[self.inside] = self.view(region)
        return out.reshape(-1).view(np.uint8)

    def write(self, region: Region, data: np.ndarray, operator: str | None = None) -> None:
        """Store the bytes of a box, or reduce them into memory; what lies outside is dropped."""
        if region.private:
            raise CuteFAError(
                "a worker process wrote to memory that was found only after it began",
                got=f"a bulk copy to {region.name}",
                fix="run with workers=1, or register the memory before the launch",
            )
        assert self.inside is not None
        tile = data.view(f"u{self.tensor.element}").reshape(self.shape)[self.inside]
        view = self.view(region)
        if operator is not None:
            tile = reduce(operator, self.tensor.kind, np.ascontiguousarray(view), tile)
        view[...] = tile
        if region.initialised is not None:
            flags = np.ndarray(
                (*self.lengths, self.tensor.element),
                np.uint8,
                region.initialised,
                self.first - region.base,
                (*self.strides, 1),
            )
            flags[...] = 1


class Rows:
    """Four rows of a two-dimensional tensor that one copy gathers or scatters (PTX ISA 5.5.3.4).

    In shared memory they are one box of four rows; its interface is that of :class:`Box`.

    Args:
        column: innermost coordinate of all; rows: the other coordinate of each.

    Raises:
        InvalidArgumentError: the map's box is more than one row, or has more dimensions than two.
    """

    def __init__(self, tensor: TensorMap, column: int, rows: tuple[int, ...]) -> None:
        if tensor.rank != 2 or tensor.box[1] != 1:
            raise InvalidArgumentError(
                "a copy of four rows needs a map of two dimensions whose box is one row",
                got=f"{tensor.rank} dimensions, box {tensor.box}",
            )
        self._boxes = [Box(tensor, (column, row)) for row in rows]
        self._present = [box for box in self._boxes if box.inside is not None]
        self.tensor = replace(tensor, box=(tensor.box[0], len(rows)))
        self.inside = self._present[0].inside if self._present else None
        self.first = min((box.first for box in self._present), default=tensor.address)

    @property
    def nbytes(self) -> int:
        return sum(box.nbytes for box in self._boxes)

    def sectors(self) -> int:
        return sum(box.sectors() for box in self._present)

    def locate(self, memory: GlobalMemory) -> tuple[Region | None, str | None]:
        end = max(box.first + box.span() for box in self._present)
        region = memory.resolve(self.first, end - self.first)
        return region, None if region else memory.describe(self.first, end - self.first)

    def read(self, region: Region | None) -> np.ndarray:
        return np.concatenate([box.read(region) for box in self._boxes])

    def write(self, region: Region, data: np.ndarray, operator: str | None = None) -> None:
        for box, row in zip(self._boxes, np.split(data, len(self._boxes)), strict=True):
            if box.inside is not None:
                box.write(region, row, operator)


def linear(address: int, nbytes: int, kind: str = "u8") -> Box:
    """Contiguous bytes as a box of one dimension."""
    element = {"u8": 1, "f16": 2, "bf16": 2}.get(kind, int(kind[1:]) // 8 if kind != "bf16" else 2)
    count = nbytes // element
    tensor = TensorMap(address, kind, element, (count,), (element,), (count,), (1,), 0)
    return Box(tensor, (0,))


_DTYPES = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}


def reduce(operator: str, kind: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``old op new`` element by element, on unsigned integers of the type's width.

    Args:
        operator: add, min, max, inc, dec, and, or, xor.
        kind: element type: u8 …, s32, s64, f16, bf16, f32, f64, or b32 and b64.
    """
    new = np.ascontiguousarray(new)
    if operator in ("and", "or", "xor"):
        logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        return logic[operator](old, new)
    if operator == "inc":
        return np.where(old >= new, 0, old + old.dtype.type(1)).astype(old.dtype)
    if operator == "dec":
        return np.where((old == 0) | (old > new), new, old - old.dtype.type(1)).astype(old.dtype)
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    if operator not in functions:
        raise InvalidArgumentError("a reduction that is not known", got=operator)
    function = functions[operator]
    if kind == "bf16":
        wide = [(x.astype(np.uint32) << np.uint32(16)).view(np.float32) for x in (old, new)]
        return round_to_bf16(function(*wide))
    signed = {"s32": np.int32, "s64": np.int64}
    dtype = _DTYPES.get(kind) or signed.get(kind)
    if dtype is None:
        return function(old, new)
    result = function(old.view(dtype), new.view(dtype))
    return result.astype(dtype, copy=False).view(old.dtype)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
