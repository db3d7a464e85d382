"""Cluster launch control (PTX ISA 9.7.13.17, 9.7.13.18).

``try_cancel`` asks for a cluster of the grid that has not been started; its answer, 16 opaque
bytes, is written to shared memory by the async proxy and counted by an mbarrier. The simulator may
refuse at any time, as hardware may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.addresses import RANK_SHIFT, SHARED_BASE, SHARED_OFFSET_MASK
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.bulk import Target, land
from cute_fa.sim.isa import Decoded, Mask, Subsystem, effect, register_names, subsystem
from cute_fa.sim.mbarriers import Mbarriers

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

RESPONSE_BYTES = 16
_MARK = 0xC1C0_C1C0
"""The fourth word of a response, which tells it from other bytes.

The ISA calls the 16 bytes opaque, but programs (cuDNN frontend's attention) take them apart without
``query_cancel``: blockIdx.x of the first CTA, y in the lower and z in the upper half of the second
word, and in bit 0 of the third whether the cluster was cancelled.
"""


@subsystem
class LaunchControl(Subsystem):
    """Which CTAs of a wave have seen a request refused: they must not ask again."""

    name = "launch-control"

    def on_wave_start(self, wave: Wave) -> None:
        self.refused: set[int] = set()


@effect("clusterlaunchcontrol.try_cancel")
class TryCancel(Decoded):
    """``clusterlaunchcontrol.try_cancel.async{.shared::cta}….b128 [addr], [mbar]``."""

    counter_class = "cluster_launch"
    ends_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        known = {"clusterlaunchcontrol", "try_cancel", "async", "shared::cta", "b128"}
        known |= {"mbarrier::complete_tx::bytes", "multicast::cluster::all"}
        self.refuse_unknown(instr.parts, known)
        self.multicast = "multicast::cluster::all" in instr.parts
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, _, c0, _ = ctx.rect
        for w, c, lane in np.argwhere(active):
            address, signal = (int(source[w, c, lane]) for source in sources)
            self._request(ctx, c0 + int(c), w0 + int(w), address, signal)

    def _request(self, ctx: BlockContext, slot: int, warp: int, address: int, signal: int) -> None:
        wave = ctx.wave
        control: LaunchControl = ctx.subsystem(LaunchControl.name)
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        if slot in control.refused:
            text = "the CTA has seen an earlier request refused and asks again"
            report_warp(ctx, "cluster-launch", text, slot, warp)
        own, offset = int(wave.cta_rank[slot]), address & SHARED_OFFSET_MASK
        if address >> RANK_SHIFT != own or signal >> RANK_SHIFT != own:
            text = "the response or its mbarrier is not in the CTA's own shared memory"
            report_warp(ctx, "cluster-launch", text, slot, warp, address=address)
            return
        if offset % RESPONSE_BYTES or not SHARED_BASE <= offset <= wave.smem_end - RESPONSE_BYTES:
            text = "16 bytes for the response, aligned, have to lie in shared memory"
            report_warp(ctx, "cluster-launch", text, slot, warp, address=address)
            return
        ranks = range(wave.cluster_size) if self.multicast else [own]
        targets = []
        for rank in ranks:
            bar = table.find(ctx, rank << RANK_SHIFT | signal & SHARED_OFFSET_MASK, slot, warp)
            if bar is None:
                continue
            table.check_fence(ctx, bar, slot, warp)
            targets.append(Target.bytes(ctx, slot - own + rank, offset, RESPONSE_BYTES, bar))
        if targets:
            land(ctx, Issuer(slot, warp, warp + 1), targets, lambda: response(wave))


def response(wave: Wave) -> np.ndarray:
    """Try to cancel a cluster and say how it went: uint8 ``(16,)``."""
    rng = wave.rng if wave.options.completion == "random" else None
    corner = None if wave.pending is None else wave.pending.cancel(rng)
    if corner is None:
        return np.array([0, 0, 0, _MARK], np.uint32).view(np.uint8)
    wave.counters.add("clusters_cancelled", 1)
    x, y, z = corner
    return np.array([x, y | z << 16, 1, _MARK], np.uint32).view(np.uint8)


@effect("clusterlaunchcontrol.query_cancel")
class QueryCancel(Decoded):
    """``clusterlaunchcontrol.query_cancel.is_canceled`` and ``.get_first_ctaid{::x|::y|::z}``.

    The CTA id of a refused request is undefined. Programs read it before they look whether it
    counts, so that it is not reported: it is a number that no grid has.
    """

    counter_class = "cluster_launch"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.what, _, axis = instr.parts[2].partition("::")
        names = register_names(instr.operands[0])
        if self.what == "is_canceled":
            self.dests, self.dest_dtypes = names, [np.dtype(bool)]
        elif self.what == "get_first_ctaid":
            self.axes = ["xyz".index(axis)] if axis else list(range(len(names)))
            self.dests, self.dest_dtypes = names, [np.dtype(np.uint32)] * len(names)
        else:
            raise self.unsupported(f"modifier .{instr.parts[2]}")
        self.sources = instr.operands[1:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        low, high = sources[0]
        granted = high & np.uint64(1) != 0
        active = ctx.lanes.dense_mask() if mask is None else mask
        unknown = active & (high >> np.uint64(32) != _MARK)
        if unknown.any():
            text = "the bytes that are queried are not the response of a try_cancel"
            w, c, _ = np.argwhere(unknown)[0]
            slot, warp = ctx.rect[2] + int(c), ctx.rect[0] + int(w)
            report_warp(ctx, "cluster-launch", text, slot, warp)
        if self.what == "is_canceled":
            control: LaunchControl = ctx.subsystem(LaunchControl.name)
            seen = (active & ~granted).any(axis=(0, 2))
            control.refused.update(int(c) + ctx.rect[2] for c in np.flatnonzero(seen))
            return (granted,)
        words = [
            low.astype(np.uint32),
            (low >> np.uint64(32) & np.uint64(0xFFFF)).astype(np.uint32),
            (low >> np.uint64(48)).astype(np.uint32),
            np.zeros(low.shape, np.uint32),
        ]
        return tuple(np.where(granted, words[axis], np.uint32(0xFFFF_FFFF)) for axis in self.axes)
