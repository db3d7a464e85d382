"""Tiles between global and shared memory by TMA, for tensors (batch, sequence, head, column).

A copy names the corner of a box and TMA does the rest: addresses, swizzle, and the edges. Rows and
columns of the box outside the tensor read as zeros and are not written (PTX ISA, "Tensor-mode
copies", out-of-bound access), per batch and head, since those are dimensions of their own. A box
is one panel wide (``blocks.tiles``), so a tile takes one instruction per panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync

from cute_fa.blocks.tiles import panel_columns, swizzle_bits


def panel_layout(rows: int, columns: int) -> cute.Layout:
    """(rows, columns) in panels, 8 rows at a time; what ``panel_swizzle`` is applied to."""
    panel = panel_columns(columns)
    atom = cute.make_layout((8, panel), stride=(panel, 1))
    return cute.tile_to_shape(atom, (rows, columns), (0, 1))


def panel_swizzle(columns: int) -> cute.Swizzle:
    """The swizzle of ``copies.shared_tile``: of wgmma and TMA, 128, 64 or 32 bytes wide."""
    return cute.make_swizzle(swizzle_bits(columns), 4, 3)


def shared_tiles(memory: cute.Pointer, rows: int, columns: int, count: int, distance: int):
    """``count`` tiles at ``memory``, ``distance`` elements apart: (rows, columns, count)."""
    layout = cute.append(panel_layout(rows, columns), cute.make_layout(count, stride=distance))
    return cute.make_tensor(cute.recast_ptr(memory, swizzle_=panel_swizzle(columns)), layout)


@dataclass(frozen=True)
class TmaTensor:
    """A global tensor (S, D, H, B) as TMA sees it, cut into tiles of one shape.

    Attributes:
        atom: the copy, with the tensor map.
        coords: the tensor's coordinates, (S, D, H, B).
        rows, columns: the tile.
    """

    atom: cute.CopyAtom
    coords: cute.Tensor
    rows: cutlass.Constexpr
    columns: cutlass.Constexpr

    def prefetch(self) -> None:
        """Bring the tensor map near; by one thread."""
        cpasync.prefetch_descriptor(self.atom)

    def tiles(self, head, batch, sX: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
        """The copy's view of (shared memory (…, stage), one head's tiles (…, tile))."""
        gX = cute.local_tile(
            self.coords[None, None, head, batch], (self.rows, self.columns), (None, 0)
        )  # (rows, columns, tile)
        return cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sX, 0, 2),
            cute.group_modes(gX, 0, 2),
        )


def _tma_tensor(op, mX: cute.Tensor, rows: int, columns: int) -> TmaTensor:
    """``mX`` (B, S, H, D) for tiles of ``rows × columns``; columns ≥ D are padding."""
    mX_sdhb = cute.make_tensor(mX.iterator, cute.select(mX.layout, mode=[1, 3, 2, 0]))
    layout = cute.make_composed_layout(panel_swizzle(columns), 0, panel_layout(rows, columns))
    atom, coords = cpasync.make_tiled_tma_atom(op, mX_sdhb, layout, (rows, columns))
    return TmaTensor(atom, coords, rows, columns)


def tma_load(mX: cute.Tensor, rows: int, columns: int) -> TmaTensor:
    """``mX`` (B, S, H, D) as a source of tiles; made on the host."""
    return _tma_tensor(cpasync.CopyBulkTensorTileG2SOp(), mX, rows, columns)


def tma_store(mX: cute.Tensor, rows: int, columns: int) -> TmaTensor:
    """``mX`` (B, S, H, D) as a destination of tiles; made on the host."""
    return _tma_tensor(cpasync.CopyBulkTensorTileS2GOp(), mX, rows, columns)
