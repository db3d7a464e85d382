"""Operands of tcgen05 products: packed bytes to numbers, scale factors, accumulators.

Numbers are float32, exactly what the bits say. 4- and 6-bit floats are packed in three ways
(PTX ISA 9.7.16.10.4): two to a byte for the ``mxf4`` kinds; for the mixed kinds in shared memory
sixteen to 16 bytes, with padding behind them; and for the mixed kinds in tensor memory one to a
byte, e2m1 in bits 2-5 and the 6-bit types in bits 0-5.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cute_fa.sim.fragments import DECODERS
from cute_fa.sim.isa import minifloat

SUBPARTITION = 32  # lanes
_FLOAT6 = ("e2m3", "e3m2")


@lru_cache(maxsize=8)
def _nibble_pairs(kind: str) -> np.ndarray:
    """float32 ``(256, 2)``: both elements of a byte, the low nibble first."""
    codes = np.arange(256)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return minifloat.decode(pairs, kind)


def _split6(packed: np.ndarray) -> np.ndarray:
    """6-bit codes of bytes ``(…, 3 n)``: ``(…, 4 n)``."""
    wide = packed.reshape(*packed.shape[:-1], -1, 3).astype(np.uint32)
    word = wide[..., 0] | wide[..., 1] << np.uint32(8) | wide[..., 2] << np.uint32(16)
    shifts = np.array([0, 6, 12, 18], np.uint32)
    codes = word[..., None] >> shifts & np.uint32(63)
    return codes.reshape(*packed.shape[:-1], -1)


def decode_shared(data: np.ndarray, kind: str, *, packed4: bool) -> np.ndarray:
    """Rows of a K-major operand from shared memory: float32 ``(rows, k)``.

    Args:
        data: uint8 ``(rows, bytes)``, whole chunks of 16 bytes.
        packed4: two 4-bit elements to a byte without padding.
    """
    if kind == "e2m1":
        if packed4:
            return _nibble_pairs(kind)[data].reshape(data.shape[0], -1)
        chunks = data.reshape(data.shape[0], -1, 16)[..., :8]
        return _nibble_pairs(kind)[chunks].reshape(data.shape[0], -1)
    if kind in _FLOAT6:
        chunks = data.reshape(data.shape[0], -1, 16)[..., :12]
        return minifloat.decode(_split6(chunks), kind).reshape(data.shape[0], -1)
    return DECODERS[kind](data.view(np.uint32))


def decode_transposed(data: np.ndarray, kind: str, rows: int) -> np.ndarray:
    """An MN-major operand from shared memory: float32 ``(rows, k)``.

    Args:
        data: uint8 ``(k, bytes)``: for each k, at least ``rows`` elements.
    """
    width = {"f16": 2, "bf16": 2, "tf32": 4}.get(kind, 1)
    turned = np.ascontiguousarray(data.view(f"u{width}")[:, :rows].T)
    if turned.shape[1] * width % 4:
        raise AssertionError("every k extent is a multiple of 4 bytes")
    return DECODERS[kind](turned.view(np.uint32))


def decode_tensor_memory(words: np.ndarray, kind: str, *, packed4: bool) -> np.ndarray:
    """Rows of A from tensor memory: uint32 ``(lanes, columns)`` to float32 ``(lanes, k)``."""
    if kind == "e2m1" and packed4:
        return decode_shared(words.view(np.uint8), kind, packed4=True)
    if kind == "e2m1":
        return minifloat.decode(words.view(np.uint8) >> 2 & 15, kind)
    if kind in _FLOAT6:
        return minifloat.decode(words.view(np.uint8) & 63, kind)
    return DECODERS[kind](words)


def decode_scales(codes: np.ndarray, kind: str) -> np.ndarray:
    """Scale factors as float64: ue8m0, or ue4m3 (e4m3 without its sign)."""
    if kind == "ue8m0":
        return minifloat.decode(codes, "ue8m0").astype(np.float64)
    return minifloat.decode(codes & 0x7F, "e4m3").astype(np.float64)


def scale_columns(rows: int) -> int:
    """Columns of tensor memory that hold the scale factors of ``rows`` rows: 32 to a column."""
    return -(-rows // SUBPARTITION)


def read_scales(
    cells: np.ndarray, column: int, rows: int, per_row: int, first_byte: int, partition: int
) -> np.ndarray:
    """Scale factor codes ``(rows, per_row)`` of one 32-lane partition (9.7.16.10.7.2 and .3).

    Row r is in lane ``r % 32`` of the partition and column ``r // 32``; its factors are bytes of
    that word.

    Args:
        cells: uint32 ``(512 columns, 128 lanes)`` of one CTA.
        first_byte: the scale factor id.
    """
    low = partition * SUBPARTITION
    words = cells[column : column + scale_columns(rows), low : low + SUBPARTITION]
    codes = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)[:rows]
    return codes[:, first_byte : first_byte + per_row]
