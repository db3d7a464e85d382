"""The queue of a tensor core: mma, cp and shift in the order of issue, and what commits announce.

One queue serves a CTA, or the two CTAs of a pair for ``.cta_group::2``. ``tcgen05.mma``, ``.cp``
and ``.shift`` enter it as :class:`Operation`; they are carried out one after the other. The ISA
promises that order for the pairs that programs chain (PTX ISA 9.7.16.6.2); nothing is relied upon
that another order could show, since what an operation writes is known to others only by a commit.

``tcgen05.commit`` makes an mbarrier track the operations that its thread has issued so far. When
they are done the mbarrier is arrived on. Who waits for that phase knows that they have happened,
and with them everything that happened before they were issued: what the issuing warp knew.

What is carried out at one time ends with a commit, so that the same products are summed together
under every policy: ``eager`` goes on at the commit, ``late`` when nothing else in the wave can run,
one commit at a time, ``random`` at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim.async_shadow import Area as SharedArea
from cute_fa.sim.async_shadow import AsyncShadow, Issuer, report_warp
from cute_fa.sim.engines import tensor_row
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.mbarriers import Mbarrier, Mbarriers
from cute_fa.sim.tensor_memory import Area, TensorMemory

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

_CHANCE = 0.25  # of each step to carry something out


@dataclass(eq=False)
class Operation:
    """Something that the tensor core does in its turn.

    Attributes:
        issuer: the warp that issued it; lane: its thread.
        pair: ``.cta_group::2``.
        shared, reads, writes: what it was found to access, in shared and in tensor memory.
    """

    instr: Instr
    issuer: Issuer
    lane: int
    pair: bool
    shared: list[SharedArea] = field(init=False, default_factory=list)
    reads: list[Area] = field(init=False, default_factory=list)
    writes: list[Area] = field(init=False, default_factory=list)

    @property
    def thread(self) -> tuple[int, int, int]:
        """(slot, warp, lane) of the issuing thread."""
        return self.issuer.slot, self.issuer.first, self.lane

    def execute(self, ctx: BlockContext, following: deque[Operation | Commit]) -> None:
        """Do it now, in memory; may take operations off the queue's head and do them as well."""
        raise NotImplementedError(type(self).__name__)


@dataclass(eq=False)
class Commit:
    """A commit in the queue: the barriers that it arrives on, and what its waiters will know.

    Attributes:
        tracked: the operations of its thread that no earlier commit tracks.
        knowledge: clock snapshot of the issuing warp, ``(columns,)``; None without race checks.
    """

    instr: Instr
    issuer: Issuer
    bars: list[Mbarrier]
    tracked: list[Operation]
    knowledge: np.ndarray | None


@dataclass(eq=False)
class _Queue:
    entries: deque[Operation | Commit] = field(default_factory=deque)
    open: dict[tuple[int, int, int], list[Operation]] = field(default_factory=dict)


@subsystem
class TensorQueues(Subsystem):
    """The queues of one wave, by the slot of the CTA, or of the even CTA of a pair.

    Attributes:
        row: agent row of the tensor cores.
        operand_areas: what operands cover in shared memory, by what describes them.
    """

    name = "tensor-queues"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.queues: dict[int, _Queue] = {}
        self.operand_areas: dict[Hashable, SharedArea] = {}
        self.eager = wave.options.completion == "eager"
        self.late = wave.options.completion == "late"
        self.row = tensor_row(wave.num_warps, 0)

    def _queue(self, slot: int, pair: bool) -> _Queue:
        key = slot - int(self.wave.cta_rank[slot]) % 2 if pair else slot
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = _Queue()
        return queue

    def issue(self, operation: Operation) -> None:
        """Append an operation."""
        queue = self._queue(operation.issuer.slot, operation.pair)
        queue.entries.append(operation)
        queue.open.setdefault(operation.thread, []).append(operation)

    def commit(
        self, ctx: BlockContext, issuer: Issuer, lane: int, pair: bool, bars: list[Mbarrier]
    ) -> None:
        """Let barriers track what a thread has issued."""
        queue = self._queue(issuer.slot, pair)
        clocks = self.wave.shared_state[AsyncShadow.name].clocks
        known = None
        if clocks is not None:
            rect = issuer.first, issuer.last, issuer.slot, issuer.slot + 1
            known = clocks.release(rect)[0]
        tracked = queue.open.pop((issuer.slot, issuer.first, lane), [])
        queue.entries.append(Commit(ctx.instr, issuer, bars, tracked, known))
        if self.eager:
            self._run(ctx, queue, len(queue.entries))

    def finish(self, operations: Sequence[Operation], slot: int, event: np.uint32) -> None:
        """What a CTA issued has happened, at an event of the race clocks: tell the shadows."""
        areas: AsyncShadow = self.wave.shared_state[AsyncShadow.name]
        memory: TensorMemory = self.wave.shared_state[TensorMemory.name]
        shared = [area for operation in operations for area in operation.shared]
        if shared:
            areas.finish_reads(shared, self.row, slot, self.row, event)
        for operation in operations:
            for area in operation.reads:
                memory.finish_read(area, self.row, slot, event)
            for area in operation.writes:
                memory.finish_write(area, self.row, slot, event)

    # --- carrying out -----------------------------------------------------------------------------

    def _run(self, ctx: BlockContext, queue: _Queue, count: int) -> None:
        """Carry out the first ``count`` entries (operations may take more with them)."""
        instr = ctx.instr if hasattr(ctx, "instr") else None
        entries = queue.entries
        stop = len(entries) - count
        while len(entries) > stop:
            entry = entries.popleft()
            ctx.instr = entry.instr
            if isinstance(entry, Commit):
                self._announce(ctx, entry)
            else:
                entry.execute(ctx, entries)
        if instr is not None:
            ctx.instr = instr

    def _announce(self, ctx: BlockContext, commit: Commit) -> None:
        wave = self.wave
        clocks = wave.shared_state[AsyncShadow.name].clocks
        event = np.uint32(0) if clocks is None else clocks.access(commit.instr.index)
        self.finish(commit.tracked, commit.issuer.slot, event)
        known = commit.knowledge
        if known is not None and clocks is not None:  # in every section of the columns
            agent = int(clocks.agent[self.row, commit.issuer.slot])
            known[agent :: clocks.agents] = event + np.uint32(clocks.agents)
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        slot, warp, _ = commit.issuer
        for bar in commit.bars:
            if not wave.alive[:, bar.slot].any():
                if bar.slot != slot:
                    text = "a commit arrives in a CTA whose threads have all exited"
                    report_warp(ctx, "exited-cta-access", text, slot, warp)
                continue
            table.arrive(ctx, bar, 1, slot, warp, known)

    def _commits(self, queue: _Queue) -> list[int]:
        """How many entries there are up to and with each commit."""
        return [n for n, entry in enumerate(queue.entries, 1) if isinstance(entry, Commit)]

    def on_idle(self, ctx: BlockContext) -> bool:
        """Nothing else can run: go on up to and with the next commit of the first queue."""
        for queue in self.queues.values():
            stops = self._commits(queue)
            if stops:
                self._run(ctx, queue, stops[0])
                return True
        return False

    def on_step(self, ctx: BlockContext) -> None:
        for queue in self.queues.values():
            if queue.entries and self.wave.rng.random() < _CHANCE:
                stops = self._commits(queue)
                if stops:
                    self._run(ctx, queue, stops[int(self.wave.rng.integers(len(stops)))])

    # --- the end ----------------------------------------------------------------------------------

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        """A thread must not exit with operations that no commit of its tracks."""
        if not self.queues:
            return
        gone = lanes.full_mask()
        for queue in self.queues.values():
            for thread in [t for t in queue.open if gone[t[1], t[0], t[2]]]:
                for operation in queue.open.pop(thread):
                    text = "the thread exits and no tcgen05.commit tracks the operation"
                    rule = "tensor-uncommitted"
                    report_warp(ctx, rule, text, thread[0], thread[1], instr=operation.instr)

    def on_wave_end(self, wave: Wave) -> None:
        self.queues.clear()

    def describe(self) -> list[str]:
        lines = []
        for slot, queue in self.queues.items():
            waiting = [entry.instr.line for entry in queue.entries]
            open_lines = sorted({op.instr.line for ops in queue.open.values() for op in ops})
            cta = tuple(int(x) for x in self.wave.cta_ids[slot])
            if waiting or open_lines:
                text = f"tensor core of CTA {cta}: PTX lines {waiting} are in its queue"
                lines.append(f"{text}; no commit tracks {open_lines}")
        return lines
