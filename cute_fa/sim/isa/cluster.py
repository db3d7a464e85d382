"""Cluster barriers: ``barrier.cluster`` (PTX ISA 9.7.13.3)."""

from __future__ import annotations

from collections.abc import Iterator
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
    subsystem,
)
from cute_fa.sim.isa.proxy import Fences

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.race import Clocks
    from cute_fa.sim.wave import BlockContext, Wave


@subsystem
class ClusterBarriers(Subsystem):
    """The barrier of each cluster of a wave.

    Attributes:
        phase: completed phases of each cluster.
        arrived: the phase that each thread has arrived in and not yet waited for, -1 for none.
        waiting: tickets of those who wait, by cluster.
        knowledge, released: clock snapshots ``(columns,)`` of the current and of earlier phases.
    """

    name = "cluster-barriers"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        clusters = wave.num_ctas // wave.cluster_size
        self.phase = np.zeros(clusters, np.int64)
        self.arrived = np.full((wave.num_warps, wave.num_ctas, 32), -1, np.int64)
        self.waiting: list[list[Ticket]] = [[] for _ in range(clusters)]
        self.knowledge: list[np.ndarray | None] = [None] * clusters
        self.released: list[np.ndarray | None] = [None] * clusters

    @property
    def clocks(self) -> Clocks | None:
        return self.wave.shared_state["shared-shadow"].clocks

    def slots(self, cluster: int) -> slice:
        size = self.wave.cluster_size
        return slice(cluster * size, (cluster + 1) * size)

    def missing(self, cluster: int) -> int:
        """Threads that have neither arrived in the current phase nor exited."""
        where = self.slots(cluster)
        here = self.arrived[:, where] == self.phase[cluster]
        return int(np.count_nonzero(self.wave.alive[:, where] & ~here))

    def settle(self, ctx: BlockContext, cluster: int) -> None:
        """Complete the phase if nobody is missing."""
        where = self.slots(cluster)
        if self.missing(cluster) or not (self.arrived[:, where] == self.phase[cluster]).any():
            return
        self.phase[cluster] += 1
        new, old = self.knowledge[cluster], self.released[cluster]
        if new is not None:
            self.released[cluster] = new if old is None else np.maximum(old, new)
        self.knowledge[cluster] = None
        ctx.release(*self.waiting[cluster])
        self.waiting[cluster] = []

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        """The barrier waits only for threads that have not exited."""
        if self.wave.cluster_size == 1 and not (self.arrived >= 0).any():
            return
        _, _, c0, c1 = lanes.rect
        size = self.wave.cluster_size
        for cluster in range(c0 // size, -(-c1 // size)):
            self.settle(ctx, cluster)

    def describe(self) -> list[str]:
        lines = []
        for cluster, phase in enumerate(self.phase):
            if (self.arrived[:, self.slots(cluster)] == phase).any():
                cta = ", ".join(str(int(x)) for x in self.wave.cta_ids[self.slots(cluster)][0])
                text = f"{self.missing(cluster)} threads have yet to arrive in phase {phase}"
                lines.append(f"cluster barrier of the cluster of CTA ({cta}): {text}")
        return lines


class _ClusterBarrier(Decoded):
    counter_class = "barrier"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        known = {"release", "relaxed", "acquire", "aligned"}
        if set(instr.parts[3:]) - known:
            raise self.unsupported("modifiers")
        self.collective = "aligned" in instr.parts  # type: ignore[misc]
        self.relaxed = "relaxed" in instr.parts


@effect("barrier.cluster.arrive")
class ClusterArrive(_ClusterBarrier):
    """``barrier.cluster.arrive{.release|.relaxed}{.aligned}``."""

    ends_block = True

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        unit: ClusterBarriers = ctx.subsystem(ClusterBarriers.name)
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, w1, c0, c1 = ctx.rect
        size = ctx.wave.cluster_size
        arrived = unit.arrived[w0:w1, c0:c1]
        again = active & (arrived >= 0)
        if again.any():
            text = "threads arrive twice without waiting in between"
            report_lanes(ctx, "cluster-barrier", text, again)
        phases = unit.phase[np.arange(c0, c1) // size].reshape(1, -1, 1)
        np.copyto(arrived, phases, where=active)
        for slot, new in self._knowledge(unit, ctx, active):
            known = unit.knowledge[slot // size]
            unit.knowledge[slot // size] = new if known is None else np.maximum(known, new)
        for cluster in range(c0 // size, -(-c1 // size)):
            unit.settle(ctx, cluster)

    def _knowledge(
        self, unit: ClusterBarriers, ctx: BlockContext, active: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(slot, clock snapshot) of what the arriving warps pass on."""
        w0, _, c0, c1 = ctx.rect
        clocks = unit.clocks
        if clocks is None:
            return
        if not self.relaxed:
            yield from zip(
                range(c0, c1),
                clocks.release(ctx.rect, np.asarray(active.any(axis=-1))),
                strict=True,
            )
            return
        fences: Fences = ctx.subsystem(Fences.name)
        for w, c in np.argwhere(active.any(axis=-1)):
            known = fences.snapshot(c0 + int(c), w0 + int(w))
            if known is not None:
                yield c0 + int(c), known


@blocking("barrier.cluster.wait")
class ClusterWait(_ClusterBarrier):
    """``barrier.cluster.wait{.acquire}{.aligned}``."""

    own_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.static_counts = {"barrier_waits": 1}

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        unit: ClusterBarriers = ctx.subsystem(ClusterBarriers.name)
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, w1, c0, c1 = ctx.rect
        size = ctx.wave.cluster_size
        arrived = unit.arrived[w0:w1, c0:c1]
        strangers = active & (arrived < 0)
        if strangers.any():
            text = "threads wait without having arrived"
            report_lanes(ctx, "cluster-barrier", text, strangers)
            active = active & ~strangers
        clusters = np.arange(c0, c1) // size
        complete = arrived < unit.phase[clusters].reshape(1, -1, 1)
        for cluster in range(c0 // size, -(-c1 // size)):
            held = active & ~complete & (clusters == cluster).reshape(1, -1, 1)
            if held.any():
                unit.waiting[cluster].append(
                    ctx.park(held, self._reason(unit, cluster), retry=True)
                )
        passing = active & complete
        if passing.any():
            np.copyto(arrived, -1, where=passing)
            self._acquire(unit, ctx, passing, clusters)
        return None

    @staticmethod
    def _reason(unit: ClusterBarriers, cluster: int) -> WaitReason:
        total = int(np.count_nonzero(unit.wave.alive[:, unit.slots(cluster)]))
        return WaitReason(
            "waits at the cluster barrier", total, lambda: total - unit.missing(cluster)
        )

    def _acquire(
        self, unit: ClusterBarriers, ctx: BlockContext, passing: np.ndarray, clusters: np.ndarray
    ) -> None:
        clocks = unit.clocks
        if clocks is None or self.relaxed:
            return
        _, _, c0, c1 = ctx.rect
        snapshot = np.zeros((c1 - c0, clocks.columns), np.uint32)
        for column, cluster in enumerate(clusters):
            known = unit.released[cluster]
            if known is not None:
                snapshot[column] = known
        clocks.acquire(ctx.rect, snapshot, np.asarray(passing.any(axis=-1)))
