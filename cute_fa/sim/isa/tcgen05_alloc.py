"""``tcgen05.alloc``, ``dealloc`` and ``relinquish_alloc_permit`` (PTX ISA 9.7.16.7.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Mask, WaitReason, blocking, effect
from cute_fa.sim.isa.tcgen05_mma import TensorInstruction
from cute_fa.sim.tensor_allocation import Request, TensorAllocation
from cute_fa.sim.tensor_memory import check_whole_warps

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext


class _Management(TensorInstruction):
    """What the three share: going through the executing warps."""

    counter_class = "tmem_alloc"
    collective = True

    def warps(self, ctx: BlockContext, mask: Mask) -> list[tuple[int, int, int]]:
        """(w, c, first active lane) of every executing warp, in the rectangle's coordinates."""
        active = ctx.lanes.dense_mask() if mask is None else mask
        check_whole_warps(ctx, mask)
        if self.mixed:
            text = "tcgen05 instructions with .cta_group::1 and with .cta_group::2 in one kernel"
            report_lanes(ctx, "tensor-cta-group", text, active)
        where = np.argwhere(active.any(axis=-1))
        return [(int(w), int(c), int(active[w, c].argmax())) for w, c in where]

    def check_uniform(self, ctx: BlockContext, mask: Mask, *operands: np.ndarray) -> None:
        """All lanes of a warp must give the same operands."""
        for operand in operands:
            uneven = operand != operand[..., :1]
            if mask is not None:
                uneven &= mask & mask[..., :1]
            if uneven.any():
                text = "the lanes of a warp give different operands"
                report_lanes(ctx, "tmem-operands", text, uneven)


@blocking("tcgen05.alloc")
class Alloc(_Management):
    """``tcgen05.alloc.cta_group.sync.aligned{.shared::cta}.b32 [dst], nCols``.

    Holds the warp until there are enough columns; then writes their address to shared memory.
    """

    own_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]
        self.source_dtypes = None, np.dtype(np.uint32)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        addresses, counts = sources
        unit: TensorAllocation = ctx.subsystem(TensorAllocation.name)
        w0, _, c0, _ = ctx.rect
        asked: dict[tuple[int, int], Request] = unit.asked
        columns = np.zeros(addresses.shape, np.uint32)
        writers = np.zeros(addresses.shape, bool)
        waiting = []
        for w, c, lane in self.warps(ctx, mask):
            key = w0 + w, c0 + c
            request = asked.get(key)
            if request is None:
                self.check_uniform(ctx, mask, addresses, counts)
                request = Request(c0 + c, w0 + w, int(counts[w, c, lane]), self.pair, self.instr)
                if not unit.request(ctx, request):
                    continue
                asked[key] = request
            waiting.append((w, c, lane, request))
        for w, c, lane, request in waiting:
            if request.column is None:
                held = np.zeros(ctx.lanes.shape, bool)
                held[w, c] = True
                reason = WaitReason(f"waits for {request.columns} columns of tensor memory")
                request.ticket = ctx.park(held, reason, retry=True)
                continue
            del asked[w0 + w, c0 + c]
            columns[w, c] = request.column
            writers[w, c, lane] = True
        if writers.any():
            ctx.subsystem("shared").store(ctx, addresses, 4, columns, writers)
        return None


@blocking("tcgen05.dealloc")
class Dealloc(_Management):
    """``tcgen05.dealloc.cta_group.sync.aligned.b32 taddr, nCols``."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]
        self.source_dtypes = np.dtype(np.uint32), np.dtype(np.uint32)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        addresses, counts = sources
        unit: TensorAllocation = ctx.subsystem(TensorAllocation.name)
        self.check_uniform(ctx, mask, addresses, counts)
        w0, _, c0, _ = ctx.rect
        going = ctx.lanes
        for w, c, lane in self.warps(ctx, mask):
            request = Request(c0 + c, w0 + w, int(counts[w, c, lane]), self.pair, self.instr)
            if not unit.give_back(ctx, request, int(addresses[w, c, lane])):
                held = np.zeros(ctx.lanes.shape, bool)
                held[w, c] = True
                reason = WaitReason("waits for the peer CTA to deallocate tensor memory")
                request.ticket = ctx.park(held, reason)
        return ctx.not_parked(going)


@effect("tcgen05.relinquish_alloc_permit")
class Relinquish(_Management):
    """``tcgen05.relinquish_alloc_permit.cta_group.sync.aligned``: the CTA allocates no more."""

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        unit: TensorAllocation = ctx.subsystem(TensorAllocation.name)
        for _, c, _ in self.warps(ctx, mask):
            slot = ctx.rect[2] + c
            unit.relinquished[slot] = unit.relinquished[slot] or self.instr
