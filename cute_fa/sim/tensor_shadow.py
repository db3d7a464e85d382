"""Shadow of tensor memory: who wrote and read each cell last, and what is still on its way.

As for shared memory (:mod:`cute_fa.sim.shadow`), each granule has the stamp of its last write, and
of its last read by each warpgroup and by the tensor core. A granule is 16 lanes of one column:
every access covers such granules whole, but for a copy of four lanes and masked products.

What is ordered for tensor memory has columns of the clocks of its own (``Clocks.tensor``).
Synchronisation between threads orders it like everything else; ``tcgen05.commit`` and the
``tcgen05`` fences order nothing but it (PTX ISA 9.7.16.6). Three accesses are not over when the
next instruction starts:

* a ``tcgen05.st``, until ``tcgen05.wait::st``;
* a ``tcgen05.ld``, until ``tcgen05.wait::ld`` or until its registers have been used;
* what the tensor core does, until somebody has waited for a commit behind it. Its operations follow
  one another in the order of its queue; those of different warps need an order of their issue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.engines import warpgroups
from cute_fa.sim.race import IN_FLIGHT, NEVER, Clocks
from cute_fa.sim.tensor_pieces import HALF_LANES, QUARTER_LANES, QUARTERS, Piece

if TYPE_CHECKING:
    from cute_fa.ptx import Instr
    from cute_fa.sim.shadow import SharedShadow
    from cute_fa.sim.tensor_memory import Area
    from cute_fa.sim.wave import BlockContext, Wave

RULES = (
    "uninitialised-tmem-read",
    "tmem-race",
    "tmem-read-before-completion",
    "tmem-write-before-completion",
    "tmem-unwaited-store",
    "tmem-unwaited-load",
    "tmem-load-order",
    "missing-tcgen05-fence",
)

COLUMNS = 512
GRANULES = QUARTERS * 2  # of a column
_ALWAYS = np.uint32(0xFFFF_FFFF)

Index = tuple[int, slice, slice | np.ndarray]
Flight = tuple[int, int, int, bytes, int, bool]
"""Slot, first column, column behind the last, lanes, agent, whether it writes."""


@dataclass(eq=False)
class Unwaited:
    """A ``ld`` or ``st`` of some warps before their ``wait``.

    ``warps`` is bool over the piece's warps and slots: those that have not waited.
    """

    piece: Piece
    instr: Instr
    warps: np.ndarray


class TensorShadow:
    """The shadow of one wave's tensor memory; it starts when it is first asked for."""

    def __init__(self, wave: Wave, used: bool) -> None:
        self.wave = wave
        self._wanted = used and not hazards.selected_rules(wave.options.checks).isdisjoint(RULES)
        self._ready = False

    @property
    def active(self) -> bool:
        """A rule that needs the shadow is on, and the kernel uses tensor memory."""
        if self._wanted and not self._ready:
            self._start()
        return self._wanted

    @property
    def _shared(self) -> SharedShadow:
        return self.wave.shared_state["shared-shadow"]

    def _start(self) -> None:
        clocks = self._shared.clocks
        if clocks is None or clocks.tensor is None:
            self._wanted = False
            return
        self._ready = True
        wave = self.wave
        # A stamp beyond all others from which the agent can be told as from any other.
        self._flying = np.uint32(IN_FLIGHT + -IN_FLIGHT % clocks.agents)
        shape = (wave.num_ctas, COLUMNS, QUARTERS, 2)
        self._writes = np.full(shape, NEVER, np.uint32)
        self._reads = np.zeros((warpgroups(wave.num_warps) + 1, *shape), np.uint32)
        flat = (wave.num_ctas, COLUMNS, GRANULES)
        self._area_writes = self._writes.reshape(flat)
        self._area_reads = self._reads.reshape(-1, *flat)
        # When operations of the tensor core were issued: the last one that read, and that wrote.
        self._issues = np.zeros((2, *flat), np.uint32)
        self._stores: list[Unwaited] = []
        self._loads: list[Unwaited] = []
        self._used_loads: list[Unwaited] = []
        # Operations of the tensor core on their way: how many of each, and who issued the last.
        self._flights: dict[Flight, tuple[int, int]] = {}
        agents = (wave.num_warps, wave.num_ctas, clocks.agents)
        self._before = np.zeros(agents, np.uint32)  # ordered by each warp's last before-fence
        self._after = np.zeros(agents, np.uint32)  # what its next after-fence will order
        self._unfenced = np.zeros(agents, np.uint32)  # what fences on both sides would order
        self._shared.followers.append(self._forget)

    def _clocks(self) -> Clocks:
        return self._shared._clocks()

    def _forget(self) -> None:
        clocks = self._shared.clocks
        assert clocks is not None
        self._writes[(self._writes != NEVER) & (self._writes < IN_FLIGHT)] = clocks.agents
        self._reads[self._reads < IN_FLIGHT] = 0
        self._issues[...] = 0
        for table in (self._before, self._after, self._unfenced):
            table[...] = 0

    # --- loads and stores of threads --------------------------------------------------------------

    def load(self, ctx: BlockContext, piece: Piece, *, used: bool) -> None:
        """Warps load a piece.

        Args:
            used: all registers are used before others are let on (:mod:`tensor_flow`).
        """
        clocks = self._clocks()
        self._check(ctx, piece, self._writes[piece.place], "write", reading=True)
        event = clocks.access(ctx.instr.index)
        reads = self._reads[piece.warps.start // QUARTERS][piece.place]
        reads[...] = self._agents(clocks, piece) + (event if used else self._flying)
        self._note(self._used_loads if used else self._loads, piece, ctx.instr)

    def store(self, ctx: BlockContext, piece: Piece) -> None:
        """Warps store to a piece."""
        clocks = self._clocks()
        writes = self._writes[piece.place]
        self._check(ctx, piece, writes, "write", reading=False)
        for reads in self._reads:
            self._check(ctx, piece, reads[piece.place], "read", reading=False)
        if self._used_loads:
            for slot in range(piece.slots.start, piece.slots.stop):
                granules = np.arange(GRANULES).reshape(QUARTERS, 2)[piece.quarters, piece.halves]
                index = slot, piece.columns, granules.reshape(-1)
                self._check_used_loads(ctx, Issuer(slot, piece.warps.start, 0), index)
        writes[...] = self._agents(clocks, piece) + self._flying
        self._note(self._stores, piece, ctx.instr)

    @staticmethod
    def _note(pending: list[Unwaited], piece: Piece, instr: Instr) -> None:
        for known in pending:
            if known.instr is instr and known.piece == piece:
                known.warps[...] = True
                return
        pending.append(Unwaited(piece, instr, np.ones(piece.shape, bool)))

    def _agents(self, clocks: Clocks, piece: Piece) -> np.ndarray:
        """The agents of a piece's warps, to broadcast to its shadow: ``(c, 1, w, 1)``."""
        return clocks.agent[piece.warps, piece.slots].T[:, None, :, None]

    def wait(self, ctx: BlockContext, active: np.ndarray, *, stores: bool) -> None:
        """Warps (bool ``(w, c)`` over ``ctx.rect``) wait for their stores, or their loads."""
        if stores:
            self._stores = self._settle(ctx, active, self._stores, self._settle_store)
        else:
            self._loads = self._settle(ctx, active, self._loads, self._settle_load)
            self._used_loads = self._settle(ctx, active, self._used_loads, None)

    def _settle(
        self,
        ctx: BlockContext,
        active: np.ndarray,
        pending: list[Unwaited],
        settle: Callable[[Unwaited, np.ndarray], None] | None,
    ) -> list[Unwaited]:
        """Take waiting warps off a list of accesses; returns those that others still wait for."""
        w0, w1, c0, c1 = ctx.rect
        left = []
        for access in pending:
            warps, slots = access.piece.warps, access.piece.slots
            a, b = max(w0, warps.start), min(w1, warps.stop)
            c, d = max(c0, slots.start), min(c1, slots.stop)
            if a < b and c < d:
                waiting = np.zeros(access.warps.shape, bool)
                inside = (
                    slice(a - warps.start, b - warps.start),
                    slice(c - slots.start, d - slots.start),
                )
                waiting[inside] = active[a - w0 : b - w0, c - c0 : d - c0]
                waiting &= access.warps
                if waiting.any():
                    if settle is not None:
                        settle(access, waiting)
                    access.warps &= ~waiting
            if access.warps.any():
                left.append(access)
        return left

    def _settle_store(self, access: Unwaited, waiting: np.ndarray) -> None:
        self._land(self._writes[access.piece.place], access, waiting)

    def _settle_load(self, access: Unwaited, waiting: np.ndarray) -> None:
        warpgroup = access.piece.warps.start // QUARTERS
        self._land(self._reads[warpgroup][access.piece.place], access, waiting)

    def _land(self, stamps: np.ndarray, access: Unwaited, waiting: np.ndarray) -> None:
        """Accesses in flight become accesses at an event of now."""
        clocks = self._clocks()
        event = clocks.access(access.instr.index)
        agents = self._agents(clocks, access.piece)
        own = waiting.T[:, None, :, None] & (stamps == agents + self._flying)
        np.copyto(stamps, agents + event, where=own)

    # --- the tensor core --------------------------------------------------------------------------

    def begin_read(self, ctx: BlockContext, issuer: Issuer, area: Area, row: int) -> None:
        """The tensor core is going to read an area."""
        agent = self._agent(row, issuer.slot)
        index = self._index(area)
        if self._takes_off(ctx, issuer, area, index, agent, writes=False):
            seen = self._known(issuer, agent)
            writes = self._area_writes[index]
            self._check_area(ctx, issuer, index, writes, seen, "write", reading=True)
            self._area_reads[-1][index] = self._flying + agent

    def begin_write(
        self, ctx: BlockContext, issuer: Issuer, area: Area, row: int, *, accumulates: bool
    ) -> None:
        """The tensor core is going to write an area."""
        agent = self._agent(row, issuer.slot)
        index = self._index(area)
        if not self._takes_off(ctx, issuer, area, index, agent, writes=True):
            return
        seen = self._known(issuer, agent)
        writes = self._area_writes[index]
        self._check_area(ctx, issuer, index, writes, seen, "write", reading=accumulates)
        for reads in self._area_reads:
            self._check_area(ctx, issuer, index, reads[index], seen, "read", reading=False)
        if self._used_loads:
            self._check_used_loads(ctx, issuer, index)
        self._area_writes[index] = self._flying + agent

    def _takes_off(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        area: Area,
        index: Index,
        agent: np.uint32,
        *,
        writes: bool,
    ) -> bool:
        """Count an operation; False if one like it is on its way, so that all has been checked."""
        key = self._flight(area, agent, writes)
        count, warp = self._flights.get(key, (0, -1))
        self._flights[key] = count + 1, issuer.first
        if warp != issuer.first:
            self._check_issue(ctx, issuer, index, writes=writes)
        return count == 0

    def _check_issue(
        self, ctx: BlockContext, issuer: Issuer, index: Index, *, writes: bool
    ) -> None:
        """Operations of two warps on the same cells have to be issued in an order."""
        clocks = self._clocks()
        assert clocks.tensor is not None
        seen = clocks.seen[issuer.first, issuer.slot, clocks.tensor]
        for number in (0, 1) if writes else (1,):
            stamps = self._issues[number][index]
            bad = (stamps >= seen[stamps % np.uint32(clocks.agents)]) & (stamps != 0)
            if bad.any():
                stamp = int(stamps[bad].max())
                text = "two warps issue operations on the same tensor memory in no order"
                other = self._site(issuer.slot, stamp, "operation")
                report_warp(ctx, "tmem-race", text, issuer.slot, issuer.first, other=other)
        event = clocks.access(ctx.instr.index)
        self._issues[int(writes)][index] = event + clocks.agent[issuer.first, issuer.slot]

    def _flight(self, area: Area, agent: np.uint32, writes: bool) -> Flight:
        lanes, columns = area.lanes, area.columns
        rows = bytes((lanes.start, lanes.stop)) if isinstance(lanes, slice) else lanes.tobytes()
        return area.slot, columns.start, columns.stop, rows, int(agent), writes

    def finish_read(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core has read an area."""
        self._lands(self._area_reads[-1], area, self._agent(row, slot), event, writes=False)

    def finish_write(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core has written an area."""
        self._lands(self._area_writes, area, self._agent(row, slot), event, writes=True)

    def _lands(
        self, stamps: np.ndarray, area: Area, agent: np.uint32, event: np.uint32, *, writes: bool
    ) -> None:
        key = self._flight(area, agent, writes)
        count, warp = self._flights[key]
        if count > 1:
            self._flights[key] = count - 1, warp
            return  # another one like it is still to come
        del self._flights[key]
        stamps[self._index(area)] = event + agent
        for slot, start, stop, rows, other, kind in self._flights:
            columns = slice(start, stop)
            if kind == writes and slot == area.slot and _meet(columns, area.columns):
                lanes = slice(*rows) if len(rows) == 2 else np.frombuffer(rows, np.int64)
                index = self._index(area._replace(lanes=lanes, columns=columns))
                stamps[index] = self._flying + np.uint32(other)

    def begin_commit(self, issuer: Issuer) -> np.ndarray:
        """What a commit passes on of its issuer: what is ordered for tensor memory, ``(columns,)``.

        The commit is a ``tcgen05.fence::before_thread_sync`` (9.7.16.6.4.2) and no more.
        """
        clocks = self._clocks()
        known = clocks.release((issuer.first, issuer.last, issuer.slot, issuer.slot + 1))[0]
        known[: clocks.columns - clocks.agents] = 0
        return known

    def finish_commit(self, known: np.ndarray, row: int, slot: int) -> np.ndarray:
        """The same with what the tensor core has done by now: known to whoever waits."""
        clocks = self._clocks()
        limit = clocks.release((row, row + 1, slot, slot + 1))[0, self._agent(row, slot)]
        known = known.copy()
        known[self._agent(row, slot) :: clocks.agents] = limit
        return known

    def _agent(self, row: int, slot: int) -> np.uint32:
        return self._clocks().agent[row, slot]

    @staticmethod
    def _index(area: Area) -> Index:
        """The granules of an area."""
        lanes = area.lanes
        if isinstance(lanes, slice):
            granules = slice(lanes.start // HALF_LANES, -(-lanes.stop // HALF_LANES))
            return area.slot, area.columns, granules
        return area.slot, area.columns, np.unique(lanes // HALF_LANES)

    def _known(self, issuer: Issuer, agent: np.uint32) -> np.ndarray:
        """What is ordered before an operation of the tensor core, ``(agents,)``."""
        clocks = self._clocks()
        assert clocks.tensor is not None
        known = clocks.seen[issuer.first : issuer.last, issuer.slot, clocks.tensor].min(axis=0)
        known[agent] = _ALWAYS
        return known

    # --- fences and waits -------------------------------------------------------------------------

    def fence_before(self, ctx: BlockContext, active: np.ndarray) -> None:
        """``tcgen05.fence::before_thread_sync`` by warps (bool ``(w, c)`` over ``ctx.rect``)."""
        clocks = self._clocks()
        w0, _, c0, c1 = ctx.rect
        for w in np.flatnonzero(active.any(axis=1)):
            warp = w0 + int(w)
            known = clocks.release((warp, warp + 1, c0, c1))[:, clocks.tensor]
            np.copyto(self._before[warp, c0:c1], known, where=active[w][:, None])

    def fence_after(self, ctx: BlockContext, active: np.ndarray) -> None:
        """``tcgen05.fence::after_thread_sync``: what relaxed waits have seen is ordered now."""
        clocks = self._clocks()
        w0, w1, c0, c1 = ctx.rect
        snapshot = np.zeros((*active.shape, clocks.columns), np.uint32)
        snapshot[..., clocks.tensor] = self._after[w0:w1, c0:c1]
        for w in np.flatnonzero(active.any(axis=1)):
            rect = w0 + int(w), w0 + int(w) + 1, c0, c1
            clocks.acquire(rect, snapshot[w], active[w : w + 1])

    def relaxed_arrival(self, slot: int, warp: int, known: np.ndarray | None) -> np.ndarray:
        """What a warp's relaxed arrival passes on, ``(columns,)``: ``known`` and its fence."""
        clocks = self._clocks()
        out = np.zeros(clocks.columns, np.uint32) if known is None else known.copy()
        np.maximum(out[clocks.tensor], self._before[warp, slot], out=out[clocks.tensor])
        return out

    def without_fence(self, slot: int, warp: int) -> np.ndarray:
        """What the arrival would pass on behind a fence, ``(agents,)``."""
        clocks = self._clocks()
        return clocks.release((warp, warp + 1, slot, slot + 1))[0, clocks.tensor]

    def waited(
        self,
        slot: int,
        warps: np.ndarray,
        released: np.ndarray | None,
        unfenced: np.ndarray | None,
        *,
        relaxed: bool,
    ) -> None:
        """Warps (bool ``(W,)``) have seen a barrier complete.

        Args:
            released: what its arrivals passed on, ``(columns,)``.
            unfenced: what they would have passed on with fences, ``(agents,)``.
        """
        clocks = self._clocks()
        hints = [unfenced]
        if relaxed and released is not None:
            seen = released[clocks.tensor]
            self._after[warps, slot] = np.maximum(self._after[warps, slot], seen)
            hints.append(seen)
        for hint in hints:
            if hint is not None:
                self._unfenced[warps, slot] = np.maximum(self._unfenced[warps, slot], hint)

    def free(self, ctx: BlockContext, slot: int, warp: int, columns: slice) -> None:
        """A warp gives columns back: as a write, after which nobody has written them."""
        clocks = self._clocks()
        assert clocks.tensor is not None
        issuer = Issuer(slot, warp, warp + 1)
        index = slot, columns, slice(0, GRANULES)
        seen = clocks.seen[warp, slot, clocks.tensor]
        writes = self._area_writes[index]
        self._check_area(ctx, issuer, index, writes, seen, "write", reading=False)
        for reads in self._area_reads:
            self._check_area(ctx, issuer, index, reads[index], seen, "read", reading=False)
        writes[...] = NEVER
        self._area_reads[(slice(None), *index)] = 0
        for pending in (self._stores, self._loads, self._used_loads):
            for access in pending:
                slots, theirs = access.piece.slots, access.piece.columns
                if slots.start <= slot < slots.stop and _meet(theirs, columns):
                    access.warps[:, slot - slots.start] = False

    # --- checks -----------------------------------------------------------------------------------

    def _check(
        self, ctx: BlockContext, piece: Piece, stamps: np.ndarray, what: str, *, reading: bool
    ) -> None:
        """Compare what warps access with what was accessed before (``what``: a write or a read)."""
        clocks = self._clocks()
        seen = clocks.seen[piece.warps, piece.slots, clocks.tensor]
        agents = np.uint32(clocks.agents)
        high, low = stamps.max(axis=(1, 3)).T, stamps.min(axis=(1, 3)).T
        nothing = NEVER if what == "write" else 0
        if not (reading and what == "write") and (low == nothing).all() and (high == low).all():
            return
        if (high == low).all():  # the usual case: one access left all stamps of a warp
            last = (high % agents).astype(np.intp)[..., None]
            if (high < np.take_along_axis(seen, last, axis=-1)[..., 0]).all():
                return
        w, c = (np.arange(n) for n in piece.shape)
        limits = seen[w[None, None, :, None], c[:, None, None, None], stamps % agents]
        bad = stamps >= limits
        if not reading:
            bad &= stamps != nothing
        for stamp in np.unique(stamps[bad]):
            at = np.argwhere(bad & (stamps == stamp))[0]
            slot, warp = piece.slots.start + int(at[0]), piece.warps.start + int(at[2])
            lane = warp % QUARTERS * QUARTER_LANES
            lane += (piece.halves.start + int(at[3])) * HALF_LANES
            address = lane << 16 | piece.columns.start + int(at[1])
            issuer = Issuer(slot, warp, warp + 1)
            self._blame(ctx, issuer, int(stamp), what, address, reading=reading)

    def _check_area(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        index: Index,
        stamps: np.ndarray,
        seen: np.ndarray,
        what: str,
        *,
        reading: bool,
    ) -> None:
        """The same for an area, with what is ordered before the access, ``(agents,)``."""
        agents = np.uint32(self._clocks().agents)
        high = stamps.max()
        if high < seen[high % agents] and (stamps == high).all():
            return
        bad = stamps >= seen[stamps % agents]
        if what == "read":
            bad &= stamps != 0
        elif not reading:
            bad &= stamps != NEVER
        for stamp in np.unique(stamps[bad]):
            column, granule = np.argwhere(bad & (stamps == stamp))[0]
            _, columns, granules = index
            first = np.arange(GRANULES)[granules][granule]
            address = int(first) * HALF_LANES << 16 | columns.start + int(column)
            self._blame(ctx, issuer, int(stamp), what, address, reading=reading)

    def _check_used_loads(self, ctx: BlockContext, issuer: Issuer, index: Index) -> None:
        """Cells are written of which a load is over only because its registers were used."""
        slot, columns, granules = index
        hit = np.zeros(GRANULES, bool)
        hit[granules] = True
        for load in self._used_loads:
            piece = load.piece
            inside = piece.slots.start <= slot < piece.slots.stop
            if not inside or not _meet(piece.columns, columns):
                continue
            lanes = hit.reshape(QUARTERS, 2)[piece.quarters, piece.halves].any(axis=1)
            warps = load.warps[:, slot - piece.slots.start]
            if not (lanes & warps).any():
                continue
            warp = piece.warps.start + int(np.argmax(lanes & warps))
            warps[lanes] = False
            text = "tensor memory is written after a load that only the use of its registers ended"
            other = hazards.site(self.wave, load.instr, "load", warp, slot)
            report_warp(ctx, "tmem-load-order", text, issuer.slot, issuer.first, other=other)

    def _blame(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        stamp: int,
        what: str,
        address: int,
        *,
        reading: bool,
    ) -> None:
        """Report an access that conflicts with the one that left a stamp."""
        clocks = self._clocks()
        rule, text = self._verdict(clocks, issuer, stamp, what, reading)
        other = self._site(issuer.slot, stamp, what)
        report_warp(ctx, rule, text, issuer.slot, issuer.first, address=address, other=other)

    def _site(self, slot: int, stamp: int, what: str) -> hazards.AccessSite | None:
        """Where the access stands that left a stamp in the CTA of a slot, as far as is known."""
        clocks = self._clocks()
        rank, row = divmod(stamp % clocks.agents, clocks.rows)
        warp = row if row < self.wave.num_warps else None
        slot += rank - int(self.wave.cta_rank[slot])
        number = clocks.instruction(stamp) if stamp < IN_FLIGHT else None
        if number is not None:
            return hazards.site(self.wave, self.wave.kernel.body[number], what, warp, slot)
        if warp is None or stamp == NEVER:
            return None
        for access in (*self._stores, *self._loads):
            warps = access.piece.warps
            if warps.start <= warp < warps.stop:
                return hazards.site(self.wave, access.instr, what, warp, slot)
        return None

    def _verdict(
        self, clocks: Clocks, issuer: Issuer, stamp: int, what: str, reading: bool
    ) -> tuple[str, str]:
        """The rule that an access breaks, and what to say."""
        if stamp == NEVER:
            return "uninitialised-tmem-read", "tensor memory that was never written is read"
        agent = stamp % clocks.agents
        verb = "read" if reading else "written"
        unfenced = self._unfenced[issuer.first, issuer.slot, agent]
        if stamp < IN_FLIGHT and stamp < unfenced:
            text = f"tensor memory is {verb} behind relaxed synchronisation without tcgen05.fence"
            return "missing-tcgen05-fence", text
        if agent % clocks.rows >= self.wave.num_warps:
            rule = f"tmem-{'read' if reading else 'write'}-before-completion"
            doing = "writes" if what == "write" else "reads"
            text = f"tensor memory is {verb} while the tensor core {doing} it, as far as is known"
            return rule, text
        if stamp >= IN_FLIGHT:
            name = "store" if what == "write" else "load"
            text = f"tensor memory is {verb} and a {name} of it has not been waited for"
            return f"tmem-unwaited-{name}", text
        return "tmem-race", f"tensor memory is {verb} without order after another warp's {what}"


def _meet(a: slice, b: slice) -> bool:
    """Whether two ranges have something in common."""
    return a.start < b.stop and b.start < a.stop
