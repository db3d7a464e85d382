"""Tensor maps that a kernel changes: whether each tensor copy may know of the change.

A map in global memory is written through the generic proxy and read by tensor copies through the
tensor map proxy. Between the two has to be (PTX ISA 9.7.13.4): a release by
``fence.proxy.tensormap::generic.release``, or as part of ``tensormap.cp_fenceproxy``, behind the
change; and ``fence.proxy.tensormap::generic.acquire`` of the map's address, ordered behind that
release and before the copy. Who executes them does not matter, what orders them does.

Changes are those by ``tensormap`` instructions of the same cluster and launch: clocks say nothing
about other clusters, and a map that ordinary stores write is not recognised as one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cute_fa.ptx import Instr, Kernel
from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.isa import Subsystem, subsystem

if TYPE_CHECKING:
    from cute_fa.sim.race import Clocks
    from cute_fa.sim.wave import BlockContext, Wave

RULE = "missing-tensormap-fence"


@lru_cache(maxsize=64)
def changes_maps(kernel: Kernel) -> bool:
    """Whether a kernel has instructions that change tensor maps."""
    return any(instr.op == "tensormap" for instr in kernel.body)


class Change(NamedTuple):
    """The last change, or use, of a map by one warp; ``released``: with the release it needs."""

    instr: Instr
    slot: int
    warp: int
    stamp: int
    released: bool = False


class Acquisition(NamedTuple):
    """A warp's acquire of a map; ``covers``: the (slot, warp) whose changes are ordered before."""

    agent: int
    cluster: int
    stamp: int
    covers: frozenset[tuple[int, int]]


@subsystem
class TensorMapChanges(Subsystem):
    """The maps that the CTAs of one wave have changed, by address."""

    name = "tensor-map-changes"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.changes: dict[int, dict[tuple[int, int], Change]] = {}
        self.uses: dict[int, dict[tuple[int, int], Change]] = {}
        self.acquisitions: dict[int, list[Acquisition]] = {}
        self._follows = False

    @property
    def clocks(self) -> Clocks | None:
        """The wave's clocks if they say anything about tensor maps."""
        clocks = self.wave.shared_state["shared-shadow"].clocks
        return None if clocks is None or clocks.maps is None else clocks

    def _forget(self) -> None:
        self.changes.clear()
        self.uses.clear()
        self.acquisitions.clear()

    def change(
        self, ctx: BlockContext, slot: int, warp: int, address: int, *, released: bool
    ) -> None:
        """A warp changes the map at an address of global memory."""
        clocks = self.clocks
        if clocks is None:
            return
        seen = clocks.seen[warp, slot]
        for copy in self.uses.get(address, {}).values():
            if self._related(copy.slot, slot) and not self._is_ordered(seen, copy):
                site = hazards.site(self.wave, copy.instr, "copy", copy.warp, copy.slot)
                text = "nothing orders a copy that reads a tensor map before the map's change"
                report_warp(ctx, RULE, text, slot, warp, address=address, other=site)
        made = Change(ctx.instr, slot, warp, self._stamp(ctx, clocks), released)
        self.changes.setdefault(address, {})[slot, warp] = made
        self.acquisitions.pop(address, None)

    def _stamp(self, ctx: BlockContext, clocks: Clocks) -> int:
        if not self._follows:  # what was noted means nothing once the clocks start afresh
            self.wave.shared_state["shared-shadow"].followers.append(self._forget)
            self._follows = True
        return int(clocks.access(ctx.instr.index))

    def release(self, ctx: BlockContext, active: np.ndarray) -> None:
        """Warps (bool ``(w, c)`` over ``ctx.rect``) execute the fence that releases."""
        clocks = self.clocks
        if clocks is not None:
            assert clocks.maps is not None
            clocks.fence(ctx.rect, active, clocks.maps)

    def acquire(self, ctx: BlockContext, slot: int, warp: int, address: int) -> None:
        """A warp executes the fence that acquires the map at an address."""
        clocks = self.clocks
        if clocks is None or address not in self.changes:
            return
        seen = clocks.seen[warp, slot]
        assert clocks.maps is not None
        covers = frozenset(
            key
            for key, change in self.changes[address].items()
            if self._related(change.slot, slot)
            and self._is_ordered(seen, change, behind_fence=not change.released)
        )
        agent = int(clocks.agent[warp, slot])
        known = self.acquisitions.setdefault(address, [])
        cluster = slot // self.wave.cluster_size
        if any(
            old.agent == agent and old.cluster == cluster and old.covers >= covers for old in known
        ):
            return
        stamp = int(clocks.access(ctx.instr.index))
        known.append(Acquisition(agent, cluster, stamp, covers))

    def use(self, ctx: BlockContext, slot: int, warp: int, address: int) -> None:
        """A tensor copy by a warp reads the map at an address."""
        clocks = self.clocks
        if clocks is None:
            return
        made = Change(ctx.instr, slot, warp, self._stamp(ctx, clocks))
        self.uses.setdefault(address, {})[slot, warp] = made
        if address not in self.changes:
            return
        seen = clocks.seen[warp, slot]
        cluster = slot // self.wave.cluster_size
        covered = frozenset[tuple[int, int]]().union(
            *(
                known.covers
                for known in self.acquisitions.get(address, ())
                if known.cluster == cluster and known.stamp < int(seen[known.agent])
            )
        )
        for key, change in self.changes[address].items():
            if key in covered or not self._related(change.slot, slot):
                continue
            site = hazards.site(self.wave, change.instr, "change", change.warp, change.slot)
            text = self._reason(seen, change)
            report_warp(ctx, RULE, text, slot, warp, address=address, other=site)

    def _reason(self, seen: np.ndarray, change: Change) -> str:
        if not self._is_ordered(seen, change):
            return "nothing orders the change of a tensor map before a copy that reads it"
        is_released = change.released or self._is_ordered(seen, change, behind_fence=True)
        missing = "acquire of the map" if is_released else "release"
        return f"no fence.proxy.tensormap::generic.{missing} between a map's change and its use"

    def _related(self, one: int, other: int) -> bool:
        size = self.wave.cluster_size
        return one // size == other // size

    def _is_ordered(self, seen: np.ndarray, made: Change, *, behind_fence: bool = False) -> bool:
        """Whether it comes before what an agent that has ``seen`` so much does next."""
        clocks = self.clocks
        assert clocks is not None and clocks.maps is not None
        columns = seen[clocks.maps] if behind_fence else seen
        return made.stamp < int(columns[int(clocks.agent[made.warp, made.slot])])
