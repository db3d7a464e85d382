"""Barriers within a CTA: ``bar``, ``barrier`` (PTX ISA 9.7.13.1), and fences (9.7.13.4).

A CTA has 16 barriers. Each counts arriving threads in whole warps; when the count is reached the
barrier starts afresh and those who wait go on. ``arrive`` only counts. A barrier used without a
count expects every thread of the CTA that has not exited. A barrier orders everything that its
participants did before arriving before everything that those who waited do afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import (
    Decoded,
    Mask,
    Subsystem,
    Ticket,
    WaitReason,
    blocking,
    effect,
    register_names,
    subsystem,
)

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.race import Clocks
    from cute_fa.sim.wave import BlockContext, Wave

NUM_BARRIERS = 16
WARP = 32


@dataclass(eq=False)
class Use:
    """One use of one barrier of one CTA, from the first arrival to completion.

    Attributes:
        expected: threads that complete it.
        counted: the program gave the count; otherwise it is all threads that have not exited.
        arrived: threads so far.
        knowledge: clock snapshot of those who arrived, ``(agents,)``, or None without race checks.
        waiting: tickets of those who wait.
        waiters: their warps, bool ``(W,)``.
        reduction: operator of ``red``, or None.
        votes, lanes: threads that voted true, and that voted.
    """

    expected: int
    counted: bool
    arrived: int = 0
    knowledge: np.ndarray | None = None
    waiting: list[Ticket] = field(default_factory=list)
    waiters: np.ndarray | None = None
    reduction: str | None = None
    votes: int = 0
    lanes: int = 0


@subsystem
class NamedBarriers(Subsystem):
    """The barriers of a wave's CTAs: ``uses[slot, id]`` lives from first arrival to completion."""

    name = "barriers"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.uses: dict[tuple[int, int], Use] = {}
        self.results: dict[tuple[int, int, int], int] = {}

    @property
    def clocks(self) -> Clocks | None:
        return self.wave.shared_state["shared-shadow"].clocks

    def describe(self) -> list[str]:
        lines = []
        for (slot, number), use in sorted(self.uses.items()):
            cta = ", ".join(str(int(x)) for x in self.wave.cta_ids[slot])
            count = f"{use.arrived} of {use.expected} threads"
            lines.append(f"barrier {number} of CTA ({cta}): {count} have arrived")
        return lines

    def threads_left(self, slot: int) -> int:
        """Threads of the CTA that have not exited, counted in whole warps."""
        return int(self.wave.alive[:, slot].any(axis=-1).sum()) * WARP

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        """A barrier that expects all threads expects fewer once some have exited."""
        _, _, c0, c1 = lanes.rect
        for (slot, number), use in list(self.uses.items()):
            if not use.counted and c0 <= slot < c1:
                gone = lanes.full_mask()[:, slot]
                left = self.wave.alive[:, slot] & ~gone
                use.expected = int(left.any(axis=-1).sum()) * WARP
                if use.arrived >= use.expected:
                    self.complete(ctx, slot, number)

    def complete(self, ctx: BlockContext, slot: int, number: int) -> None:
        """Let those who wait go on and make the barrier ready for its next use."""
        use = self.uses.pop((slot, number))
        ctx.release(*use.waiting)
        if use.waiters is None:
            return
        clocks = self.clocks
        if clocks is not None and use.knowledge is not None:
            members = np.zeros((clocks.rows, 1), bool)
            members[: len(use.waiters), 0] = use.waiters
            rect = (0, clocks.rows, slot, slot + 1)
            clocks.acquire(rect, use.knowledge[None], members)


class _Barrier(Decoded):
    """What all forms share: operands, and arrival at the barriers of each CTA.

    Attributes:
        verb: "sync", "arrive" or "red".
        operator: "popc", "and" or "or" for reductions.
        aligned: the whole warp executes it together, and counts whole.
    """

    counter_class = "barrier"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = [part for part in instr.parts if part != "cta"]
        self.verb = parts[1]
        if self.verb not in ("sync", "arrive", "red"):
            raise self.unsupported(f".{self.verb}")
        self.operator = parts[2] if self.verb == "red" else None
        self.aligned = instr.op == "bar" or "aligned" in parts
        self.collective = self.aligned  # type: ignore[misc]
        operands = list(instr.operands)
        self.predicate: tuple[ptx.Operand, ...] = ()
        if self.verb == "red":
            self.dests = register_names(operands.pop(0))
            if self.operator != "popc":
                self.dest_dtypes = [np.dtype(bool)]
            self.predicate = (operands.pop(),)
        if not 1 <= len(operands) <= 2:
            raise self.unsupported("operands")
        self.has_count = len(operands) == 2
        if self.verb == "arrive" and not self.has_count:
            raise self.unsupported("arrive without a thread count")
        self.sources = (*operands, *self.predicate)
        if self.verb == "sync":
            self.static_counts = {"barrier_waits": 1}

    def arrive(
        self,
        ctx: BlockContext,
        active: np.ndarray,
        ids: np.ndarray,
        counts: np.ndarray | None,
        predicate: np.ndarray | None = None,
    ) -> None:
        """Arrive with the ``active`` lanes, and park those who have to wait."""
        warps = np.asarray(active.any(axis=-1))
        numbers = np.where(active, ids.astype(np.int64), -1).max(axis=-1)
        for c in np.flatnonzero(warps.any(axis=0)):
            for number in np.unique(numbers[warps[:, c], c]):
                lanes = np.zeros_like(active)
                lanes[:, c] = active[:, c] & (numbers[:, c, None] == number)
                self._arrive_one(ctx, int(number), int(c), lanes, counts, predicate)

    def arrive_together(
        self, ctx: BlockContext, mask: Mask, ids: np.ndarray, counts: np.ndarray | None
    ) -> bool:
        """The usual case at once: all that a barrier expects arrive in one step, nobody before."""
        if mask is not None:
            return False
        w0, w1, c0, c1 = ctx.rect
        threads = (w1 - w0) * WARP
        if counts is None:
            if w1 - w0 != ctx.wave.num_warps:
                return False
        elif int(counts.min()) != threads or int(counts.max()) != threads:
            return False
        number = int(ids[0, 0, 0])
        if not 0 <= number < NUM_BARRIERS or (ids != ids[0, 0, 0]).any():
            return False
        barriers: NamedBarriers = ctx.subsystem(NamedBarriers.name)
        if barriers.uses and any((slot, number) in barriers.uses for slot in range(c0, c1)):
            return False
        clocks = barriers.clocks
        if clocks is not None:
            clocks.acquire(ctx.rect, clocks.release(ctx.rect))
        return True

    def _arrive_one(
        self,
        ctx: BlockContext,
        number: int,
        column: int,
        lanes: np.ndarray,
        counts: np.ndarray | None,
        predicate: np.ndarray | None,
    ) -> None:
        """Arrive at one barrier of one CTA; park the lanes if they have to wait."""
        barriers: NamedBarriers = ctx.subsystem(NamedBarriers.name)
        w0, w1, c0, _ = ctx.rect
        slot = c0 + column
        members = np.asarray(lanes[:, column].any(axis=-1))
        whole = barriers.threads_left(slot)
        count = whole if counts is None else int(counts[lanes][0])
        if not 0 <= number < NUM_BARRIERS:
            text = f"barrier {number} of 0 to {NUM_BARRIERS - 1}"
            report_lanes(ctx, "barrier-id", text, lanes)
            return
        if counts is not None and not self._count_is_good(ctx, lanes, counts, count):
            count = max(WARP, min(count // WARP * WARP, ctx.wave.num_warps * WARP))
        key = slot, number
        use = barriers.uses.setdefault(key, Use(count, counts is not None))
        threads = int(members.sum()) * WARP if self.aligned else int(np.count_nonzero(lanes))
        room = use.expected - use.arrived
        if threads > room:  # the others are the first of its next use
            for part in self._parts(lanes, column, room):
                self._arrive_one(ctx, number, column, part, counts, predicate)
            return
        if use.expected != count:
            text = f"{count} threads, where the warps before gave {use.expected}"
            report_lanes(ctx, "barrier-count-mismatch", f"barrier {number}: {text}", lanes)
        if use.arrived and use.reduction != self.operator:
            text = f"barrier {number} is used with and without a reduction at one time"
            report_lanes(ctx, "barrier-kind-mismatch", text, lanes)
        use.reduction = self.operator
        if self.aligned:
            self._require_whole_warps(ctx, number, slot, column, lanes)
        use.arrived += threads
        self._learn(ctx, barriers.clocks, use, slot, members)
        if predicate is not None:
            use.votes += int(np.count_nonzero(predicate & lanes))
            use.lanes += int(np.count_nonzero(lanes))
        if self.verb != "arrive":
            if use.waiters is None:
                use.waiters = np.zeros(ctx.wave.num_warps, bool)
            use.waiters[w0:w1] |= members
        complete = use.arrived >= use.expected
        if complete:
            if self.verb == "red":
                self._keep_result(barriers, use, slot)
            barriers.complete(ctx, slot, number)
        elif self.verb != "arrive":
            reason = WaitReason("waits at", use.expected, lambda: use.arrived, f"barrier {number}")
            use.waiting.append(ctx.park(lanes, reason, retry=self.verb == "red"))

    def _parts(self, lanes: np.ndarray, column: int, room: int) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that complete a barrier with room for so many threads, and the others."""
        mine = lanes[:, column]
        counted = np.broadcast_to(mine.any(axis=-1, keepdims=True), mine.shape)
        order = np.cumsum(counted if self.aligned else mine).reshape(mine.shape)
        first = np.zeros_like(lanes)
        first[:, column] = mine & (order <= room)
        return first, lanes & ~first

    def _require_whole_warps(
        self, ctx: BlockContext, number: int, slot: int, column: int, lanes: np.ndarray
    ) -> None:
        """Report warps of which only a part is here: no other lane of theirs can come any more."""
        w0, w1, _, _ = ctx.rect
        alive = np.count_nonzero(ctx.wave.alive[w0:w1, slot], axis=-1)
        here = np.count_nonzero(lanes[:, column], axis=-1)
        torn = (here > 0) & (here < alive)
        if torn.any():
            text = f"{int(here[torn][0])} of a warp's {int(alive[torn][0])} threads"
            text = f"barrier {number} is executed by {text}; the others are elsewhere"
            report_lanes(ctx, "divergent-collective", text, lanes & torn[:, None, None])

    def _keep_result(self, barriers: NamedBarriers, use: Use, slot: int) -> None:
        """Store the reduction's value for each warp that takes part."""
        value = {
            "popc": use.votes,
            "and": int(use.votes == use.lanes),
            "or": int(use.votes > 0),
        }[self.operator or "popc"]
        assert use.waiters is not None
        for warp in np.flatnonzero(use.waiters):
            barriers.results[slot, int(warp), self.instr.index] = value

    def _count_is_good(
        self, ctx: BlockContext, lanes: np.ndarray, counts: np.ndarray, count: int
    ) -> bool:
        given = counts[lanes]
        most = ctx.wave.num_warps * WARP
        if (given != count).any():
            text = f"threads give {int(given.max())} and {int(given.min())} as the count"
            report_lanes(ctx, "barrier-count-mismatch", text, lanes)
        if count == 0 or count % WARP:
            text = f"a count of {count} threads is not a positive multiple of {WARP}"
        elif count > most:
            text = f"a count of {count} threads in a CTA of {most}"
        else:
            return True
        report_lanes(ctx, "barrier-count", text, lanes)
        return False

    @staticmethod
    def _learn(
        ctx: BlockContext, clocks: Clocks | None, use: Use, slot: int, members: np.ndarray
    ) -> None:
        """Add what the arriving warps know to what the barrier will pass on."""
        if clocks is None:
            return
        w0, w1, _, _ = ctx.rect
        snapshot = clocks.release((w0, w1, slot, slot + 1), members[:, None])[0]
        use.knowledge = snapshot if use.knowledge is None else np.maximum(use.knowledge, snapshot)


@blocking("bar.sync", "barrier.sync", "bar.cta.sync", "barrier.cta.sync")
class BarrierSync(_Barrier):
    """``bar.sync a{, b}``: arrive, and wait until the barrier is complete."""

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        ids, counts = sources[0], sources[1] if self.has_count else None
        if self.arrive_together(ctx, mask, ids, counts):
            return None
        active = ctx.lanes.dense_mask() if mask is None else mask
        self.arrive(ctx, active, ids, counts)
        return None


@effect("bar.arrive", "barrier.arrive", "bar.cta.arrive", "barrier.cta.arrive")
class BarrierArrive(_Barrier):
    """``bar.arrive a, b``: arrive without waiting."""

    ends_block = True

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = ctx.lanes.dense_mask() if mask is None else mask
        self.arrive(ctx, active, sources[0], sources[1])


@effect("bar.red", "barrier.red", "bar.cta.red", "barrier.cta.red")
class BarrierReduce(_Barrier):
    """``bar.red.op d, a{, b}, {!}c``: as sync; every thread gets the reduction of all predicates.

    Threads that have to wait execute the instruction again once the result is there.
    """

    ends_block = True
    own_block = True

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        ids, counts = sources[0], sources[1] if self.has_count else None
        predicate = sources[-1].astype(bool, copy=False)
        barriers: NamedBarriers = ctx.subsystem(NamedBarriers.name)
        active = (ctx.lanes.dense_mask() if mask is None else mask).copy()
        values = np.zeros((*active.shape[:2], 1), bool if self.operator != "popc" else np.uint32)
        self._collect(ctx, barriers, active, values)
        if active.any():
            ctx.counters.add("barrier_waits", int(active.any(axis=-1).sum()))
            self.arrive(ctx, active, ids, counts, predicate)
            self._collect(ctx, barriers, active, values)
        return (values,)

    def _collect(
        self, ctx: BlockContext, barriers: NamedBarriers, active: np.ndarray, values: np.ndarray
    ) -> None:
        """Hand out results that are there, and take their warps out of ``active``."""
        w0, _, c0, _ = ctx.rect
        for w, c in np.argwhere(active.any(axis=-1)):
            key = c0 + int(c), w0 + int(w), self.instr.index
            if key in barriers.results:
                values[w, c] = barriers.results.pop(key)
                active[w, c] = False
