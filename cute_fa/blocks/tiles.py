"""Shared-memory tile geometry as plain integers, so that configs can reason without the DSL.

A tile is ``rows × columns`` of 16-bit elements, row-major, cut into column panels. A panel is 64,
32 or 16 elements wide (128, 64 or 32 bytes) and its 16-byte chunks are XOR-swizzled over 8 rows, so
that ``ldmatrix`` (8 rows, one chunk each) and 16-byte copies both touch all 32 banks once.
"""

from __future__ import annotations

CHUNK_BYTES = 16
PANEL_ELEMENT_BYTES = 2
"""What panels are made of: 16-bit numbers, or pairs of e4m3 numbers (``blocks.fp8``)."""

WARP_THREADS = 32
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_THREADS
SMEM_ALIGN_BYTES = 1024
"""Where the widest swizzle pattern (128 bytes, 8 rows) repeats; every tile starts on it."""

MMA_M, MMA_N, MMA_K = 16, 8, 16
"""The one tensor-core shape of the mma.sync rungs: m16n8k16 (PTX ISA, mma.sync.m16n8k16)."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def panel_columns(columns: int) -> int:
    """Width in elements of the widest swizzled panel (64, 32 or 16) that divides ``columns``.

    Raises:
        ValueError: ``columns`` is not a multiple of 16.
    """
    for width in (64, 32, 16):
        if columns % width == 0:
            return width
    raise ValueError(f"a tile of {columns} columns has no swizzle: expected a multiple of 16")


def swizzle_bits(columns: int) -> int:
    """How many address bits the swizzle of such a panel XORs: 3, 2 or 1 for 8, 4 or 2 chunks."""
    return {64: 3, 32: 2, 16: 1}[panel_columns(columns)]


def rows_per_copy(num_threads: int, columns: int, element_bytes: int = 2) -> int:
    """Rows that one 16-byte copy by every thread covers in one panel."""
    return num_threads // (panel_columns(columns) * element_bytes // CHUNK_BYTES)


def tile_bytes(rows: int, columns: int, element_bytes: int = 2) -> int:
    """Bytes of a ``rows × columns`` tile."""
    return rows * columns * element_bytes
