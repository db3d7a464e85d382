"""mbarrier objects: arrivals, transaction bytes and phases (PTX ISA 9.7.13.15).

A barrier's state is five numbers. They are also written, packed into the 64-bit word that the
program reserved, to shared memory at every change: an ordinary store over a barrier in use is seen
at its next use because the word is not the one that was left there, even where the shadow that
would see it at once is switched off.

A phase is complete when no arrival is pending and the transaction count is zero. Arrivals release
what their warps know; those who wait successfully acquire what was released in completed phases.
Copies that signal a barrier have *landed* once their bytes are counted, and are known to have
arrived by whoever waits for the phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim import hazards
from cute_fa.sim.addresses import RANK_SHIFT, SHARED_BASE, SHARED_OFFSET_MASK, shared_address
from cute_fa.sim.async_shadow import Area, AsyncShadow, report_warp
from cute_fa.sim.engines import landing_row
from cute_fa.sim.isa import Subsystem, Ticket, subsystem
from cute_fa.sim.lanes import Rect
from cute_fa.sim.race import LIVE_BARRIER

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

MOST_COUNT = (1 << 20) - 1
MOST_TRANSACTIONS = (1 << 20) - 1
MOST_ARRIVALS = (1 << 20) - 1
_PHASES = 8  # a token keeps the phase modulo this


@dataclass(eq=False)
class Mbarrier:
    """One mbarrier in use.

    Attributes:
        slot, offset: CTA slot in the wave, and offset in its shared memory.
        number: order of initialisation within the CTA.
        expected, pending, transactions: as in the ISA; pending counts down.
        phase: phases completed since init.
        word: the packed state as last written to shared memory.
        seen_phase: the newest phase that somebody has seen complete.
        knowledge: clock snapshot of the arrivals of the current phase, ``(columns,)``.
        released: the same for completed phases.
        landing: areas filled in the current phase; landed: in completed ones, not waited for yet.
        waiting: tickets of those who wait for the current phase.
        init_stamp, init_warp, init_slot: when (None without checks) and by whom it was
            initialised.
        fenced: a fence makes its init visible to the async proxy and to other CTAs.
        users: (slot, warp) known to be ordered after init.
        unfenced: what relaxed arrivals would have passed on about tensor memory behind a fence,
            ``(agents,)``.
    """

    slot: int
    offset: int
    number: int
    expected: int
    pending: int
    instr: Instr
    init_warp: int
    init_slot: int
    transactions: int = 0
    phase: int = 0
    word: int = 0
    seen_phase: int = -1
    knowledge: np.ndarray | None = None
    released: np.ndarray | None = None
    landing: list[tuple[Area, Instr]] = field(default_factory=list)
    landed: list[tuple[Area, Instr]] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    init_stamp: int | None = None
    fenced: bool = False
    users: set[tuple[int, int]] = field(default_factory=set)
    unfenced: np.ndarray | None = None

    def pack(self) -> int:
        """The state as one 64-bit word: the token that ``mbarrier.arrive`` returns."""
        tx = self.transactions & 0x1F_FFFF
        return self.pending | self.expected << 20 | tx << 40 | self.phase % _PHASES << 61

    def describe(self) -> str:
        return (
            f"{self.pending} of {self.expected} arrivals pending, "
            f"{self.transactions} bytes outstanding, phase {self.phase} (parity {self.phase & 1})"
        )


def pending_of(token: int) -> int:
    """``mbarrier.pending_count``: pending arrivals in a token."""
    return token & MOST_ARRIVALS


@subsystem
class Mbarriers(Subsystem):
    """The mbarriers of one wave, by (slot, offset)."""

    name = "mbarriers"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.bars: dict[tuple[int, int], Mbarrier] = {}
        self.counts = [0] * wave.num_ctas
        self._words = wave.smem.reshape(-1).view(np.uint64)
        self._row_words = wave.smem.shape[1] // 8

    @property
    def areas(self) -> AsyncShadow:
        return self.wave.shared_state[AsyncShadow.name]

    def describe(self) -> list[str]:
        lines = []
        for bar in self.bars.values():
            cta = ", ".join(str(int(x)) for x in self.wave.cta_ids[bar.slot])
            name = f"mbarrier {bar.number} at {bar.offset:#x} of CTA ({cta})"
            lines.append(f"{name}: {bar.describe()}")
        return lines

    def on_wave_end(self, wave: Wave) -> None:
        """Bytes announced and never copied, or copied, and nobody was left to wait for them."""
        for bar in self.bars.values():
            if bar.transactions:
                text = f"the kernel ended with an mbarrier at {bar.offset:#x}: {bar.describe()}"
                self._report_at_end("mbarrier-transactions", text, bar, bar.instr)
            copies = bar.landing or bar.landed
            if copies:
                text = "bytes were copied to shared memory and nobody has waited for their mbarrier"
                self._report_at_end("copy-never-awaited", text, bar, copies[0][1])

    def _report_at_end(self, rule: str, text: str, bar: Mbarrier, instr: Instr) -> None:
        hazards.report(self.wave, rule, text, instr, bar.slot, address=bar.offset)

    # --- addresses --------------------------------------------------------------------------------

    def place(
        self, ctx: BlockContext, address: int, slot: int, warp: int
    ) -> tuple[int, int] | None:
        """(slot, offset) of a barrier's address as the CTA in ``slot`` sees it; None if bad."""
        rank, offset = address >> RANK_SHIFT, address & SHARED_OFFSET_MASK
        if rank >= self.wave.cluster_size:
            text = f"an mbarrier in CTA {rank} of a cluster of {self.wave.cluster_size}"
            report_warp(ctx, "shared-bad-rank", text, slot, warp, address=address)
            return None
        if offset < SHARED_BASE or offset + 8 > self.wave.smem_end:
            text = "an mbarrier outside the CTA's shared memory"
            report_warp(ctx, "shared-out-of-bounds", text, slot, warp, address=address)
            return None
        if offset % 8:
            text = "an mbarrier at an offset that is no multiple of 8"
            report_warp(ctx, "shared-misaligned", text, slot, warp, address=address)
            return None
        return slot - int(self.wave.cta_rank[slot]) + rank, offset

    def _address(self, bar: Mbarrier) -> int:
        """As CTAs of its cluster see it."""
        return shared_address(int(self.wave.cta_rank[bar.slot]), bar.offset)

    def find(self, ctx: BlockContext, address: int, slot: int, warp: int) -> Mbarrier | None:
        """The barrier at an address; reports and returns None if there is none in use."""
        place = self.place(ctx, address, slot, warp)
        if place is None:
            return None
        bar = self.bars.get(place)
        if bar is None:
            text = "no mbarrier has been initialised here"
            report_warp(ctx, "mbarrier-uninitialised", text, slot, warp, address=address)
            return None
        index = bar.slot * self._row_words + bar.offset // 8
        if int(self._words[index]) != bar.word:
            text = "the bytes of an mbarrier in use were overwritten"
            report_warp(ctx, "mbarrier-access", text, slot, warp, address=address)
            self._words[index] = bar.word
        if (slot, warp) not in bar.users:
            self._check_order(ctx, bar, address, slot, warp)
        if bar.slot != slot:
            self.check_fence(ctx, bar, slot, warp)
            if not self.wave.alive[:, bar.slot].any():
                text = "an mbarrier of a CTA that has exited"
                report_warp(ctx, "exited-cta-access", text, slot, warp, address=address)
        return bar

    def _check_order(
        self, ctx: BlockContext, bar: Mbarrier, address: int, slot: int, warp: int
    ) -> None:
        bar.users.add((slot, warp))
        clocks = self.areas.clocks
        if clocks is None or bar.init_stamp is None or bar.init_stamp < clocks.agents:
            return
        agent = int(clocks.agent[bar.init_warp, bar.slot])
        if bar.init_stamp >= int(clocks.seen[warp, slot, agent]):
            text = "nothing orders the initialisation of the mbarrier before its use here"
            report_warp(ctx, "mbarrier-unordered", text, slot, warp, address=address)

    def fence(self, rect: Rect, active: np.ndarray) -> None:
        """Warps (bool ``(w, c)`` over ``rect``) make what they have initialised visible."""
        w0, w1, c0, c1 = rect
        for bar in self.bars.values():
            if not bar.fenced and w0 <= bar.init_warp < w1 and c0 <= bar.init_slot < c1:
                bar.fenced = bool(active[bar.init_warp - w0, bar.init_slot - c0])

    def check_fence(self, ctx: BlockContext, bar: Mbarrier, slot: int, warp: int) -> None:
        """The async proxy, or another CTA, uses the barrier."""
        if not bar.fenced:
            bar.fenced = True
            text = "no fence.mbarrier_init or fence.proxy.async by the warp that initialised it"
            report_warp(ctx, "mbarrier-init-fence", text, slot, warp, address=self._address(bar))

    # --- state ------------------------------------------------------------------------------------

    def initialise(self, ctx: BlockContext, address: int, count: int, slot: int, warp: int) -> None:
        """``mbarrier.init``: phase 0, ``count`` arrivals pending."""
        place = self.place(ctx, address, slot, warp)
        if place is None:
            return
        if place in self.bars:
            text = f"the mbarrier is in use: {self.bars[place].describe()}"
            report_warp(ctx, "mbarrier-reinit", text, slot, warp, address=address)
        if not 1 <= count <= MOST_COUNT:
            text = f"an expected arrival count of {count}, of 1 to {MOST_COUNT}"
            report_warp(ctx, "mbarrier-count", text, slot, warp, address=address)
            count = min(max(count, 1), MOST_COUNT)
        bar = Mbarrier(*place, self.counts[place[0]], count, count, ctx.instr, warp, slot)
        self.counts[place[0]] += 1
        self.bars[place] = bar
        areas = self.areas
        if areas.active and areas.clocks is not None:
            bar.init_stamp = int(areas.clocks.access(ctx.instr.index))
            areas.shadow._writes[areas.span(*place, 8).granules] = LIVE_BARRIER
        self._write(bar)

    def invalidate(self, bar: Mbarrier, instr: Instr, warp: int) -> None:
        """``mbarrier.inval``: the bytes are ordinary memory again."""
        del self.bars[bar.slot, bar.offset]
        areas = self.areas
        if areas.active:
            areas.finish_write(areas.span(bar.slot, bar.offset, 8), warp, bar.slot, instr)

    def expect(self, ctx: BlockContext, bar: Mbarrier, nbytes: int, slot: int, warp: int) -> None:
        """Announce bytes: the transaction count rises."""
        self._transact(ctx, bar, nbytes, slot, warp)
        self._write(bar)

    def complete(self, ctx: BlockContext, bar: Mbarrier, nbytes: int, slot: int, warp: int) -> None:
        """Bytes have been copied: the transaction count falls, and the phase may be complete."""
        self._check_overrun(ctx, bar, slot, warp)
        self._transact(ctx, bar, -nbytes, slot, warp)
        self._settle(ctx, bar)

    def _transact(
        self, ctx: BlockContext, bar: Mbarrier, change: int, slot: int, warp: int
    ) -> None:
        bar.transactions += change
        if abs(bar.transactions) > MOST_TRANSACTIONS:
            text = f"a transaction count of {bar.transactions}, of at most ±{MOST_TRANSACTIONS}"
            address = self._address(bar)
            report_warp(ctx, "mbarrier-count", text, slot, warp, address=address)
            bar.transactions = min(max(bar.transactions, -MOST_TRANSACTIONS), MOST_TRANSACTIONS)

    def arrive(
        self,
        ctx: BlockContext,
        bar: Mbarrier,
        count: int,
        slot: int,
        warp: int,
        knowledge: np.ndarray | None,
        *,
        drop: bool = False,
        completes: bool = True,
    ) -> int:
        """Arrive ``count`` times; returns the token: the state before the arrival.

        Args:
            knowledge: clock snapshot of the arriving warp, ``(columns,)``, or None if relaxed.
            drop: expect as many arrivals fewer in later phases.
            completes: False for ``.noComplete``: the arrival must not complete the phase.
        """
        token = bar.pack()
        address = self._address(bar)
        if not 1 <= count <= MOST_COUNT:
            text = f"an arrival count of {count}, of 1 to {MOST_COUNT}"
            report_warp(ctx, "mbarrier-count", text, slot, warp, address=address)
            return token
        self._check_overrun(ctx, bar, slot, warp)
        if bar.slot != slot:
            self.wave.shared_state["lifetimes"].visit(ctx, bar.slot, slot, warp, address, bar)
        if drop:
            bar.expected -= min(count, bar.expected)
        if count > bar.pending:
            text = f"{count} arrivals where {bar.pending} are pending ({bar.describe()})"
            report_warp(ctx, "mbarrier-underflow", text, slot, warp, address=address)
            count = bar.pending
        bar.pending -= count
        if not completes and bar.pending == 0 and bar.transactions == 0:
            text = "an arrival with .noComplete completes the phase"
            report_warp(ctx, "mbarrier-underflow", text, slot, warp, address=address)
        if knowledge is not None:
            known = bar.knowledge
            bar.knowledge = knowledge if known is None else np.maximum(known, knowledge)
        self._settle(ctx, bar)
        return token

    def _check_overrun(self, ctx: BlockContext, bar: Mbarrier, slot: int, warp: int) -> None:
        """Each phase has to be seen complete before the next one is arrived on (9.7.13.15.4)."""
        if bar.phase - 1 > bar.seen_phase and not bar.waiting:
            text = f"phase {bar.phase - 1} is complete and nobody has waited for it"
            address = self._address(bar)
            report_warp(ctx, "mbarrier-overrun", text, slot, warp, address=address)
            bar.seen_phase = bar.phase - 1

    def _settle(self, ctx: BlockContext, bar: Mbarrier) -> None:
        if bar.pending == 0 and bar.transactions == 0:
            bar.phase += 1
            bar.pending = bar.expected
            if bar.knowledge is not None:
                done = bar.released
                bar.released = bar.knowledge if done is None else np.maximum(done, bar.knowledge)
                bar.knowledge = None
            bar.landed += bar.landing
            bar.landing = []
            if bar.waiting:
                bar.seen_phase = bar.phase - 1  # they see it when they run
                ctx.release(*bar.waiting)
                bar.waiting = []
        self._write(bar)

    def _write(self, bar: Mbarrier) -> None:
        bar.word = bar.pack()
        self._words[bar.slot * self._row_words + bar.offset // 8] = bar.word

    def add_pending(self, ctx: BlockContext, bar: Mbarrier, count: int) -> None:
        """``cp.async.mbarrier.arrive`` without ``.noinc`` announces its own arrival."""
        bar.pending = min(bar.pending + count, MOST_ARRIVALS)
        self._write(bar)

    # --- waiting ----------------------------------------------------------------------------------

    def passed(self, bar: Mbarrier, parity: int) -> bool:
        """Whether the phase of that parity is the one just completed."""
        return bar.phase & 1 != parity & 1

    def token_passed(
        self, ctx: BlockContext, bar: Mbarrier, token: int, slot: int, warp: int
    ) -> bool:
        """Whether the phase of a token is complete; reports tokens that are too old."""
        behind = (bar.phase - (token >> 61)) % _PHASES
        if behind > 1:
            text = f"the token is of a phase {behind} behind the current one, phase {bar.phase}"
            report_warp(ctx, "mbarrier-stale-token", text, slot, warp)
        return behind != 0

    def acquire(self, bar: Mbarrier, slot: int, members: np.ndarray, *, relaxed: bool) -> None:
        """Warps of the CTA in ``slot`` (bool ``(W,)``) have seen the last phase complete."""
        bar.seen_phase = bar.phase - 1
        areas = self.areas
        clocks = areas.clocks
        if clocks is None:
            bar.landed = []
            return
        if bar.landed:
            if bar.released is None:
                bar.released = np.zeros(clocks.columns, np.uint32)
            else:
                bar.released = bar.released.copy()
        for area, instr in bar.landed:
            row = landing_row(self.wave.num_warps, bar.number, instr)
            agent, limit = areas.finish_write(area, row, bar.slot, instr)
            assert bar.released is not None
            bar.released[agent] = limit
        bar.landed = []
        if clocks.tensor is not None:
            tensor = self.wave.shared_state["tensor-memory"].shadow
            if tensor.active:
                tensor.waited(slot, members, bar.released, bar.unfenced, relaxed=relaxed)
        if bar.released is None:
            return
        if relaxed:
            self.wave.shared_state["fences"].observe(slot, members, bar.released)
        else:
            warps = np.zeros((clocks.rows, 1), bool)
            warps[: len(members), 0] = members
            clocks.acquire((0, clocks.rows, slot, slot + 1), bar.released[None], warps)
