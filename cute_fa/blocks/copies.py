"""Tile copies of the mma.sync rungs: global → shared memory by cp.async, and results back.

Everything moves in 16-byte chunks. A chunk outside the tensor is never read: cp.async takes a
source size of 0 and fills the chunk with zeros (PTX ISA, cp.async, operand src-size).
"""

from __future__ import annotations

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import CopyUniversalOp, cpasync

from cute_fa.blocks.tiles import CHUNK_BYTES, panel_columns, swizzle_bits

COPY_BITS = 8 * CHUNK_BYTES


def shared_tile(memory: cute.Pointer, rows: int, columns: int, stages: int = 1) -> cute.Tensor:
    """The tile (rows, columns, stage) at ``memory``, in XOR-swizzled panels (``blocks.tiles``).

    The swizzle belongs to the pointer, where it acts on byte addresses: bits 4… ^= bits 7…, as many
    as number a panel row's 16-byte chunks. ``memory`` is aligned to the pattern's 1024 bytes.
    """
    panel = panel_columns(columns)
    swizzle = cute.make_swizzle(swizzle_bits(columns), 4, 3)
    atom = cute.make_layout((8, panel), stride=(panel, 1))
    layout = cute.tile_to_shape(atom, (rows, columns, stages), (0, 1, 2))
    return cute.make_tensor(cute.recast_ptr(memory, swizzle_=swizzle), layout)


def swizzled_address(pointer: cute.Pointer, columns: int) -> cutlass.Int32:
    """The shared address that ``pointer`` into a ``shared_tile`` stands for, swizzle applied."""
    address = pointer.toint()
    chunk_bits = ((1 << swizzle_bits(columns)) - 1) * CHUNK_BYTES
    return address ^ ((address >> 3) & chunk_bits)


def transposed_view(sX: cute.Tensor) -> cute.Tensor:
    """The same shared memory transposed: (rows, columns, …) → (columns, rows, …)."""
    modes = [1, 0, *range(2, cute.rank(sX))]
    return cute.make_tensor(sX.iterator, cute.select(sX.layout, mode=modes))


def _chunked_copy(
    atom: cute.CopyAtom, dtype: type, num_threads: int, columns: int
) -> cute.TiledCopy:
    """Consecutive threads take consecutive chunks of a panel row, then the next row."""
    elements = COPY_BITS // dtype.width
    threads_per_row = panel_columns(columns) // elements
    threads = cute.make_layout(
        (num_threads // threads_per_row, threads_per_row), stride=(threads_per_row, 1)
    )
    return cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, elements)))


def async_load_copy(dtype: type, num_threads: int, columns: int) -> cute.TiledCopy:
    """cp.async.cg (L2 only: a tile is read once per CTA) of 16 bytes per thread."""
    op = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    atom = cute.make_copy_atom(op, dtype, num_bits_per_copy=COPY_BITS)
    return _chunked_copy(atom, dtype, num_threads, columns)


def chunk_store_copy(dtype: type, num_threads: int, columns: int) -> cute.TiledCopy:
    """16-byte copies of registers to or from memory, threads arranged as in ``async_load_copy``."""
    atom = cute.make_copy_atom(CopyUniversalOp(), dtype, num_bits_per_copy=COPY_BITS)
    return _chunked_copy(atom, dtype, num_threads, columns)


def chunk_predicate(
    tXcX: cute.Tensor, rows: cutlass.Int32 | None, columns: int | None
) -> cute.Tensor:
    """Which chunks of a partitioned tile are inside ``rows × columns``; None bounds nothing.

    ``tXcX`` is the partitioned identity tensor of the tile, (CPY, CPY_M, CPY_K) of (row, column).
    """
    num_rows, num_columns = cute.size(tXcX, mode=[1]), cute.size(tXcX, mode=[2])
    tXpX = cute.make_rmem_tensor(
        cute.make_layout((1, num_rows, num_columns)), cutlass.Boolean
    )  # (1, CPY_M, CPY_K)
    for m in range(num_rows):
        for k in range(num_columns):
            row, column = tXcX[(0, 0), m, k]
            inside = cutlass.Boolean(True)
            if rows is not None:
                inside = row < rows
            if columns is not None:
                inside = inside & (column < columns)
            tXpX[0, m, k] = inside
    return tXpX


@cute.jit
def copy_tile(
    tiled_copy: cute.TiledCopy,
    src: cute.Tensor,
    dst: cute.Tensor,
    tXcX: cute.Tensor,
    rows: cutlass.Int32 | None,
    columns: cutlass.Constexpr,
):
    """Copy a partitioned tile, (CPY, CPY_M, CPY_K) to the same, inside ``rows × columns`` only.

    ``rows`` (dynamic) and ``columns`` (static) are counted from the tile's corner; None means that
    the tile is whole in that direction. cp.async writes zeros to the chunks outside; other copies
    leave them alone.
    """
    if cutlass.const_expr(rows is None and columns is None):
        cute.copy(tiled_copy, src, dst)
    else:
        cute.copy(tiled_copy, src, dst, pred=chunk_predicate(tXcX, rows, columns))
