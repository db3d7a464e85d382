"""Tensor copies, TMA (PTX ISA 9.7.9.27): boxes of up to five dimensions, both ways, and reductions.

Coordinates are given innermost first and may lie outside the tensor: what is read there is zero (or
NaN), what is written there is dropped, and both count as bytes of the copy. Shared memory holds the
box with the innermost dimension first, swizzled on absolute address bits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.addresses import RANK_SHIFT
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.boxes import Box, Rows, map_at
from cute_fa.sim.bulk import BulkGroups, Target, land
from cute_fa.sim.isa import Mask, effect
from cute_fa.sim.isa.bulk_copy import BulkInstruction, Thread
from cute_fa.sim.memory import Region
from cute_fa.sim.tensor_map import TensorMap, expand
from cute_fa.sim.tensor_map_changes import TensorMapChanges

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

SHARED_ALIGNMENT = 128


@effect("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
class TensorCopy(BulkInstruction):
    """``cp.async.bulk.tensor.Nd`` and ``cp.reduce.async.bulk.tensor.Nd`` in the ``.tile`` modes.

    ``.tile::gather4`` loads and ``.tile::scatter4`` stores four rows of a matrix; their coordinates
    are a column and four rows.
    """

    counter_class = "tensor_copy"
    allowed = frozenset(
        (
            *("tensor", "tile", "tile::gather4", "tile::scatter4", "cta_group::2"),
            *("1d", "2d", "3d", "4d", "5d"),
        )
    )

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        for part in instr.parts:
            if part.startswith("im2col"):
                self.instr = instr
                raise self.unsupported(f"mode .{part}")
        super().__init__(instr, kernel)
        self.rank = next(
            int(part[0]) for part in instr.parts if part in self.allowed and part[1:] == "d"
        )
        wanted = 2 + self.signals + self.multicast
        if len(self.operands) != wanted:
            raise self.unsupported("operands")
        self.loads = self.source == "global"
        if self.pair and not (self.loads and self.signals):
            raise self.unsupported(".cta_group without an mbarrier")
        self.rows = "tile::gather4" in instr.parts or "tile::scatter4" in instr.parts
        if self.rows and (
            self.rank != 2
            or self.loads != ("tile::gather4" in instr.parts)
            or self.operator is not None
        ):
            raise self.unsupported("a gather that does not load, or a scatter that does not store")
        tensor = self.operands[1 if self.loads else 0]
        wanted = 5 if self.rows else self.rank
        if not isinstance(tensor, ptx.TensorAddress) or len(tensor.coords) != wanted:
            raise self.unsupported("coordinates")
        self.sources = self.operands
        self.source_dtypes = tuple(
            np.dtype(np.int32) if isinstance(operand, ptx.TensorAddress) else None
            for operand in self.operands
        )

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        w0, _, c0, _ = ctx.rect
        if self.loads:
            shared, (maps, coordinates) = sources[:2]
        else:
            (maps, coordinates), shared = sources[:2]
        if self.loads or self.operator is not None:
            lanes = self.threads(ctx, mask)
        else:
            lanes = self.distinct(ctx, mask, maps, shared, *coordinates)
        for w, c, lane in lanes:
            thread = c0 + c, w0 + w, lane
            at = w, c, lane
            tensor = self._tensor(ctx, thread, int(maps[at]))
            if tensor is None:
                continue
            ctx.counters.add("tensor_copies", 1)
            box = self._box(ctx, thread, tensor, tuple(int(x[at]) for x in coordinates))
            if box is None:
                continue
            if self.loads:
                ranks = int(sources[3][at]) if self.multicast else None
                self._load(ctx, thread, box, int(shared[at]), int(sources[2][at]), ranks)
            else:
                self._store(ctx, thread, box, int(shared[at]))

    def _tensor(self, ctx: BlockContext, thread: Thread, address: int) -> TensorMap | None:
        """The tensor map at an address, if it is one for this instruction."""
        changes: TensorMapChanges = ctx.subsystem(TensorMapChanges.name)
        changes.use(ctx, thread[0], thread[1], address)
        try:
            tensor = map_at(ctx.wave, address)
        except InvalidArgumentError as error:
            report_warp(ctx, "tensor-map", str(error), thread[0], thread[1], address=address)
            return None
        faults = tensor.faults()
        if tensor.rank != self.rank:
            faults.append(f"it has {tensor.rank} dimensions, the instruction {self.rank}")
        if faults:
            text = "; ".join(faults)
            report_warp(ctx, "tensor-map", text, thread[0], thread[1], address=address)
            return None
        return tensor

    def _box(
        self, ctx: BlockContext, thread: Thread, tensor: TensorMap, coordinates: tuple[int, ...]
    ) -> Box | Rows | None:
        """The box at these coordinates, if it may be there."""
        try:
            first = tensor.first_byte(coordinates[0])
            if self.rows:
                return Rows(tensor, first, coordinates[1:])
            return Box(tensor, (first, *coordinates[1:]))
        except InvalidArgumentError as error:
            report_warp(ctx, "bulk-operands", str(error), thread[0], thread[1])
            return None

    def _load(
        self,
        ctx: BlockContext,
        thread: Thread,
        box: Box | Rows,
        address: int,
        signal: int,
        ranks: int | None,
    ) -> None:
        nbytes = box.tensor.shared_bytes
        targets = []
        if ranks is None:
            self._check_signal(ctx, thread, address >> RANK_SHIFT, signal >> RANK_SHIFT)
        for slot, offset, bar in self.places(ctx, thread, address, signal, ranks):
            where = int(ctx.wave.cta_rank[slot]) << RANK_SHIFT | offset
            if self.shared_place(ctx, thread, where, nbytes, SHARED_ALIGNMENT) is not None:
                targets.append(Target.box(ctx, slot, offset, box.tensor, bar))
        region = None
        if box.inside is not None:
            region = self.global_region(ctx, thread, box)
            if region is None:
                return
        if targets:
            self.count(ctx, "read", box, nbytes * len(targets))
            issuer = Issuer(thread[0], thread[1], thread[1] + 1)
            land(ctx, issuer, targets, partial(_fetch, box, region))

    def _check_signal(self, ctx: BlockContext, thread: Thread, place: int, signal: int) -> None:
        """The barrier is in the destination's CTA, or with ``.cta_group::2`` in its pair."""
        if place == signal or (self.pair and place ^ 1 == signal):
            return
        text = f"a copy to CTA {place} of the cluster signals an mbarrier of CTA {signal}"
        report_warp(ctx, "bulk-operands", text, thread[0], thread[1])

    def _store(self, ctx: BlockContext, thread: Thread, box: Box | Rows, address: int) -> None:
        nbytes = box.tensor.box_bytes
        if box.tensor.padded:
            text = f"elements of {box.tensor.kind} are only copied into shared memory"
            report_warp(ctx, "bulk-operands", text, thread[0], thread[1])
            return
        place = self.shared_place(ctx, thread, address, nbytes, SHARED_ALIGNMENT)
        if place is None:
            return
        source = Target.box(ctx, *place, box.tensor)
        self.count(ctx, "written", box, nbytes)
        unit: BulkGroups = ctx.subsystem(BulkGroups.name)
        if box.inside is None:
            unit.issue(ctx, thread, source, _drop)
            return
        region = self.global_region(ctx, thread, box)
        if region is not None:
            emit = partial(box.write, region, operator=self.operator)
            unit.issue(ctx, thread, source, emit)


def _fetch(box: Box | Rows, region: Region | None) -> np.ndarray:
    """The bytes of a box as they lie in shared memory."""
    return expand(box.read(region), box.tensor.padded)


def _drop(data: np.ndarray) -> None:
    """A box that lies outside its tensor is written nowhere."""
