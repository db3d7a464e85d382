"""The scheduler of one wave: which lanes run which block next.

Ready lanes are grouped by the block they stand at; the lowest block runs with all lanes that stand
there. Compilers lay code out so that a branch's paths come before the place where they meet, and so
lanes that parted at a branch meet again there. Lanes leave the ready ones when a blocking
instruction parks them, when a poll fails (they come back when nothing else is left), and when a
partial warp reaches an instruction that all of it must execute.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import hazards
from cute_fa.sim.collectives import EVERYONE, lacking
from cute_fa.sim.isa import Ticket
from cute_fa.sim.lanes import LaneSet
from cute_fa.sim.machine import Machine
from cute_fa.sim.program import CompiledBlock
from cute_fa.sim.wave import BlockContext, Wave

_IDLE_ROUNDS = 3
"""Rounds of failed polls without progress after which something else has to happen."""


class Scheduler:
    """Runs a wave to its end.

    Attributes:
        runs: how often each set of lanes has executed each block.
    """

    def __init__(self, wave: Wave, machine: Machine) -> None:
        self.wave = wave
        self.machine = machine
        self.blocks = machine.program.blocks
        self.ctx = BlockContext(wave)
        self.runs: list[dict[LaneSet, int]] = [{} for _ in self.blocks]
        self.trace = wave.trace
        self.ready: dict[int, LaneSet] = {}
        self.polling: dict[int, LaneSet] = {}
        self.partial: dict[int, LaneSet] = {}
        self.progress = 0
        self._seen_progress = -1
        self._idle_rounds = 0
        self._random = wave.options.completion == "random"

    def run(self) -> None:
        """Run until every lane has exited.

        Raises:
            HazardError: a hazard of error severity, if the simulation is strict.
        """
        everyone = self.wave.space.from_mask(self.wave.alive)
        if everyone is not None:
            self.ready[0] = everyone
        while self.ready or self._wake():
            if self._random:
                self._step_random()
            else:
                index = min(self.ready)
                lanes = self.ready.pop(index)
                if self.blocks[index].members and lanes.mask is not None:
                    whole = self._hold_partial_warps(index, lanes)
                    if whole is None:
                        continue
                    lanes = whole
                self._run_from(index, lanes)

    # --- running ----------------------------------------------------------------------------------

    def _run_from(self, index: int, lanes: LaneSet) -> None:
        """Run lanes from a block on, as long as they stay together and lowest."""
        ready, ctx, blocks = self.ready, self.ctx, self.blocks
        floor = min(ready) if ready else len(blocks)
        while True:
            following = self._run_block(blocks[index], lanes)
            if ctx.freed or ctx.yielded is not None or len(following) != 1:
                self._settle(following)
                return
            index, lanes = following[0]
            if index >= floor or self.partial:
                self._admit(index, lanes)
                return
            if blocks[index].members and lanes.mask is not None:
                self._admit(index, lanes)
                return

    def _run_block(self, block: CompiledBlock, lanes: LaneSet) -> list[tuple[int, LaneSet]]:
        """Run one block; returns where its lanes stand afterwards."""
        index = block.index
        ctx = self.ctx
        mask = lanes.mask
        ctx.lanes = lanes
        ctx.rect = rect = lanes.rect
        ctx.block_index = index
        masked = mask is not None
        function = self.machine.blocks[index].get((rect, masked))
        if function is None:
            function = self.machine.bind(index, rect, masked)
        runs = self.runs[index]
        runs[lanes] = runs.get(lanes, 0) + 1
        if self.trace is not None:
            self.trace.run(index, lanes)
        self.wave.steps += 1
        if self.wave.steps > self.wave.options.max_block_steps:
            self._give_up(block, lanes)
        if block.progress:
            self.progress += 1
        result = function(ctx, mask)
        kind = block.kind
        if kind == "fall":
            if ctx.parked:
                left = ctx.not_parked(lanes)
                ctx.parked.clear()
                return [] if left is None else [(block.next, left)]
            return [(block.next, lanes)]
        if kind == "jump":
            return [(block.target, lanes)]
        if kind == "branch":
            return self._branch(block, lanes, result)
        if kind == "blocking":
            return [] if result is None else [(block.next, result)]
        return self._rare_end(block, lanes, result)

    def _branch(
        self, block: CompiledBlock, lanes: LaneSet, taken: Any
    ) -> list[tuple[int, LaneSet]]:
        if taken is True:
            return [(block.target, lanes)]
        if taken is False:
            return [(block.next, lanes)]
        jumping, falling = lanes.split(taken)
        if falling is None:
            return [(block.target, lanes)]
        if jumping is None:
            return [(block.next, lanes)]
        return [(block.next, falling), (block.target, jumping)]

    def _rare_end(
        self, block: CompiledBlock, lanes: LaneSet, result: Any
    ) -> list[tuple[int, LaneSet]]:
        if block.kind == "exit":
            self._exit(lanes)
            return []
        if block.kind == "exit_if":
            leaving, staying = lanes.split(np.asarray(result, bool))
            if leaving is not None:
                self._exit(leaving)
            return [] if staying is None else [(block.next, staying)]
        assert block.kind == "switch"
        out = []
        left: LaneSet | None = lanes
        for value, target in enumerate(block.table):
            if left is None:
                break
            w0, w1, c0, c1 = left.rect
            o0, _, p0, _ = lanes.rect
            shape = lanes.shape
            choice = np.broadcast_to(result, shape)[w0 - o0 : w1 - o0, c0 - p0 : c1 - p0]
            going, left = left.split(choice == value)
            if going is not None:
                out.append((target, going))
        return out

    def _exit(self, lanes: LaneSet) -> None:
        w0, w1, c0, c1 = lanes.rect
        view = self.wave.alive[w0:w1, c0:c1]
        if lanes.mask is None:
            view[...] = False
        else:
            view &= ~lanes.mask
        self.progress += 1
        for unit in self.wave.shared_state.values():
            unit.on_exit(self.ctx, lanes)
        self._release_partial()

    def activity(self) -> tuple[np.ndarray, np.ndarray]:
        """Executions of each block by each warp of a CTA, and by its lanes, over all CTAs.

        Returns:
            two int64 arrays ``(blocks, W)``.
        """
        warps = np.zeros((len(self.blocks), self.wave.num_warps), np.int64)
        lanes = np.zeros_like(warps)
        for index, runs in enumerate(self.runs):
            for some, times in runs.items():
                w0, w1, _, _ = some.rect
                warps[index, w0:w1] += times * some.warp_any.sum(axis=1)
                lanes[index, w0:w1] += times * some.warp_counts.sum(axis=1)
        return warps, lanes

    # --- bookkeeping of lanes ---------------------------------------------------------------------

    def _admit(self, index: int, lanes: LaneSet) -> None:
        """Make lanes ready at a block."""
        waiting = self.partial.pop(index, None)
        if waiting is not None:
            lanes = lanes.union(waiting)
        known = self.ready.get(index)
        self.ready[index] = lanes if known is None else known.union(lanes)

    def _settle(self, following: list[tuple[int, LaneSet]]) -> None:
        """Admit what a block left behind: lanes going on, lanes it released, lanes that yield."""
        if self.ctx.yielded is not None:
            following = self._set_aside(following)
        self._admit_freed()
        for number, part in following:
            self._admit(number, part)

    def _admit_freed(self) -> None:
        freed = self.ctx.freed
        while freed:
            number, part = freed.pop()
            self._admit(number, part)

    def _set_aside(self, following: list[tuple[int, LaneSet]]) -> list[tuple[int, LaneSet]]:
        """Move yielding lanes to where they wait for their next try; returns the others."""
        yielded = self.ctx.yielded
        self.ctx.yielded = None
        assert yielded is not None
        out = []
        for number, part in following:
            w0, w1, c0, c1 = part.rect
            waiting, going = part.split(yielded.full_mask()[w0:w1, c0:c1])
            if waiting is not None:
                known = self.polling.get(number)
                self.polling[number] = waiting if known is None else known.union(waiting)
            if going is not None:
                out.append((number, going))
        return out

    def _hold_partial_warps(self, index: int, lanes: LaneSet) -> LaneSet | None:
        """Keep back lanes that members of their mask have not come to; returns the others."""
        w0, w1, c0, c1 = lanes.rect
        alive = self.wave.alive[w0:w1, c0:c1]
        masks = self.blocks[index].members
        if EVERYONE in masks:
            short = lanes.warp_any & (lanes.warp_counts < np.count_nonzero(alive, axis=2))
            short = short[:, :, None]
        else:
            here = lanes.dense_mask()
            parts = [m if isinstance(m, int) else self._register(m, lanes) for m in masks]
            short = np.logical_or.reduce([lacking(alive, here, part) for part in parts])
        if not short.any():
            return lanes
        waiting, whole = lanes.split(short)
        if waiting is not None:
            known = self.partial.get(index)
            self.partial[index] = waiting if known is None else known.union(waiting)
        return whole

    def _register(self, name: str, lanes: LaneSet) -> np.ndarray:
        """What a register holds over the rectangle of some lanes."""
        w0, w1, c0, c1 = lanes.rect
        return self.wave.register(name)[w0:w1, c0:c1]

    def _release_partial(self) -> None:
        """Lanes have exited: warps that waited for them may be whole now."""
        for index in list(self.partial):
            self._admit(index, self.partial.pop(index))

    def _wake(self) -> bool:
        """Nothing is ready: find lanes that may run after all. False if the wave is over."""
        ctx = self.ctx
        while not self.ready:
            if self.polling and self._poll_again():
                break
            if any(unit.on_idle(ctx) for unit in self.wave.shared_state.values()):
                self.progress += 1
                self._admit_freed()
                continue
            if self._time_out():
                continue
            if self.partial:
                # Whom they wait for will never come, which the instruction reports.
                index = min(self.partial)
                self._run_from(index, self.partial.pop(index))
                continue
            if self.polling or ctx.tickets:
                self._deadlock()
            return False
        return True

    def _poll_again(self) -> bool:
        """Give failed polls another try, unless several rounds have changed nothing."""
        if self.progress == self._seen_progress:
            self._idle_rounds += 1
            if self._idle_rounds > _IDLE_ROUNDS:
                return False
        else:
            self._idle_rounds = 0
            self._seen_progress = self.progress
        for index, lanes in self.polling.items():
            self._admit(index, lanes)
        self.polling.clear()
        return True

    def _time_out(self) -> bool:
        """Let lanes go whose wait may time out; they count as progress only by what they do."""
        expired = [ticket for ticket in self.ctx.tickets if ticket.may_time_out]
        if not expired or self.progress == self._seen_progress:
            return False
        self._seen_progress = self.progress
        for ticket in expired:
            ticket.released = True
            del self.ctx.tickets[ticket]
            self._run_timed_out(ticket)
        self._admit_freed()
        return True

    def _run_timed_out(self, ticket: Ticket) -> None:
        if not ticket.retry:
            self._admit(ticket.resume_block, ticket.lanes)
            return
        self.ctx.timed_out = ticket.lanes.dense_mask()
        try:
            following = self._run_block(self.blocks[ticket.resume_block], ticket.lanes)
        finally:
            self.ctx.timed_out = None
        self._settle(following)

    # --- random order -----------------------------------------------------------------------------

    def _step_random(self) -> None:
        """Run a random part of the warps at a random block for a random number of blocks."""
        rng = self.wave.rng
        for unit in self.wave.shared_state.values():
            unit.on_step(self.ctx)
        self._admit_freed()
        indices = sorted(self.ready)
        index = indices[int(rng.integers(len(indices)))]
        lanes = self.ready.pop(index)
        if lanes.warps > 1 and rng.random() < 0.75:
            chosen, rest = lanes.split(rng.random(lanes.shape[:2])[:, :, None] < rng.random())
            if chosen is not None and rest is not None:
                self._admit(index, rest)
                lanes = chosen
        for _ in range(int(rng.geometric(0.25))):
            if self.blocks[index].members and lanes.mask is not None:
                whole = self._hold_partial_warps(index, lanes)
                if whole is None:
                    return
                lanes = whole
            following = self._run_block(self.blocks[index], lanes)
            if self.ctx.freed or self.ctx.yielded is not None or len(following) != 1:
                self._settle(following)
                return
            index, lanes = following[0]
        self._admit(index, lanes)

    # --- reports ----------------------------------------------------------------------------------

    def _deadlock(self) -> None:
        lines = [f"{self._waiting_lanes()} threads wait and nobody can run:"]
        lines += [self._ticket_line(ticket) for ticket in self.ctx.tickets]
        for index, lanes in self.polling.items():
            previous = self._last_of(max(index - 1, 0))
            lines.append(self._line(lanes, previous, "polls without success"))
        for unit in self.wave.shared_state.values():
            lines += [f"    {line}" for line in unit.describe()]
        first = next(iter(self.ctx.tickets), None)
        instr = first.instr if first else self._last_of(min(self.polling))
        lanes = first.lanes if first else next(iter(self.polling.values()))
        self.polling.clear()
        self.ctx.tickets.clear()
        self._record("deadlock", "\n".join(lines), instr, lanes)

    def _last_of(self, index: int) -> ptx.Instr:
        """The last instruction of a block."""
        return self.wave.kernel.body[self.blocks[index].last]

    def _waiting_lanes(self) -> int:
        parts = [ticket.lanes for ticket in self.ctx.tickets] + list(self.polling.values())
        return sum(part.lanes for part in parts)

    def _ticket_line(self, ticket: Ticket) -> str:
        return self._line(ticket.lanes, ticket.instr, ticket.reason.render())

    def _line(self, lanes: LaneSet, instr: ptx.Instr, what: str) -> str:
        slots: dict[int, list[int]] = {}
        for warp, slot in lanes.each_warp():
            slots.setdefault(slot, []).append(warp)
        shown = [
            f"CTA {self.ctx.cta_of(slot)} warps {', '.join(map(str, sorted(warps)))}"
            for slot, warps in sorted(slots.items())[:4]
        ]
        more = f" and {len(slots) - 4} CTAs more" if len(slots) > 4 else ""
        where = f"PTX line {instr.line}: {instr.text}"
        return f"    {'; '.join(shown)}{more} ({lanes.lanes} lanes): {what} at {where}"

    def _give_up(self, block: CompiledBlock, lanes: LaneSet) -> None:
        limit = self.wave.options.max_block_steps
        message = f"{limit} basic blocks were executed in one wave and it has not ended"
        self._record("livelock", message, self._last_of(block.index), lanes)
        raise hazards.HazardError(self.wave.hazards[-1])

    def _record(self, rule: str, message: str, instr: ptx.Instr, lanes: LaneSet) -> None:
        warp, slot = next(lanes.each_warp())
        hazards.report(self.wave, rule, message, instr, slot, warp=warp)
