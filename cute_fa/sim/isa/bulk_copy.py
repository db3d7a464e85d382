"""Bulk copies (PTX ISA 9.7.9.25.4) and their groups, and the arrival of ``cp.async`` on mbarriers.

Operands and addresses are checked per executing thread. Loads and reductions are executed for every
thread that runs them. Stores that several lanes of one warp issue with the same operands are
executed once: the compiler emits them unelected, and they are idempotent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.addresses import RANK_SHIFT, SHARED_BASE, SHARED_OFFSET_MASK
from cute_fa.sim.async_shadow import AsyncShadow, Issuer, report_warp
from cute_fa.sim.async_tasks import AsyncTasks, Task
from cute_fa.sim.boxes import Box, Rows, linear, reduce
from cute_fa.sim.bulk import BulkGroups, Target, land
from cute_fa.sim.engines import bulk_row
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.isa.mbarrier import groups, knowledge_of
from cute_fa.sim.mbarriers import Mbarrier, Mbarriers
from cute_fa.sim.memory import Region

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

Thread = tuple[int, int, int]  # slot, warp, lane
Place = tuple[int, int, Mbarrier]  # slot, offset, who is told

REDUCTIONS = frozenset(("add", "min", "max", "inc", "dec", "and", "or", "xor"))
_IGNORED = frozenset(("weak", "L2::cache_hint", "noftz", "cta_group::1"))


class BulkInstruction(Decoded):
    """What bulk and tensor copies share.

    Attributes:
        target, source: state spaces, "global", "shared::cta" or "shared::cluster".
        signals: completion is by mbarrier, not by bulk group.
        multicast: the copy goes to every CTA of a mask.
        pair: ``.cta_group::2``: the barrier may be in the other CTA of the destination's pair.
        operator: of a reduction, or None.
        operands: without the cache policy.
    """

    counter_class = "bulk_copy"
    ends_block = True
    allowed: frozenset[str] = frozenset()

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts
        spaces = [p for p in parts if p in ("global", "shared::cta", "shared::cluster")]
        if len(spaces) != 2:
            raise self.unsupported("state spaces")
        self.target, self.source = spaces
        self.signals = "mbarrier::complete_tx::bytes" in parts
        self.multicast = "multicast::cluster" in parts
        self.pair = "cta_group::2" in parts
        if not self.signals and "bulk_group" not in parts:
            raise self.unsupported("completion mechanism")
        self.operator = (
            next((p for p in parts if p in REDUCTIONS), None) if "reduce" in parts else None
        )
        known = {"cp", "reduce", "async", "bulk", "bulk_group", "multicast::cluster", *spaces}
        known |= {"mbarrier::complete_tx::bytes"} | REDUCTIONS | _IGNORED | self.allowed
        self.refuse_unknown(parts, known)
        operands = list(instr.operands)
        if "L2::cache_hint" in parts:  # only a byte mask follows the policy
            operands.pop(-2 if "cp_mask" in parts else -1)
        self.operands = tuple(operands)

    def threads(self, ctx: BlockContext, mask: Mask) -> Iterator[tuple[int, int, int]]:
        """(w, c, lane) of every executing thread."""
        active = ctx.lanes.dense_mask() if mask is None else mask
        for w, c, lane in np.argwhere(active):
            yield int(w), int(c), int(lane)

    def distinct(
        self, ctx: BlockContext, mask: Mask, *arrays: np.ndarray
    ) -> Iterator[tuple[int, int, int]]:
        """Executing threads but those that repeat the operands of an earlier lane of their warp."""
        seen: set[tuple[int, ...]] = set()
        for w, c, lane in self.threads(ctx, mask):
            key = (w, c, *(int(array[w, c, lane]) for array in arrays))
            if key in seen:
                ctx.counters.add("bulk_repeats", 1)
                continue
            seen.add(key)
            yield w, c, lane

    def shared_place(
        self, ctx: BlockContext, thread: Thread, address: int, nbytes: int, align: int
    ) -> tuple[int, int] | None:
        """(slot, offset) of bytes in shared memory; reports and returns None if they are bad."""
        slot, warp, _ = thread
        wave = ctx.wave
        rank, offset = address >> RANK_SHIFT, address & SHARED_OFFSET_MASK
        rule = None
        if rank >= wave.cluster_size:
            rule, text = "shared-bad-rank", f"rank {rank} in a cluster of {wave.cluster_size} CTAs"
        elif offset < SHARED_BASE or offset + nbytes > wave.smem_end:
            size = wave.smem_end - SHARED_BASE
            rule = "shared-out-of-bounds"
            text = f"{nbytes} bytes that do not lie in the CTA's {size} bytes of shared memory"
        elif offset % align:
            rule, text = "shared-misaligned", f"shared memory not aligned to {align} bytes"
        if rule is not None:
            report_warp(ctx, rule, text, slot, warp, address=address)
            return None
        return slot - int(wave.cta_rank[slot]) + rank, offset

    def global_region(self, ctx: BlockContext, thread: Thread, box: Box | Rows) -> Region | None:
        """The region of a box that is at least partly inside; reports if there is none."""
        region, fault = box.locate(ctx.wave.memory)
        slot, warp, _ = thread
        if fault is not None:
            report_warp(ctx, "global-out-of-bounds", fault, slot, warp, address=box.first)
        elif region is not None and self.target == "global" and not region.writable:
            text = f"a bulk copy to {region.name}, which is read-only"
            report_warp(ctx, "global-read-only-write", text, slot, warp, address=box.first)
            return None
        return region

    def places(
        self, ctx: BlockContext, thread: Thread, address: int, signal: int, ranks: int | None
    ) -> list[Place]:
        """Where each copy of the data goes, by a multicast mask or just one."""
        slot, warp, _ = thread
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        wave = ctx.wave
        if ranks is None:
            wanted = [(address, signal)]
        else:
            low = SHARED_OFFSET_MASK
            wanted = [
                (rank << RANK_SHIFT | address & low, self._signalled(rank, signal) | signal & low)
                for rank in range(16)
                if ranks >> rank & 1
            ]
        out = []
        for place, where in wanted:
            bar = (
                table.find(ctx, where, slot, warp)
                if where >> RANK_SHIFT < wave.cluster_size
                else None
            )
            if place >> RANK_SHIFT >= wave.cluster_size:
                text = f"the mask {ranks:#x} names CTAs outside a cluster of {wave.cluster_size}"
                report_warp(ctx, "shared-bad-rank", text, slot, warp, address=place)
            elif bar is not None:
                table.check_fence(ctx, bar, slot, warp)
                first = slot - int(wave.cta_rank[slot])
                out.append((first + (place >> RANK_SHIFT), place & SHARED_OFFSET_MASK, bar))
        return out

    def _signalled(self, rank: int, signal: int) -> int:
        """Rank bits of the CTA whose barrier a multicast copy to CTA ``rank`` signals.

        With ``.cta_group::2`` it is the CTA of that pair with the parity of the barrier's own.
        """
        if self.pair:
            rank = rank & ~1 | signal >> RANK_SHIFT & 1
        return rank << RANK_SHIFT

    @staticmethod
    def count(ctx: BlockContext, way: str, box: Box | Rows, shared: int) -> None:
        """Add a copy's bytes; ``way``: "read" from or "written" to global memory."""
        ctx.counters.add(f"global_bytes_{way}", box.nbytes)
        if box.nbytes:
            ctx.counters.add(f"global_sectors_{way}", box.sectors())
        other = "written" if way == "read" else "read"
        ctx.counters.add(f"shared_bytes_{other}", shared)


@effect("cp.async.bulk", "cp.reduce.async.bulk")
class BulkCopy(BulkInstruction):
    """``cp.async.bulk`` and ``cp.reduce.async.bulk`` of contiguous bytes (9.7.9.25.4.1, .2).

    Sizes and addresses are multiples of 16. With ``.cp_mask`` bit i of the last operand says
    whether byte i of each 16 bytes is stored.
    """

    allowed = frozenset(
        ("u32", "s32", "u64", "s64", "b32", "b64", "f16", "bf16", "f32", "f64", "cp_mask")
    )

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.masked = "cp_mask" in instr.parts
        if self.masked and (self.target != "global" or self.operator is not None):
            raise self.unsupported("a byte mask of what is no plain copy to global memory")
        wanted = 3 + self.signals + self.multicast + self.masked
        if len(self.operands) != wanted:
            raise self.unsupported("operands")
        self.kind = instr.parts[-1] if self.operator else "u8"
        if self.kind.startswith("b") and self.kind != "bf16":
            self.kind = "u" + self.kind[1:]
        self.sources = self.operands

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        w0, _, c0, _ = ctx.rect
        to, origin, sizes = sources[:3]
        if self.target == "global" and self.operator is None:
            lanes = self.distinct(ctx, mask, to, origin, sizes, *sources[3:])
        else:
            lanes = self.threads(ctx, mask)
        for w, c, lane in lanes:
            thread = c0 + c, w0 + w, lane
            at = w, c, lane
            nbytes = int(sizes[at])
            addresses = int(to[at]), int(origin[at])
            if nbytes % 16 or nbytes == 0 or any(address % 16 for address in addresses):
                text = f"{nbytes} bytes from {addresses[1]:#x} to {addresses[0]:#x}, not ×16"
                report_warp(ctx, "bulk-operands", text, thread[0], thread[1])
                continue
            ctx.counters.add("bulk_copies", 1)
            if self.target == "global":
                chosen = int(sources[3][at]) if self.masked else None
                self._store(ctx, thread, *addresses, nbytes, chosen)
                continue
            ranks = int(sources[4][at]) if self.multicast else None
            places = self.places(ctx, thread, addresses[0], int(sources[3][at]), ranks)
            if self.source == "global":
                self._load(ctx, thread, addresses[1], nbytes, places)
            else:
                self._exchange(ctx, thread, addresses[1], nbytes, places)

    def _in_bounds(
        self, ctx: BlockContext, thread: Thread, nbytes: int, slot: int, offset: int
    ) -> bool:
        rank = int(ctx.wave.cta_rank[slot])
        address = rank << RANK_SHIFT | offset
        return self.shared_place(ctx, thread, address, nbytes, 16) is not None

    def _targets(
        self,
        ctx: BlockContext,
        thread: Thread,
        nbytes: int,
        places: list[Place],
    ) -> list[Target]:
        """Those of the places that are in bounds."""
        return [
            Target.bytes(ctx, slot, offset, nbytes, bar)
            for slot, offset, bar in places
            if self._in_bounds(ctx, thread, nbytes, slot, offset)
        ]

    def _load(
        self,
        ctx: BlockContext,
        thread: Thread,
        address: int,
        nbytes: int,
        places: list[Place],
    ) -> None:
        box = linear(address, nbytes)
        region = self.global_region(ctx, thread, box)
        targets = self._targets(ctx, thread, nbytes, places)
        if region is None or not targets:
            return
        self.count(ctx, "read", box, nbytes * len(targets))
        issuer = Issuer(thread[0], thread[1], thread[1] + 1)
        land(ctx, issuer, targets, partial(box.read, region))

    def _exchange(
        self,
        ctx: BlockContext,
        thread: Thread,
        address: int,
        nbytes: int,
        places: list[Place],
    ) -> None:
        """Shared memory of this CTA to a CTA of the cluster."""
        origin = self.shared_place(ctx, thread, address, nbytes, 16)
        targets = self._targets(ctx, thread, nbytes, places)
        if origin is None or not targets:
            return
        ctx.counters.add("shared_bytes_read", nbytes)
        ctx.counters.add("shared_bytes_written", nbytes)
        slot, warp, _ = thread
        source = Target.bytes(ctx, *origin, nbytes)
        areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        issuer = Issuer(slot, warp, warp + 1)
        row = bulk_row(ctx.wave.num_warps)
        instr = self.instr
        if source.area is not None:
            areas.begin_read(ctx, issuer, source.area, row)

        def release(ctx: BlockContext) -> None:
            # Who waits for the barrier knows that the source has been read, too.
            if source.area is not None and areas.clocks is not None:
                event = areas.clocks.access(instr.index)
                areas.finish_read(source.area, row, slot, row, event)
                agent = int(areas.clocks.agent[row, slot])
                known = np.zeros(areas.clocks.columns, np.uint32)
                known[agent] = event + np.uint32(areas.clocks.agents)
                for target in targets:
                    bar = target.signal
                    if bar is not None:
                        old = bar.knowledge
                        bar.knowledge = known if old is None else np.maximum(old, known)

        merge = None
        if self.operator is not None:
            merge = partial(_merge, self.operator, self.kind)
        land(ctx, issuer, targets, source.read, merge=merge, release=release)

    def _store(
        self,
        ctx: BlockContext,
        thread: Thread,
        address: int,
        origin: int,
        nbytes: int,
        chosen: int | None,
    ) -> None:
        place = self.shared_place(ctx, thread, origin, nbytes, 16)
        box = linear(address, nbytes, self.kind)
        region = self.global_region(ctx, thread, box)
        if place is None or region is None:
            return
        self.count(ctx, "written", box, nbytes)
        source = Target.bytes(ctx, *place, nbytes)
        emit = partial(box.write, region, operator=self.operator)
        if chosen is not None:
            emit = partial(_write_bytes, box, region, chosen)
        ctx.subsystem(BulkGroups.name).issue(ctx, thread, source, emit)


def _write_bytes(box: Box, region: Region, chosen: int, data: np.ndarray) -> None:
    """Store the bytes of each 16 whose bits are set."""
    bits = np.array([chosen], np.uint16).view(np.uint8)
    keep = np.unpackbits(bits, bitorder="little").astype(bool)
    old = box.read(region).reshape(-1, 16)
    box.write(region, np.where(keep, data.reshape(-1, 16), old).reshape(-1))


def _merge(operator: str, kind: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    dtype = f"u{linear(0, 16, kind).tensor.element}"
    return reduce(operator, kind, old.view(dtype), new.view(dtype)).view(np.uint8)


@effect("cp.async.bulk.commit_group")
class BulkCommit(Decoded):
    """``cp.async.bulk.commit_group`` (9.7.9.25.4.4)."""

    counter_class = "bulk_copy"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = ctx.lanes.dense_mask() if mask is None else mask
        ctx.subsystem(BulkGroups.name).commit(ctx, active)


@effect("cp.async.bulk.wait_group")
class BulkWait(Decoded):
    """``cp.async.bulk.wait_group{.read} N`` (9.7.9.25.4.5): the wait is what completes copies."""

    counter_class = "bulk_copy"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.newest = self.literal(instr.operands[0], "a group count")
        self.reads = "read" in instr.parts

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = ctx.lanes.dense_mask() if mask is None else mask
        unit: BulkGroups = ctx.subsystem(BulkGroups.name)
        unit.wait(ctx, active, self.newest, reads=self.reads)


@effect("cp.async.bulk.prefetch")
class BulkPrefetch(Decoded):
    """``cp.async.bulk.prefetch{.tensor}``: caches are not simulated (9.7.9.25.4.3)."""

    counter_class = "bulk_copy"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        return None


@effect("cp.async.mbarrier.arrive")
class CopyArrive(Decoded):
    """``cp.async.mbarrier.arrive{.noinc}{.shared}.b64 [addr]`` (9.7.13.15.17).

    The barrier is arrived on once for each thread, when the thread's earlier ``cp.async`` are
    complete; without ``.noinc`` the arrival is announced as one more that is pending.
    """

    counter_class = "mbarrier"
    ends_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:1]
        self.announced = "noinc" in instr.parts

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        tasks: AsyncTasks = ctx.subsystem(AsyncTasks.name)
        w0, _, c0, _ = ctx.rect
        for w, c, lanes, address in groups(ctx, mask, sources[0]):
            slot, warp = c0 + c, w0 + w
            bar = table.find(ctx, address, slot, warp)
            if bar is None:
                continue
            count = int(np.count_nonzero(lanes))
            if not self.announced:
                table.add_pending(ctx, bar, count)
            complete = partial(self._complete, table, bar, slot, warp, lanes.copy())
            tasks.submit(ctx, Task(self.instr, complete, "arrival of cp.async on an mbarrier"))

    @staticmethod
    def _complete(
        table: Mbarriers, bar: Mbarrier, slot: int, warp: int, lanes: np.ndarray, ctx: BlockContext
    ) -> None:
        queue = ctx.subsystem("cp-async")
        queue.arrive(ctx, slot, warp, lanes)
        knowledge = knowledge_of(ctx, slot, warp)
        table.arrive(ctx, bar, int(np.count_nonzero(lanes)), slot, warp, knowledge)
