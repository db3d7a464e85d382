"""Who has which columns of tensor memory (PTX ISA 9.7.16.1.2, 9.7.16.7.1).

Columns are handed out in powers of two from 32 to 512. Requests of one CTA are served in order; one
of a CTA pair needs a warp of each CTA, and gives both the same columns. Where the columns lie is
not specified: the first that are free, or any under the random policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.isa import Subsystem, Ticket, subsystem
from cute_fa.sim.tensor_memory import COLUMNS, POISON, TensorMemory

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

UNIT = 32  # columns


@dataclass(eq=False)
class Request:
    """A warp that wants columns, or wants to give some back together with the peer CTA.

    Attributes:
        column: the first column, once it has been decided.
        ticket: holds the warp.
    """

    slot: int
    warp: int
    columns: int
    pair: bool
    instr: Instr
    column: int | None = None
    ticket: Ticket | None = None


@dataclass(frozen=True)
class Allocation:
    """Columns in use."""

    columns: int
    pair: bool
    warp: int
    instr: Instr


@subsystem
class TensorAllocation(Subsystem):
    """The allocations of one wave's CTAs, by slot."""

    name = "tensor-allocation"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        slots = range(wave.num_ctas)
        self.live: list[dict[int, Allocation]] = [{} for _ in slots]
        self.queues: list[list[Request]] = [[] for _ in slots]
        self.asked: dict[tuple[int, int], Request] = {}  # by warp and slot, until they go on
        self.leaving: dict[tuple[int, int], Request] = {}  # by slot and first column
        self.relinquished: list[Instr | None] = [None for _ in slots]
        self.smallest = [COLUMNS for _ in slots]

    @property
    def memory(self) -> TensorMemory:
        return self.wave.shared_state[TensorMemory.name]

    def peer(self, slot: int) -> int | None:
        """The slot of the other CTA of a pair; None in a cluster without pairs."""
        rank = int(self.wave.cta_rank[slot]) ^ 1
        if rank >= self.wave.cluster_size:
            return None
        return slot - int(self.wave.cta_rank[slot]) + rank

    def describe(self) -> list[str]:
        lines = []
        for slot, queue in enumerate(self.queues):
            for request in queue:
                cta = tuple(int(x) for x in self.wave.cta_ids[slot])
                used = sum(item.columns for item in self.live[slot].values())
                lines.append(
                    f"tensor memory of CTA {cta}: warp {request.warp} wants {request.columns} "
                    f"columns, {used} of {COLUMNS} are in use"
                )
        return lines

    # --- allocation -------------------------------------------------------------------------------

    def request(self, ctx: BlockContext, request: Request) -> bool:
        """Ask for columns; False if the request breaks the rules, and nothing comes of it."""
        slot, warp, columns = request.slot, request.warp, request.columns
        instr = self.relinquished[slot]
        if instr is not None:
            other = hazards.site(self.wave, instr, "relinquished", None, slot)
            text = "tcgen05.alloc in a CTA that has given up the right to allocate"
            report_warp(ctx, "tmem-allocation", text, slot, warp, other=other)
        if not self._legal(ctx, slot, warp, columns):
            return False
        if columns > self.smallest[slot]:
            text = f"{columns} columns after {self.smallest[slot]}: later allocations must not grow"
            report_warp(ctx, "tmem-allocation-order", text, slot, warp)
        self.smallest[slot] = min(self.smallest[slot], columns)
        if request.pair and self.peer(slot) is None:
            text = "tcgen05.alloc.cta_group::2 in a cluster that has no CTA pairs"
            report_warp(ctx, "tmem-allocation", text, slot, warp)
            request.pair = False
        self.queues[slot].append(request)
        self.serve(ctx, slot)
        return True

    def _legal(self, ctx: BlockContext, slot: int, warp: int, columns: int) -> bool:
        if UNIT <= columns <= COLUMNS and not columns & (columns - 1):
            return True
        text = f"{columns} columns: not a power of two from {UNIT} to {COLUMNS}"
        report_warp(ctx, "tmem-allocation", text, slot, warp)
        return False

    def serve(self, ctx: BlockContext, slot: int) -> None:
        """Grant the requests of a CTA that can be granted, the oldest first."""
        while self.queues[slot]:
            request = self.queues[slot][0]
            together = [request]
            if request.pair:
                peer = self.peer(slot)
                assert peer is not None
                if not self.queues[peer]:
                    return
                together.append(self.queues[peer][0])
                self._check_agreement(ctx, together)
            column = self._free(together)
            if column is None:
                return
            for granted in together:
                self._grant(granted, column)
                if granted.ticket is not None:
                    ctx.release(granted.ticket)

    def _check_agreement(self, ctx: BlockContext, pair: list[Request]) -> None:
        first, second = pair
        if first.columns != second.columns or not second.pair:
            text = f"the CTAs of a pair ask for {first.columns} and {second.columns} columns"
            if not second.pair:
                text = "one CTA of a pair allocates for the pair, the other one for itself"
            other = hazards.site(self.wave, second.instr, "request", second.warp, second.slot)
            report_warp(
                ctx, "tmem-allocation", text, first.slot, first.warp, other=other, instr=first.instr
            )
            first.columns = second.columns = max(first.columns, second.columns)
            first.pair = second.pair = True

    def _free(self, requests: list[Request]) -> int | None:
        """A first column from which on there is room in every CTA concerned."""
        columns = requests[0].columns
        used = np.zeros(COLUMNS, bool)
        for request in requests:
            used |= self.memory.allocated[request.slot]
        room = ~used.reshape(-1, columns).any(axis=1)  # allocations are aligned to their size
        places = np.flatnonzero(room) * columns
        if not places.size:
            return None
        random = self.wave.options.completion == "random"
        return int(self.wave.rng.choice(places)) if random else int(places[0])

    def _grant(self, request: Request, column: int) -> None:
        slot = request.slot
        self.queues[slot].pop(0)
        request.column = column
        columns = slice(column, column + request.columns)
        self.memory.allocated[slot, columns] = True
        self.memory.cells[slot, columns] = POISON
        self.memory.epoch += 1
        self.live[slot][column] = Allocation(
            request.columns, request.pair, request.warp, request.instr
        )

    # --- deallocation -----------------------------------------------------------------------------

    def give_back(self, ctx: BlockContext, request: Request, address: int) -> bool:
        """Free columns; False if the warp has to wait for the peer CTA to do the same.

        The ISA lets it block or not. Under the late policy it does.
        """
        slot, warp = request.slot, request.warp
        known = self.live[slot].get(address)
        if known is None or known.columns != request.columns or known.pair != request.pair:
            if known is None:
                text = f"no allocation begins at address {address:#x}"
            elif known.columns != request.columns:
                text = f"{request.columns} columns of an allocation of {known.columns}"
            else:
                text = "the allocation was made with another .cta_group"
            report_warp(ctx, "tmem-allocation", text, slot, warp, address=address)
            return True
        request.column = address
        self._release(ctx, slot, warp, address)
        peer = self.peer(slot) if known.pair else None
        if peer is None:
            return True
        waiting = self.leaving.pop((peer, address), None)
        if waiting is not None:
            if waiting.ticket is not None:
                ctx.release(waiting.ticket)
            return True
        policy = self.wave.options.completion
        self.leaving[slot, address] = request
        return not (policy == "late" or (policy == "random" and self.wave.rng.random() < 0.5))

    def _release(self, ctx: BlockContext, slot: int, warp: int, column: int) -> None:
        memory = self.memory
        columns = slice(column, column + self.live[slot].pop(column).columns)
        memory.land()
        if memory.shadow.active:
            memory.shadow.free(ctx, slot, warp, columns)
        memory.allocated[slot, columns] = False
        memory.epoch += 1
        self.serve(ctx, slot)
        peer = self.peer(slot)
        if peer is not None:
            self.serve(ctx, peer)

    def on_wave_end(self, wave: Wave) -> None:
        """Whatever was allocated must have been given back."""
        for slot, live in enumerate(self.live):
            for column, known in live.items():
                text = f"{known.columns} columns from column {column} on are never deallocated"
                where = {"warp": known.warp, "address": column}
                hazards.report(wave, "tmem-leak", text, known.instr, slot, **where)
