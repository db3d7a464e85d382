"""How long a CTA's shared memory is there for the others of its cluster: until its threads exit.

An access from another CTA has to come before that (PTX ISA, "cluster of cooperative thread
arrays": the target CTA must not have exited). Whether it did by chance depends on the schedule; so
it is also asked, when a CTA exits, whether something orders the accesses before: a clock that one
of its warps has seen, or, for an arrival at one of its mbarriers, that the phase was waited for.
That a later relaxed arrival was seen is neither: it orders nothing that came before it (9.7.13.15).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.isa import Subsystem, subsystem

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.mbarriers import Mbarrier
    from cute_fa.sim.race import Clocks
    from cute_fa.sim.wave import BlockContext, Wave


class Visit(NamedTuple):
    """The last access by one warp and one instruction to another CTA's shared memory.

    ``phase`` is the one that an arrival at ``bar`` was counted in.
    """

    instr: Instr
    slot: int
    warp: int
    address: int
    stamp: int
    bar: Mbarrier | None
    phase: int


@subsystem
class Lifetimes(Subsystem):
    """The accesses that each CTA of a wave has to outlive."""

    name = "lifetimes"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.visits: dict[int, dict[tuple[int, int, int], Visit]] = {}
        self._follows = False

    @property
    def clocks(self) -> Clocks | None:
        return self.wave.shared_state["shared-shadow"].clocks

    def visit(
        self,
        ctx: BlockContext,
        target: int,
        slot: int,
        warp: int,
        address: int,
        bar: Mbarrier | None = None,
    ) -> None:
        """A warp of the CTA in ``slot`` accesses the shared memory of the one in ``target``."""
        clocks = self.clocks
        if clocks is None:
            return
        if not self._follows:  # what was noted means nothing once the clocks start afresh
            self.wave.shared_state["shared-shadow"].followers.append(self.visits.clear)
            self._follows = True
        stamp = int(clocks.access(ctx.instr.index))
        phase = -1 if bar is None else bar.phase
        key = slot, warp, ctx.instr.index
        made = Visit(ctx.instr, slot, warp, address, stamp, bar, phase)
        self.visits.setdefault(target, {})[key] = made

    def visit_lanes(
        self, ctx: BlockContext, slots: np.ndarray, foreign: np.ndarray, addresses: np.ndarray
    ) -> None:
        """The same for lanes: ``slots`` are their targets, ``foreign`` those of another CTA."""
        w0, _, c0, _ = ctx.rect
        for w, c in np.argwhere(foreign.any(axis=-1)):
            lanes = foreign[w, c]
            for target in np.unique(slots[w, c][lanes]):
                address = int(addresses[w, c][lanes & (slots[w, c] == target)][0])
                self.visit(ctx, int(target), c0 + int(c), w0 + int(w), address)

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        _, _, c0, c1 = lanes.rect
        for target in [slot for slot in self.visits if c0 <= slot < c1]:
            if not self.wave.alive[:, target].any():
                for made in self.visits.pop(target).values():
                    self._judge(ctx, target, made)

    def _judge(self, ctx: BlockContext, target: int, made: Visit) -> None:
        clocks = self.clocks
        assert clocks is not None
        agent = int(clocks.agent[made.warp, made.slot])
        known = int(clocks.seen[: self.wave.num_warps, target, agent].max())
        is_seen = made.bar is not None and made.bar.seen_phase >= made.phase
        if made.stamp >= known and not is_seen:
            cta = ", ".join(map(str, ctx.cta_of(target)))
            text = f"nothing keeps CTA ({cta}) from exiting before this access to its shared memory"
            report_warp(
                ctx,
                "exited-cta-access",
                text,
                made.slot,
                made.warp,
                address=made.address,
                instr=made.instr,
            )
