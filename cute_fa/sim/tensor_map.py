"""Tensor maps: the 128-byte CUtensorMap that the host writes and tensor copies read.

The format is not documented; this is what compiled host code writes (its first 64 bytes, sixteen
32-bit words):

=========  =========================================================================================
w0, w1     global address
w2         bits 0-3: 2; 4-6: rank - 1; 7-10: element type; 11-12: interleave; 13-14: swizzle;
           15: out-of-bounds elements are NaN; 16: tf32
w3 … w6    strides of dimensions 1 … 4 in units of 16 bytes, low 32 bits
w7         bits 32-35 of each stride, 4 bits for each
w8 … w12   extents minus 1
w13        bits 0-14: element strides minus 1, 3 bits each; bits 24-31: extent 0 of the box, minus 1
w14        extents 1 … 4 of the box, minus 1, 8 bits each
=========  =========================================================================================

Addresses, extents, strides, boxes, types and swizzles were checked against maps of compiled
programs. The places of the fill mode and of element strides other than 1 are an assumption: no
compiled program was seen to use them; :func:`encode` and :func:`decode` agree on them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from cute_fa.errors import InvalidArgumentError

MAP_BYTES = 128
_MOST_DIMENSIONS = 5

ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
"""Bytes of each element type of ``tensormap.replace`` (PTX ISA 9.7.9.28, table)."""

TYPES = (
    "u8",
    "u16",
    "u32",
    "s32",
    "u64",
    "s64",
    "f16",
    "f32",
    "f32",
    "f64",
    "bf16",
    "tf32",
    "tf32",
)

_DRIVER_ORDER = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16")


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; innermost dimension first.

    Attributes:
        address: of element (0, …, 0).
        kind: one of ``TYPES``.
        element: bytes of one element.
        extents: elements in each dimension.
        strides: bytes between neighbours, for each dimension (the first is ``element``).
        box: elements of the box in each dimension, before element strides.
        steps: element strides: only every so-manieth element of the box is copied.
        swizzle: bytes of the swizzle span: 0, 32, 64 or 128.
        fill_nan: elements outside the tensor are NaN instead of 0.
    """

    address: int
    kind: str
    element: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int
    fill_nan: bool = False

    @property
    def rank(self) -> int:
        return len(self.extents)

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements that one copy moves in each dimension."""
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes that one copy moves; parts outside the tensor count."""
        return self.element * int(np.prod(self.counts))

    def faults(self) -> list[str]:
        """What the host function that encodes maps would refuse."""
        found = []
        if self.address % 16:
            found.append(f"address {self.address:#x} is not a multiple of 16")
        for stride in self.strides[1:]:
            if stride % 16:
                found.append(f"stride {stride} is not a multiple of 16 bytes")
        inner = self.counts[0] * self.element
        if inner % 16:
            found.append(f"the box's inner extent of {inner} bytes is not a multiple of 16")
        if self.swizzle and inner > self.swizzle:
            found.append(f"the box's inner {inner} bytes exceed the {self.swizzle}-byte swizzle")
        for extent in self.box:
            if not 1 <= extent <= 256:
                found.append(f"box extent {extent} is not in 1 to 256")
        return found


def decode(data: bytes) -> TensorMap:
    """Read a map as the hardware would.

    Raises:
        InvalidArgumentError: for interleaved maps, and for what is no tiled map at all.
    """
    words = struct.unpack("<16I", data[:64])
    flags = words[2]
    code = flags >> 7 & 15
    rank = (flags >> 4 & 7) + 1
    if flags & 15 != 2 or code >= len(TYPES) or rank > _MOST_DIMENSIONS:
        raise InvalidArgumentError(
            "these bytes are not a tiled tensor map",
            got=f"flags {flags:#x}",
            expected="a CUtensorMap as the host encodes it, 64-byte aligned",
        )
    if flags >> 11 & 3:
        raise InvalidArgumentError(
            "tensor maps with interleaved layouts are not simulated", got=f"flags {flags:#x}"
        )
    element = ELEMENT_BYTES[code]
    high = words[7]
    outer = tuple((words[3 + i] | (high >> 4 * i & 15) << 32) << 4 for i in range(4))
    boxes = (words[13] >> 24, *(words[14] >> 8 * i & 255 for i in range(4)))
    return TensorMap(
        address=words[0] | words[1] << 32,
        kind="tf32" if flags >> 16 & 1 else TYPES[code],
        element=element,
        extents=tuple(word + 1 for word in words[8 : 8 + rank]),
        strides=(element, *outer[: rank - 1]),
        box=tuple(size + 1 for size in boxes[:rank]),
        steps=tuple((words[13] >> 3 * i & 7) + 1 for i in range(rank)),
        swizzle=(0, 32, 64, 128)[flags >> 13 & 3],
        fill_nan=bool(flags >> 15 & 1),
    )


def encode(tensor: TensorMap) -> bytes:
    """Write a map; the inverse of :func:`decode`.

    Raises:
        InvalidArgumentError: for what the host function would refuse.
    """
    faults = tensor.faults()
    if faults:
        raise InvalidArgumentError("the tensor map cannot be encoded", got="; ".join(faults))
    rank = tensor.rank
    code = TYPES.index("f32" if tensor.kind == "tf32" else tensor.kind)
    swizzle = (0, 32, 64, 128).index(tensor.swizzle)
    words = [0] * 16
    words[0], words[1] = tensor.address & 0xFFFF_FFFF, tensor.address >> 32
    words[2] = 2 | (rank - 1) << 4 | code << 7 | swizzle << 13 | tensor.fill_nan << 15
    words[2] |= (tensor.kind == "tf32") << 16
    for i, stride in enumerate(tensor.strides[1:]):
        words[3 + i] = stride >> 4 & 0xFFFF_FFFF
        words[7] |= (stride >> 36) << 4 * i
    for i in range(rank):
        words[8 + i] = tensor.extents[i] - 1
        words[13] |= (tensor.steps[i] - 1) << 3 * i
    words[13] |= (tensor.box[0] - 1) << 24
    for i, size in enumerate(tensor.box[1:]):
        words[14] |= (size - 1) << 8 * i
    return struct.pack("<16I", *words) + bytes(MAP_BYTES - 64)


def driver_type(data_type: int) -> str:
    """The element type that a CUtensorMapDataType names.

    Raises:
        InvalidArgumentError: for packed 4- and 6-bit types.
    """
    names = (*_DRIVER_ORDER, "f32", "tf32", "tf32")
    if not 0 <= data_type < len(names):
        raise InvalidArgumentError("a tensor map type that is not simulated", got=data_type)
    return names[data_type]


def swizzled_chunks(start: int, nbytes: int, swizzle: int) -> np.ndarray:
    """Where the 16-byte chunks of a box lie: chunk numbers for offsets ``start`` on, in order.

    The swizzle exchanges address bits 4 and up with bits 7 and up of the absolute address (PTX ISA
    5.5.7): 128 bytes ``4-6 ^= 7-9``, 64 bytes ``4-5 ^= 7-8``, 32 bytes ``4 ^= 7``.
    """
    chunks = np.arange(start >> 4, (start + nbytes) >> 4)
    if swizzle:
        chunks ^= chunks >> 3 & (swizzle // 16 - 1)
    return chunks
