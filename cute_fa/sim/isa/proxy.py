"""Fences between proxies (PTX ISA 9.7.13.4, ``membar`` and ``fence``).

Threads access memory through the generic proxy, bulk copies and wgmma through the async proxy. What
a thread wrote must be behind a ``fence.proxy.async`` before the async proxy accesses it: by the
writer, or by anybody after it on the way to the access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.async_shadow import AsyncShadow
from cute_fa.sim.isa import Decoded, Mask, Subsystem, effect, subsystem
from cute_fa.sim.mbarriers import Mbarriers
from cute_fa.sim.tensor_memory import TensorMemory

if TYPE_CHECKING:
    from cute_fa.sim.tensor_shadow import TensorShadow
    from cute_fa.sim.wave import BlockContext, Wave


@subsystem
class ReleaseFences(Subsystem):
    """What each warp knew at its last fence: what its relaxed arrivals pass on.

    A fence followed by a relaxed arrival is a release (PTX ISA 8.8, release patterns); behind a
    ``tcgen05.fence::before_thread_sync`` it is one for tensor memory.
    """

    name = "release-fences"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.known: np.ndarray | None = None

    def note(self, ctx: BlockContext, mask: Mask) -> None:
        """The active warps execute a fence."""
        clocks = self.wave.shared_state["shared-shadow"].clocks
        if clocks is None:
            return
        if self.known is None:
            shape = self.wave.num_warps, self.wave.num_ctas, clocks.columns
            self.known = np.zeros(shape, np.uint32)
        w0, _, c0, c1 = ctx.rect
        active = ctx.lanes.dense_mask() if mask is None else mask
        for w in np.flatnonzero(active.any(axis=(1, 2))):
            warp = w0 + int(w)
            snapshot = clocks.release((warp, warp + 1, c0, c1))
            where = active[w].any(axis=-1)[:, None]
            np.copyto(self.known[warp, c0:c1], snapshot, where=where)

    def snapshot(self, slot: int, warp: int) -> np.ndarray | None:
        """What a relaxed arrival of a warp passes on, ``(columns,)``, or None."""
        known = None if self.known is None else self.known[warp, slot]
        tensor: TensorShadow = self.wave.shared_state[TensorMemory.name].shadow
        return tensor.relaxed_arrival(slot, warp, known) if tensor.active else known


@effect("membar", "fence")
class Fence(Decoded):
    """Fences that nothing asks for: memory effects are visible in program order anyway."""

    counter_class = "fence"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        return None


@effect("fence.mbarrier_init", "fence.acq_rel", "fence.sc", "membar.cta", "membar.gl", "membar.sys")
class MemoryFence(Decoded):
    """``fence.sem.scope``, ``membar.level`` and ``fence.mbarrier_init.release.cluster``.

    The last one speaks for initialisations of mbarriers only; here it counts as a full fence.
    """

    counter_class = "fence"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        if self.instr.parts[1] == "mbarrier_init":
            active = ctx.lanes.dense_mask() if mask is None else mask
            ctx.subsystem(Mbarriers.name).fence(ctx.rect, active.any(axis=-1))
        ctx.subsystem(ReleaseFences.name).note(ctx, mask)


@effect("fence.proxy.async")
class ProxyFence(Decoded):
    """``fence.proxy.async{.global|.shared::cta|.shared::cluster}``.

    Only shared memory is tracked; a fence of the global space alone has no effect on it.
    """

    counter_class = "fence"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        spaces = instr.parts[3:]
        self.shared = not spaces or spaces[0].startswith("shared")
        if any(not part.startswith("shared") and part != "global" for part in spaces):
            raise self.unsupported(f"modifier .{'.'.join(spaces)}")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        clocks = ctx.subsystem(AsyncShadow.name).clocks
        active = ctx.lanes.dense_mask() if mask is None else mask
        if self.shared:
            ctx.subsystem(Mbarriers.name).fence(ctx.rect, active.any(axis=-1))
        if clocks is None or not self.shared or clocks.fenced is None:
            return
        clocks.fence(ctx.rect, active.any(axis=-1))


@effect("fence.proxy.alias")
class AliasFence(Decoded):
    """``fence.proxy.alias``: one address never has two names here."""

    counter_class = "fence"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        return None
