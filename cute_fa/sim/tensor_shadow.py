"""Shadow of tensor memory: who accesses which cells, and when that is over.

The stamps of the cells are in :mod:`cute_fa.sim.tensor_stamps`. Three accesses are not over when
the next instruction starts:

* a ``tcgen05.st``, until ``tcgen05.wait::st``;
* a ``tcgen05.ld``, until ``tcgen05.wait::ld`` or until its registers have been used;
* what the tensor core does, until somebody has waited for a commit behind it. Its operations follow
  one another in the order of its queue; those of different warps need an order of their issue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.race import NEVER
from cute_fa.sim.tensor_pieces import QUARTERS, Piece
from cute_fa.sim.tensor_stamps import GRANULES, Index, TensorStamps, Unwaited, meet

if TYPE_CHECKING:
    from cute_fa.ptx import Instr
    from cute_fa.sim.tensor_memory import Area
    from cute_fa.sim.wave import BlockContext

Flight = tuple[int, int, int, bytes, int, bool]
"""Slot, first column, column behind the last, lanes, agent, whether it writes."""


class TensorShadow(TensorStamps):
    """The shadow of one wave's tensor memory; it starts when it is first asked for."""

    def _start(self) -> None:
        super()._start()
        if not self._ready:
            return
        # Operations of the tensor core on their way: how many of each, and who issued the last.
        self._flights: dict[Flight, tuple[int, int]] = {}
        self._before = np.zeros_like(self._unfenced)  # ordered by each warp's last before-fence
        self._after = np.zeros_like(self._unfenced)  # what its next after-fence will order
        # The same about what tcgen05 fences on both sides order.
        self._announced_before = np.zeros_like(self._unfenced)
        self._announced_after = np.zeros_like(self._unfenced)

    def _forget(self) -> None:
        super()._forget()
        for order in (self._before, self._after, self._announced_before, self._announced_after):
            order[...] = 0

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
            if kind == writes and slot == area.slot and meet(columns, area.columns):
                lanes = slice(*rows) if len(rows) == 2 else np.frombuffer(rows, np.int64)
                index = self._index(area._replace(lanes=lanes, columns=columns))
                stamps[index] = self._flying + np.uint32(other)

    # --- fences and waits -------------------------------------------------------------------------

    def fence_before(self, ctx: BlockContext, active: np.ndarray) -> None:
        """``tcgen05.fence::before_thread_sync`` by warps (bool ``(w, c)`` over ``ctx.rect``)."""
        clocks = self._clocks()
        w0, _, c0, c1 = ctx.rect
        for w in np.flatnonzero(active.any(axis=1)):
            warp = w0 + int(w)
            known = clocks.release((warp, warp + 1, c0, c1))[:, clocks.tensor]
            np.copyto(self._before[warp, c0:c1], known, where=active[w][:, None])
            if self._fenced is not None:
                behind = self._fenced[warp, c0:c1].copy()
                own = clocks.agent[warp, c0:c1].astype(np.intp)[:, None]
                np.put_along_axis(behind, own, np.take_along_axis(known, own, -1), -1)
                announced = clocks.seen[warp, c0:c1, clocks.announced]
                np.maximum(announced, behind, out=announced, where=active[w][:, None])
                snapshot = self._announced_before[warp, c0:c1]
                np.copyto(snapshot, announced, where=active[w][:, None])

    def fence_after(self, ctx: BlockContext, active: np.ndarray) -> None:
        """``tcgen05.fence::after_thread_sync``: what relaxed waits have seen is ordered now."""
        clocks = self._clocks()
        w0, w1, c0, c1 = ctx.rect
        snapshot = np.zeros((*active.shape, clocks.columns), np.uint32)
        snapshot[..., clocks.tensor] = self._after[w0:w1, c0:c1]
        if clocks.announced is not None:
            snapshot[..., clocks.announced] = self._announced_after[w0:w1, c0:c1]
        for w in np.flatnonzero(active.any(axis=1)):
            warp = w0 + int(w)
            clocks.acquire((warp, warp + 1, c0, c1), snapshot[w], active[w : w + 1])
            if self._fenced is not None:
                fenced = self._fenced[warp, c0:c1]
                announced = clocks.seen[warp, c0:c1, clocks.announced]
                np.maximum(fenced, announced, out=fenced, where=active[w][:, None])

    def relaxed_arrival(self, slot: int, warp: int, known: np.ndarray | None) -> np.ndarray:
        """What a warp's relaxed arrival passes on, ``(columns,)``: ``known`` and its fence."""
        clocks = self._clocks()
        out = np.zeros(clocks.columns, np.uint32) if known is None else known.copy()
        np.maximum(out[clocks.tensor], self._before[warp, slot], out=out[clocks.tensor])
        if clocks.announced is not None:
            announced = out[clocks.announced]
            np.maximum(announced, self._announced_before[warp, slot], out=announced)
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
            if clocks.announced is not None:
                announced = released[clocks.announced]
                known = self._announced_after[warps, slot]
                self._announced_after[warps, slot] = np.maximum(known, announced)
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
                if slots.start <= slot < slots.stop and meet(theirs, columns):
                    access.warps[:, slot - slots.start] = False
