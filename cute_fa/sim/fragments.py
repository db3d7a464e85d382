"""Where matrix elements lie in the registers of a warp (PTX ISA 9.7.14.5, 9.7.15.5).

All operands of ``mma.sync`` with ``.row.col`` layout, and of ``ldmatrix`` and ``stmatrix``, are
made of one thing: a *core matrix* of 8 rows by 16 bytes held in one 32-bit register of a warp. With
``g = lane // 4`` and ``t = lane % 4``, lane ``4g + t`` holds row ``g``, bytes ``4t … 4t+3``. (For
f64 a core matrix is 8 rows by 4 elements in one 64-bit register.)

* A (m × k): core matrices down the rows first, then along k: register ``j`` is row block
  ``j % (m/8)``, k block ``j // (m/8)``.
* B (k × n) is held as its transpose (n × k): one row block, register ``j`` is k block ``j``.
* C and D (m × n): an 8 × 8 block takes two 32-bit (or 64-bit) registers, which hold columns
  ``2t`` and ``2t+1`` of row ``g``; with f16 accumulators both share one register.

So operand tiles of any size are grids of registers, and one function decodes them; a chain of
``mma.sync`` over k, or a row of them over n, is one matrix product of larger grids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cute_fa.sim.isa import minifloat

CORE_ROWS = 8


def operand_position(
    lane: int, register: int, element: int, *, row_blocks: int, per_register: int
) -> tuple[int, int]:
    """(row, k) of one element of A, or (n, k) of B with ``row_blocks=1``.

    Args:
        element: its place in the register, 0 in the lowest bits.
        row_blocks: m / 8 for A.
        per_register: elements per register: 4 for 8-bit types, 2 for 16-bit, 1 for tf32 and f64.
    """
    group, thread = divmod(lane, 4)
    row = group + CORE_ROWS * (register % row_blocks)
    k = per_register * thread + 4 * per_register * (register // row_blocks) + element
    return row, k


def accumulator_position(lane: int, element: int) -> tuple[int, int]:
    """(row, column) of element ``element`` of C or D: 4 elements for m16n8, 2 for m8n8."""
    group, thread = divmod(lane, 4)
    return group + CORE_ROWS * (element // 2), 2 * thread + element % 2


def pack_operand(registers: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Put a grid of core matrices in order.

    Args:
        registers: ``registers[row_block][k_block]``: arrays ``(w, c, 32)``, uint32 (or 64-bit).

    Returns:
        ``(w, c, 8 * row_blocks, 4 * k_blocks)`` of the registers' dtype: each row is the operand's
        bytes along k.
    """
    first = registers[0][0]
    shape = first.shape[:-1]
    packed = np.empty((*shape, len(registers), CORE_ROWS, len(registers[0]), 4), first.dtype)
    for i, row in enumerate(registers):
        for j, register in enumerate(row):
            packed[..., i, :, j, :] = register.reshape(*register.shape[:-1], CORE_ROWS, 4)
    return packed.reshape(*shape, len(registers) * CORE_ROWS, len(registers[0]) * 4)


def operand_grid(registers: Sequence[np.ndarray], row_blocks: int) -> list[list[np.ndarray]]:
    """One instruction's A (``row_blocks = m/8``) or B (1) registers as a grid of core matrices."""
    return [list(registers[i::row_blocks]) for i in range(row_blocks)]


def _decode_f16(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.float16).astype(np.float32)


def _decode_bf16(packed: np.ndarray) -> np.ndarray:
    out = np.empty((*packed.shape, 2), np.uint32)
    np.left_shift(packed, np.uint32(16), out=out[..., 0])
    np.bitwise_and(packed, np.uint32(0xFFFF_0000), out=out[..., 1])
    return out.view(np.float32).reshape(*packed.shape[:-1], -1)


def _decode_tf32(packed: np.ndarray) -> np.ndarray:
    """The tensor core ignores the low 13 bits of a tf32 operand."""
    return (packed & np.uint32(0xFFFF_E000)).view(np.float32)


def _decode_f64(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.float64)


def _decode_s8(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.int8).astype(np.float32)


def _decode_u8(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.uint8).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The 4-bit elements of packed rows, the lower half of each byte first."""
    codes = packed.view(np.uint8)
    out = np.empty((*codes.shape, 2), np.uint8)
    np.bitwise_and(codes, np.uint8(15), out=out[..., 0])
    np.right_shift(codes, np.uint8(4), out=out[..., 1])
    return out.reshape(*codes.shape[:-1], -1)


def _decode_s4(packed: np.ndarray) -> np.ndarray:
    return ((_nibbles(packed) << np.uint8(4)).view(np.int8) >> np.int8(4)).astype(np.float32)


def _decode_u4(packed: np.ndarray) -> np.ndarray:
    return _nibbles(packed).astype(np.float32)


def _decode_e2m1(packed: np.ndarray) -> np.ndarray:
    return minifloat.decode(_nibbles(packed), "e2m1")


def _decode_byte(name: str, shift: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of a small float in bits ``shift`` and up of each byte; the rest is padding."""
    mask = np.uint8((1 << minifloat.FORMATS[name].bits) - 1)

    def decode(packed: np.ndarray) -> np.ndarray:
        return minifloat.decode(packed.view(np.uint8) >> np.uint8(shift) & mask, name)

    return decode


DECODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f16": _decode_f16,
    "bf16": _decode_bf16,
    "tf32": _decode_tf32,
    "f64": _decode_f64,
    "s8": _decode_s8,
    "u8": _decode_u8,
    "s4": _decode_s4,
    "u4": _decode_u4,
    "e4m3": _decode_byte("e4m3"),
    "e5m2": _decode_byte("e5m2"),
    "e3m2": _decode_byte("e3m2"),
    "e2m3": _decode_byte("e2m3"),
    "e2m1": _decode_e2m1,
    "e2m1_padded": _decode_byte("e2m1", shift=2),
}
"""For each operand type: packed rows → float32 (float64 for f64) rows along k, exact.

The 6-bit types and ``e2m1_padded`` lie in bytes, in the lower 6 and the middle 4 bits.
"""

ELEMENTS_PER_REGISTER = {
    "f16": 2,
    "bf16": 2,
    "tf32": 1,
    "f64": 1,
    "s8": 4,
    "u8": 4,
    "s4": 8,
    "u4": 8,
    "e4m3": 4,
    "e5m2": 4,
    "e3m2": 4,
    "e2m3": 4,
    "e2m1": 8,
    "e2m1_padded": 4,
}


def operand_matrix(registers: Sequence[Sequence[np.ndarray]], kind: str) -> np.ndarray:
    """Decode a grid of registers: A as (w, c, m, k), or B as its transpose (w, c, n, k)."""
    return DECODERS[kind](pack_operand(registers))


def split_accumulators(product: np.ndarray) -> list[np.ndarray]:
    """A result as registers.

    Args:
        product: ``(w, c, m, n)``, n a multiple of 8.

    Returns:
        views ``(w, c, 32)``: for each block of 8 columns, for each block of 8 rows, the elements of
        columns 2t and 2t+1: the register order of one ``mma.sync`` per block of columns.
    """
    *shape, m, n = product.shape
    out = []
    for column in range(0, n, 8):
        for row in range(0, m, 8):
            block = product[..., row : row + 8, column : column + 8]
            pairs = block.reshape(*shape, 32, 2)
            out += [pairs[..., 0], pairs[..., 1]]
    return out


def unpack_halves(registers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """f16 accumulators, two to a uint32 register, as one float32 array per element."""
    out = []
    for register in registers:
        halves = np.ascontiguousarray(register).view(np.float16).astype(np.float32)
        pairs = halves.reshape(*register.shape, 2)
        out += [pairs[..., 0], pairs[..., 1]]
    return out


def pack_halves(elements: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Inverse of :func:`unpack_halves`, rounding to nearest even."""
    out = []
    for low, high in zip(elements[::2], elements[1::2], strict=True):
        pairs = np.empty((*low.shape, 2), np.float16)
        pairs[..., 0] = low
        pairs[..., 1] = high
        out.append(pairs.view(np.uint32)[..., 0])
    return out


def transpose_core(register: np.ndarray) -> np.ndarray:
    """Transpose core matrices of 16-bit elements: uint32 ``(…, 32)`` each, one per last axis."""
    register = np.ascontiguousarray(register)
    elements = register.view(np.uint16).reshape(*register.shape[:-1], 8, 8)
    turned = np.ascontiguousarray(elements.swapaxes(-1, -2))
    return turned.reshape(*register.shape[:-1], 64).view(np.uint32)
