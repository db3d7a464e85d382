"""Tensor maps: the 128-byte CUtensorMap that the host writes and tensor copies read.

The format is not documented; this is what compiled host code writes (its first 64 bytes, sixteen
32-bit words):

=========  =========================================================================================
w0, w1     global address
w2         bits 0-3: 2; 4-6: rank - 1; 7-10: element type; 11-12: interleave; 13-14: swizzle;
           15: out-of-bounds elements are NaN; 16: tf32; 19-20: swizzle atom of 16 or 32 bytes, 32
           with halves exchanged, 64
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

ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 1, 1, 1)
"""Bytes of each of ``TYPES``; elements of 4 and 6 bits are counted in bytes."""

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
    "b4x16",
    "b4x16_p64",
    "b6x16_p32",
)
"""Element types by their codes in a map; tf32 is f32 with bit 16 set."""

PACKED = {"b4x16": (4, 0), "b4x16_p64": (4, 8), "b6x16_p32": (6, 12)}
"""Types below a byte (PTX ISA 5.5.1): bits; bytes of 16 elements in each 16 bytes of shared memory,
which padding fills, or 0 without padding."""

_ATOMS = (16, 32, None, 64)
_DRIVER_TYPES = (
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16", "f32", "tf32", "tf32"),
    *PACKED,
)


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one copy moves; innermost dimension first.

    Attributes:
        address: of element (0, …, 0).
        kind: one of ``TYPES``, or tf32.
        element: bytes of one element; extents and box of ``PACKED`` types are in bytes, too.
        extents: elements in each dimension.
        strides: bytes between neighbours, for each dimension (the first is ``element``).
        box: elements of the box in each dimension, before element strides.
        steps: element strides: only every so-manieth element of the box is copied.
        swizzle: bytes of the swizzle span: 0, 32, 64 or 128.
        fill_nan: elements outside the tensor are NaN instead of 0.
        atom: bytes that the swizzle keeps together: 16, or 32 or 64 if it spans 128.
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
    atom: int = 16

    @property
    def rank(self) -> int:
        return len(self.extents)

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements that one copy moves in each dimension."""
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes that one copy moves; parts outside the tensor count, padding does not."""
        return self.element * int(np.prod(self.counts))

    @property
    def padded(self) -> int:
        """Bytes of data in each 16 bytes of shared memory; 0 if it is all of them."""
        return PACKED[self.kind][1] if self.kind in PACKED else 0

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a box takes, with padding."""
        return self.box_bytes // self.padded * 16 if self.padded else self.box_bytes

    def first_byte(self, coordinate: int) -> int:
        """The innermost coordinate in units of ``element``.

        Raises:
            InvalidArgumentError: the ISA does not let a box of packed elements begin there.
        """
        if self.kind not in PACKED:
            return coordinate
        bits, padded = PACKED[self.kind]
        if coordinate % (128 if padded else 2):
            raise InvalidArgumentError(
                f"a box of {self.kind} begins at a coordinate that is no multiple of "
                f"{128 if padded else 2}",
                got=coordinate,
            )
        return coordinate * bits // 8

    def faults(self) -> list[str]:
        """What the host function that encodes maps would refuse."""
        found = []
        if self.address % 16:
            found.append(f"address {self.address:#x} is not a multiple of 16")
        for stride in self.strides[1:]:
            if stride % 16:
                found.append(f"stride {stride} is not a multiple of 16 bytes")
        inner = self.counts[0] * self.element
        if self.padded:
            inner = inner // self.padded * 16
        if inner % 16:
            found.append(f"the box's inner extent of {inner} bytes is not a multiple of 16")
        if self.swizzle and inner > self.swizzle:
            found.append(f"the box's inner {inner} bytes exceed the {self.swizzle}-byte swizzle")
        if self.atom != 16 and self.swizzle != 128:
            found.append(f"a swizzle of {self.swizzle} bytes has no atoms of {self.atom}")
        first = self.box[0] * 8 // PACKED[self.kind][0] if self.kind in PACKED else self.box[0]
        for extent in (first, *self.box[1:]):
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
    atom = _ATOMS[flags >> 19 & 3]
    if atom is None:
        raise InvalidArgumentError(
            "tensor maps whose swizzle exchanges 8-byte halves are not simulated",
            got=f"flags {flags:#x}",
        )
    element = ELEMENT_BYTES[code]
    kind = "tf32" if flags >> 16 & 1 else TYPES[code]
    high = words[7]
    outer = tuple((words[3 + i] | (high >> 4 * i & 15) << 32) << 4 for i in range(4))
    boxes = [words[13] >> 24, *(words[14] >> 8 * i & 255 for i in range(4))]
    return TensorMap(
        address=words[0] | words[1] << 32,
        kind=kind,
        element=element,
        extents=_in_bytes([word + 1 for word in words[8 : 8 + rank]], kind),
        strides=(element, *outer[: rank - 1]),
        box=_in_bytes([size + 1 for size in boxes[:rank]], kind),
        steps=tuple((words[13] >> 3 * i & 7) + 1 for i in range(rank)),
        swizzle=(0, 32, 64, 128)[flags >> 13 & 3],
        fill_nan=bool(flags >> 15 & 1),
        atom=atom,
    )


def _in_bytes(lengths: list[int], kind: str) -> tuple[int, ...]:
    """Lengths in elements, the innermost in bytes if elements are smaller."""
    bits = PACKED[kind][0] if kind in PACKED else 8
    return (lengths[0] * bits // 8, *lengths[1:])


def packed_length(nbytes: int, kind: str) -> int:
    """Elements in so many bytes of a ``PACKED`` type; as given for other types."""
    return nbytes * 8 // PACKED[kind][0] if kind in PACKED else nbytes


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
    words[2] |= (tensor.kind == "tf32") << 16 | _ATOMS.index(tensor.atom) << 19
    for i, stride in enumerate(tensor.strides[1:]):
        words[3 + i] = stride >> 4 & 0xFFFF_FFFF
        words[7] |= (stride >> 36) << 4 * i
    inner_extent, inner_box = (
        packed_length(lengths[0], tensor.kind) for lengths in (tensor.extents, tensor.box)
    )
    for i, extent in enumerate((inner_extent, *tensor.extents[1:])):
        words[8 + i] = extent - 1
        words[13] |= (tensor.steps[i] - 1) << 3 * i
    words[13] |= (inner_box - 1) << 24
    for i, size in enumerate(tensor.box[1:]):
        words[14] |= (size - 1) << 8 * i
    return struct.pack("<16I", *words) + bytes(MAP_BYTES - 64)


def driver_type(data_type: int) -> str:
    """The element type that a CUtensorMapDataType names.

    Raises:
        InvalidArgumentError: no type has this number.
    """
    if not 0 <= data_type < len(_DRIVER_TYPES):
        raise InvalidArgumentError("a tensor map type that is not simulated", got=data_type)
    return _DRIVER_TYPES[data_type]


def swizzled_chunks(start: int, nbytes: int, swizzle: int, atom: int = 16) -> np.ndarray:
    """Where the 16-byte chunks of a box lie: chunk numbers for offsets ``start`` on, in order.

    The swizzle exchanges address bits 4 and up with bits 7 and up of the absolute address (PTX ISA
    5.5.7): 128 bytes ``4-6 ^= 7-9``, 64 bytes ``4-5 ^= 7-8``, 32 bytes ``4 ^= 7``; with atoms of 32
    bytes ``5-6 ^= 7-8``, of 64 bytes ``6 ^= 7``.
    """
    chunks = np.arange(start >> 4, (start + nbytes) >> 4)
    if swizzle:
        shift = atom.bit_length() - 5
        chunks ^= (chunks >> 3 & (swizzle // atom - 1)) << shift
    return chunks


def expand(data: np.ndarray, padded: int) -> np.ndarray:
    """Packed bytes as they lie in shared memory: ``padded`` of each 16, the rest is undefined."""
    if not padded:
        return data
    out = np.full((data.size // padded, 16), 0xFF, np.uint8)
    out[:, :padded] = data.reshape(-1, padded)
    return out.reshape(-1)
