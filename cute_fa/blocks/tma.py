"""Tiles between global and shared memory by TMA.

A copy names the corner of a box and TMA does the rest: addresses, swizzle, and the edges. Rows and
columns of the box outside the tensor read as zeros and are not written (PTX ISA, "Tensor-mode
copies", out-of-bound access). A box is one panel wide (``blocks.tiles``), so a tile takes one
instruction per panel. The dimensions of a tensor map, fastest first:

    dense (B, S, H, D)     D · [G ·] S · H · B        an edge at the end of every sequence
    packed (T, H, D)       D · [G ·] box · T + 1 · H  *ragged*: see below

G is there where the query heads of a group share a tile (``blocks.pack_gqa``), and H then counts
groups.

Sequences that stand one behind the other have no edge between them, so one is made. The dimension
``box`` is only as long as a box is high, and has the stride of T. A copy that wants the first n
rows of a box begins at box − n, where all but n rows are outside, and takes back in T what it goes
too far: from row r on, its coordinates are (box − n, r + n), and row i of it is row

    (box − n + i) + (r + n) − box = r + i        of the tensor, i < n,

if the tensor map begins ``box`` rows before the tensor. No address before the tensor is ever made,
whatever follows a sequence is neither read nor written, and the rows that its tile has left are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import cpasync, tcgen05

from cute_fa.blocks.seqlen import Sequence
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
class Rows:
    """The rows of one head of one sequence.

    Attributes:
        batch: the sequence, where the tensor has a batch mode.
        offset: its first row, where the tensor is packed; else None.
        length: its rows.
    """

    batch: cutlass.Int32
    offset: cutlass.Int32 | None
    length: cutlass.Int32

    @staticmethod
    def of_queries(sequence: Sequence) -> Rows:
        return Rows(sequence.batch, sequence.offset_q, sequence.seqlen.seqlen_q)

    @staticmethod
    def of_keys(sequence: Sequence) -> Rows:
        return Rows(sequence.batch, sequence.offset_k, sequence.seqlen.seqlen_k)


@dataclass(frozen=True)
class TmaTensor:
    """A global tensor as TMA sees it, cut into tiles of one shape.

    Attributes:
        atom: the copy, with the tensor map.
        coords: the tensor's coordinates, (rows, D, H, B) or, ragged, (box, D, T + 1, H).
        rows, columns: the tile.
        group: query heads in a tile; ``rows`` / ``group`` are its rows of the tensor.
        is_ragged: whether the tensor is packed.
        cta_mask: of tiles that are copied to the same place in several CTAs of a cluster, a bit for
            each of these; else 0.
    """

    atom: cute.CopyAtom
    coords: cute.Tensor
    rows: cutlass.Constexpr
    columns: cutlass.Constexpr
    group: cutlass.Constexpr
    is_ragged: cutlass.Constexpr
    cta_mask: cutlass.Constexpr = 0

    def prefetch(self) -> None:
        """Bring the tensor map near; by one thread."""
        cpasync.prefetch_descriptor(self.atom)

    def tile(
        self, sX: cute.Tensor, rows: Rows, head, block, column=0
    ) -> tuple[cute.Tensor, cute.Tensor]:
        """The copy's view of shared memory (TMA, stage) and of tile ``block`` of one head (TMA,).

        ``head`` counts groups where they share a tile. ``block`` may lie past the sequence's end.
        The tile begins at ``column``.
        """
        height = self.rows // self.group
        start = block * height
        if self.is_ragged:
            inside = cutlass.max(cutlass.min(rows.length - start, height), 0)
            coords = self.coords[None, None, rows.offset + start + inside, head]
            corner = height - inside
        else:
            coords = self.coords[None, None, head, rows.batch]
            corner = start
        coords = cute.domain_offset((_rows_mode(self.group, 0, corner), column), coords)
        shape = (_rows_mode(self.group, self.group, height), self.columns)
        layout = cute.make_layout(shape, stride=coords.layout.stride)
        return cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(sX, 0, 2),
            cute.group_modes(cute.make_tensor(coords.iterator, layout), 0, 2),
        )

    def copy(self, src: cute.Tensor, dst: cute.Tensor, full: cute.Pointer) -> None:
        """Start the copy of a tile, src (TMA,) to dst (TMA,); its bytes count at ``full``, in every
        CTA that they come to."""
        if self.cta_mask:
            mask = cutlass.Int16(self.cta_mask)
            cute.copy(self.atom, src, dst, tma_bar_ptr=full, mcast_mask=mask)
        else:
            cute.copy(self.atom, src, dst, tma_bar_ptr=full)


def _rows_mode(group: int, of_head, of_row):
    """The mode of a tile's rows: the head of the group goes fastest, if there is more than one."""
    return of_row if group == 1 else (of_head, of_row)


def _as_tma_sees(mX: cute.Tensor, height: int, group: int) -> cute.Tensor:
    """``mX`` with its modes as the module says, for tiles ``height`` rows of the tensor high."""
    *batch, length, heads, head_dim = mX.shape
    *batch_stride, row_stride, head_stride, _ = mX.stride
    row_mode_stride = _rows_mode(group, head_stride, row_stride)
    group_stride = head_stride * group
    if batch:
        shape = (_rows_mode(group, group, length), head_dim, heads // group, *batch)
        stride = (row_mode_stride, 1, group_stride, *batch_stride)
        return cute.make_tensor(mX.iterator, cute.make_layout(shape, stride=stride))
    shape = (_rows_mode(group, group, height), head_dim, length + 1, heads // group)
    stride = (row_mode_stride, 1, row_stride, group_stride)
    start = mX.iterator - height * row_stride
    return cute.make_tensor(start, cute.make_layout(shape, stride=stride))


def _tma_tensor(op, mX: cute.Tensor, rows: int, columns: int, group: int) -> TmaTensor:
    height = rows // group
    smem = cute.make_composed_layout(panel_swizzle(columns), 0, panel_layout(rows, columns))
    tiler = (_rows_mode(group, group, height), columns)
    atom, coords = cpasync.make_tiled_tma_atom(op, _as_tma_sees(mX, height, group), smem, tiler)
    return TmaTensor(atom, coords, rows, columns, group, is_ragged=cute.rank(mX) == 3)


def tma_load(
    mX: cute.Tensor,
    rows: int,
    columns: int,
    group: int = 1,
    is_paired: bool = False,
    num_receivers: int = 1,
) -> TmaTensor:
    """``mX`` (B, S, H, D) or (T, H, D) as a source of tiles; made on the host.

    Args:
        rows, columns: the tile; columns ≥ D are padding.
        group: heads that share a tile; it divides ``rows`` and H.
        is_paired: the bytes count at the mbarrier of the leading CTA of a pair (``.cta_group::2``).
        num_receivers: CTAs of a cluster, all of it, that get each tile.
    """
    if num_receivers > 1:
        tensor = _tma_tensor(cpasync.CopyBulkTensorTileG2SMulticastOp(), mX, rows, columns, group)
        return replace(tensor, cta_mask=(1 << num_receivers) - 1)
    ctas = tcgen05.CtaGroup.TWO if is_paired else tcgen05.CtaGroup.ONE
    return _tma_tensor(cpasync.CopyBulkTensorTileG2SOp(ctas), mX, rows, columns, group)


def tma_store(mX: cute.Tensor, rows: int, columns: int, group: int = 1) -> TmaTensor:
    """``mX`` as a destination of tiles, arguments as ``tma_load``; made on the host."""
    return _tma_tensor(cpasync.CopyBulkTensorTileS2GOp(), mX, rows, columns, group)
