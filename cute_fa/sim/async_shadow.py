"""What asynchronous engines do to shared memory, checked against the shadow of the threads' work.

The shadow (:mod:`cute_fa.sim.shadow`) has the stamp of each granule's last write and of each
agent's last read. An engine's access has two ends. At issue, on behalf of the warps that issue it:
everything that conflicts must be ordered before them, and what threads wrote must also be behind a
proxy fence (PTX ISA 8.9.1; memory consistency, proxies). From issue to completion the bytes are *in
flight* (being filled) or *being read*; both are stamps beyond every other, so that the checks of
ordinary accesses stumble over them. At completion they become an access of an agent row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim import hazards
from cute_fa.sim.accesses import is_strong
from cute_fa.sim.engines import is_generic
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.race import IN_FLIGHT, LIVE_BARRIER, NEVER, Clocks

if TYPE_CHECKING:
    from cute_fa.sim.canonical_layouts import Extent
    from cute_fa.sim.shadow import SharedShadow
    from cute_fa.sim.wave import BlockContext, Wave

OVERWRITE_RULE = "unfenced-async-overwrite"
THREADS_READ = ("ld", "ldmatrix", "atom")
"""Operations whose reads are the threads' own; what an engine has read may count as theirs too."""

CHUNK = 16  # bytes: what engines move is made of these


class Issuer(NamedTuple):
    """Who starts an asynchronous operation: warps ``first`` to ``last`` of the CTA in a slot."""

    slot: int
    first: int
    last: int


class Area(NamedTuple):
    """Bytes of the wave's shared memory, as granules of its shadow.

    ``granules`` indexes the flat shadow; ``first`` is the offset of the first byte in its CTA.
    """

    granules: slice | np.ndarray
    first: int


@subsystem
class AsyncShadow(Subsystem):
    """The engines' side of the shadow of one wave."""

    name = "async-shadow"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.row_bytes = wave.smem.shape[1]
        self.reading: list[tuple[int, Area]] = []
        self._reducing: np.ndarray | None = None
        self._before: np.ndarray | None = None
        self.wants_read_fences = wave.options.checks_rule(OVERWRITE_RULE)

    @property
    def shadow(self) -> SharedShadow:
        return self.wave.shared_state["shared-shadow"]

    @property
    def clocks(self) -> Clocks | None:
        return self.shadow.clocks

    @property
    def active(self) -> bool:
        return self.shadow.active

    def span(self, slot: int, offset: int, nbytes: int) -> Area:
        """The area of ``nbytes`` contiguous bytes of the CTA in a slot."""
        start = slot * self.row_bytes + offset
        granule = self.shadow.granule
        return Area(slice(start // granule, -(-(start + nbytes) // granule)), offset)

    def chunks(self, slot: int, chunks: np.ndarray) -> Area:
        """The area of 16-byte chunks, given as chunk numbers within the CTA."""
        per_chunk = CHUNK // self.shadow.granule
        first = chunks.reshape(-1, 1) * per_chunk + slot * self.row_bytes // self.shadow.granule
        granules = (first + np.arange(per_chunk)).reshape(-1)
        return Area(granules, int(chunks.min()) * CHUNK)

    def matrix(self, slot: int, chunks: np.ndarray, extent: Extent) -> Area:
        """The area of a matrix operand, given as its chunks and their extent."""
        first, stop, dense = extent
        if dense:
            return self.span(slot, first * CHUNK, (stop - first) * CHUNK)
        return self.chunks(slot, chunks)

    def begin_write(
        self, ctx: BlockContext, issuer: Issuer, area: Area, *, reduces: bool = False
    ) -> None:
        """An engine starts to fill an area, or to reduce into it."""
        shadow = self.shadow
        clocks = shadow._clocks()
        seen, fenced = self._knowledge(clocks, issuer)
        if is_generic(ctx.instr):
            fenced = seen
        stamps = shadow._writes[area.granules]
        if reduces:
            stamps = self._begin_reduction(area, stamps)
        self._check_writes(ctx, issuer, area, stamps, seen, fenced, reading=False)
        earlier = np.zeros(clocks.agents, np.uint32)
        wants_fences = self.wants_read_fences and not is_generic(ctx.instr)
        rect = issuer.first, issuer.last, issuer.slot, issuer.slot + 1
        for reader in range(clocks.agents) if wants_fences else shadow.late_readers(rect):
            earlier[reader] = shadow._reads[reader, area.granules].max()
        late = (earlier >= seen) & (earlier != 0)
        if late.any():
            self._report_readers(ctx, issuer, area, earlier, late)
        if wants_fences:
            unfenced = (earlier >= fenced) & (earlier != 0) & ~late
            for agent in np.flatnonzero(unfenced):
                stamp = int(earlier[agent]) + int(agent)
                number = clocks.instruction(stamp)
                if number is not None and self.wave.kernel.body[number].op in THREADS_READ:
                    text = "no fence.proxy.async between the threads' read and the async proxy's"
                    text += " write"
                    self._report(ctx, OVERWRITE_RULE, text, issuer, area, stamp, "read")
        shadow._writes[area.granules] = IN_FLIGHT + int(clocks.agent[issuer.first, issuer.slot])

    def _begin_reduction(self, area: Area, stamps: np.ndarray) -> np.ndarray:
        """The stamps of an area as they were before the reductions that are on their way to it.

        Reductions to one place may overlap: none of them is a write that the next one disturbs.
        """
        if self._reducing is None or self._before is None:
            self._reducing = np.zeros(self.shadow._writes.shape, np.uint16)
            self._before = np.zeros(self.shadow._writes.shape, np.uint32)
            self.shadow.followers.append(partial(self._before.fill, 0))  # all is in order then
        counts = self._reducing[area.granules]
        stamps = np.where(counts > 0, self._before[area.granules], stamps)
        self._before[area.granules] = stamps
        self._reducing[area.granules] = counts + 1
        return stamps

    def reduced_into(self, index: np.ndarray, nbytes: int) -> np.ndarray | None:
        """Elements (as for :meth:`SharedShadow.read`) that reductions are on their way to."""
        if self._reducing is None:
            return None
        counts = self._reducing.reshape(-1, nbytes // self.shadow.granule)
        return np.asarray((counts[index] > 0).any(axis=-1))

    def finish_write(self, area: Area, row: int, slot: int, instr: Instr) -> tuple[int, np.uint32]:
        """The bytes have arrived and somebody knows it: they count as a write of an agent row.

        Returns:
            the agent, and the limit that those who know have to have in ``seen``.
        """
        shadow = self.shadow
        clocks = shadow._clocks()
        agent = int(clocks.agent[row, slot])
        event = clocks.access(instr.index)
        stamp = event + np.uint32(agent)
        if self._reducing is not None:
            left = self._reducing[area.granules]
            left = np.where(left > 0, left - np.uint16(1), left)
            self._reducing[area.granules] = left
            shadow._writes[area.granules] = np.where(left, shadow._writes[area.granules], stamp)
        else:
            shadow._writes[area.granules] = stamp
        return agent, np.uint32(event + np.uint32(clocks.agents))

    def begin_read(self, ctx: BlockContext, issuer: Issuer, area: Area, row: int) -> None:
        """An engine starts to read an area."""
        shadow = self.shadow
        clocks = shadow._clocks()
        seen, fenced = self._knowledge(clocks, issuer)
        stamps = shadow._writes[area.granules]
        self._check_writes(ctx, issuer, area, stamps, seen, fenced, reading=True)
        agent = int(clocks.agent[row, issuer.slot])
        shadow.reading[agent] += 1
        shadow._reads[agent, area.granules] = IN_FLIGHT
        self.reading.append((agent, area))

    def finish_read(self, area: Area, row: int, slot: int, by: int, event: np.uint32) -> None:
        """The bytes have been read: it counts as a read of agent row ``by`` at ``event``."""
        self.finish_reads([area], row, slot, by, event)

    def finish_reads(
        self, areas: Sequence[Area], row: int, slot: int, by: int, event: np.uint32
    ) -> None:
        """The same for several areas that the engine of one row has read."""
        clocks = self.shadow._clocks()
        reads = self.shadow._reads
        agent = int(clocks.agent[row, slot])
        finished = Counter(id(area) for area in areas)
        left = []
        for reader, pending in self.reading:
            if reader == agent and finished[id(pending)]:
                finished[id(pending)] -= 1
            else:
                left.append((reader, pending))
        self.shadow.reading[agent] -= len(self.reading) - len(left)
        self.reading = left
        different = {id(area): area for area in areas}.values()
        for area in different:
            reads[agent, area.granules] = 0
        reader = int(clocks.agent[by, slot])
        self.shadow.last_reads[reader] = event
        for area in different:
            reads[reader, area.granules] = event
        for other, pending in left:
            if other == agent:
                reads[agent, pending.granules] = IN_FLIGHT

    def _knowledge(self, clocks: Clocks, issuer: Issuer) -> tuple[np.ndarray, np.ndarray]:
        """What is ordered before all issuing warps, and what is behind a proxy fence too."""
        seen = clocks.seen[issuer.first : issuer.last, issuer.slot]
        known = seen[0] if len(seen) == 1 else seen.min(axis=0)
        assert clocks.fenced is not None  # engines are behind a proxy
        return known[: clocks.agents], known[clocks.fenced]

    def _check_writes(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        area: Area,
        stamps: np.ndarray,
        seen: np.ndarray,
        fenced: np.ndarray,
        *,
        reading: bool,
    ) -> None:
        agents = np.uint32(self.shadow._clocks().agents)
        first = stamps.flat[0]
        if (stamps == first).all():  # the usual case: one copy filled it all
            suspects = stamps.reshape(-1)[:1]
        else:
            suspects = np.unique(stamps[stamps >= fenced[stamps % agents]])
        for stamp in suspects:
            number = int(stamp)
            agent = number % int(agents)
            if number == NEVER:
                if reading:
                    text = "shared memory that was never written is read by the async proxy"
                    self._report(ctx, "uninitialised-shared-read", text, issuer, area)
            elif number == LIVE_BARRIER:
                text = "an asynchronous access to the bytes of an mbarrier that is in use"
                self._report(ctx, "mbarrier-access", text, issuer, area)
            elif number >= IN_FLIGHT:
                rule = "read-before-arrival" if reading else "write-while-copy-in-flight"
                text = "the async proxy accesses bytes whose copy has not been waited for"
                self._report(ctx, rule, text, issuer, area)
            elif number >= int(seen[agent]):
                if self._may_overlap(ctx.instr, number):
                    continue
                text = "an asynchronous access is not ordered after another agent's write"
                self._report(ctx, "shared-race", text, issuer, area, number, "write")
            elif number >= int(fenced[agent]):
                text = "no fence.proxy.async between the threads' write and the async proxy's"
                text += " read" if reading else " write"
                self._report(ctx, "missing-proxy-fence", text, issuer, area, number, "write")

    def _may_overlap(self, instr: Instr, stamp: int) -> bool:
        """Whether the access with that stamp and ``instr`` are atomic by the same proxy."""
        number = self.shadow._clocks().instruction(stamp)
        if number is None:
            return False
        before = self.wave.kernel.body[number]
        if instr.op == "cp":
            return before.op == "cp" and "reduce" in before.parts and "reduce" in instr.parts
        return instr.op == "red" and before.op != "cp" and is_strong(before)

    def _report_readers(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        area: Area,
        earlier: np.ndarray,
        late: np.ndarray,
    ) -> None:
        for agent in np.flatnonzero(late):
            stamp = int(earlier[agent])
            if self._may_overlap(ctx.instr, stamp):
                continue
            if stamp >= IN_FLIGHT:
                text = "a copy begins to fill shared memory that an engine still reads"
                self._report(ctx, "overwrite-while-reading", text, issuer, area)
            else:
                text = "an asynchronous write is not ordered after another agent's read"
                self._report(ctx, "shared-race", text, issuer, area, stamp + int(agent), "read")

    def _report(
        self,
        ctx: BlockContext,
        rule: str,
        text: str,
        issuer: Issuer,
        area: Area,
        stamp: int | None = None,
        what: str = "",
    ) -> None:
        wave = self.wave
        if not wave.options.checks_rule(rule):
            return
        other = None
        if stamp is not None:
            clocks = self.shadow._clocks()
            number = clocks.instruction(stamp)
            if number is not None:
                rank, row = divmod(stamp % clocks.agents, clocks.rows)
                slot = issuer.slot - int(wave.cta_rank[issuer.slot]) + rank
                warp = row if row < wave.num_warps else None
                other = hazards.site(wave, wave.kernel.body[number], what, warp, slot)
        report_warp(ctx, rule, text, issuer.slot, issuer.first, address=area.first, other=other)


def report_warp(
    ctx: BlockContext,
    rule: str,
    message: str,
    slot: int,
    warp: int,
    *,
    address: int | None = None,
    other: hazards.AccessSite | None = None,
    instr: Instr | None = None,
) -> None:
    """Record a hazard of one warp, by default at the running instruction."""
    where = {"warp": warp, "address": address, "other": other}
    hazards.report(ctx.wave, rule, message, instr or ctx.instr, slot, **where)
