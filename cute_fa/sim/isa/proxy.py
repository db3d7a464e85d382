"""Fences of memory and between proxies (PTX ISA 9.7.13.4, ``membar`` and ``fence``).

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
    from cute_fa.sim.race import Clocks
    from cute_fa.sim.tensor_shadow import TensorShadow
    from cute_fa.sim.wave import BlockContext, Wave


@subsystem
class Fences(Subsystem):
    """What fences make of relaxed synchronisation (PTX ISA 8.8, release and acquire patterns).

    A fence followed by a relaxed arrival is a release: of what the warp knew at its last fence. A
    relaxed wait followed by a fence is an acquire. Behind a ``tcgen05.fence::before_thread_sync`` a
    relaxed arrival is a release for tensor memory.

    Attributes:
        known: what each warp knew at its last fence, ``(warps, CTAs, columns)``; None before any.
        observed: what its relaxed waits have seen, shaped alike; None before any.
    """

    name = "fences"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.known: np.ndarray | None = None
        self.observed: np.ndarray | None = None

    @property
    def clocks(self) -> Clocks | None:
        return self.wave.shared_state["shared-shadow"].clocks

    def _blank(self, clocks: Clocks) -> np.ndarray:
        return np.zeros((self.wave.num_warps, self.wave.num_ctas, clocks.columns), np.uint32)

    def release(self, ctx: BlockContext, active: np.ndarray) -> None:
        """Warps (bool ``(w, c)`` over ``ctx.rect``) execute a fence that can release."""
        clocks = self.clocks
        if clocks is None:
            return
        if self.known is None:
            self.known = self._blank(clocks)
        w0, _, c0, c1 = ctx.rect
        for w in np.flatnonzero(active.any(axis=1)):
            warp = w0 + int(w)
            snapshot = clocks.release((warp, warp + 1, c0, c1))
            np.copyto(self.known[warp, c0:c1], snapshot, where=active[w][:, None])

    def acquire(self, ctx: BlockContext, active: np.ndarray) -> None:
        """Warps execute a fence that can acquire."""
        clocks = self.clocks
        if clocks is None or self.observed is None:
            return
        w0, _, c0, c1 = ctx.rect
        for w in np.flatnonzero(active.any(axis=1)):
            warp = w0 + int(w)
            rect = warp, warp + 1, c0, c1
            clocks.acquire(rect, self.observed[warp, c0:c1], active[w : w + 1])

    def observe(self, slot: int, members: np.ndarray, released: np.ndarray) -> None:
        """Warps of a CTA (bool ``(W,)``) have seen, relaxed, what somebody released."""
        clocks = self.clocks
        assert clocks is not None
        if self.observed is None:
            self.observed = self._blank(clocks)
        self.observed[members, slot] = np.maximum(self.observed[members, slot], released)

    def snapshot(self, slot: int, warp: int) -> np.ndarray | None:
        """What a relaxed arrival of a warp passes on, ``(columns,)``, or None."""
        known = None if self.known is None else self.known[warp, slot]
        tensor: TensorShadow = self.wave.shared_state[TensorMemory.name].shadow
        return tensor.relaxed_arrival(slot, warp, known) if tensor.active else known


_SCOPES = frozenset(("cta", "cluster", "gpu", "sys", "gl"))
_RESTRICTIONS = {
    "acquire": "sync_restrict::shared::cluster",
    "release": "sync_restrict::shared::cta",
}


@effect("membar", "fence")
class MemoryFence(Decoded):
    """``fence{.sem}.scope``, ``membar.level`` and ``fence.mbarrier_init.release.cluster``.

    ``fence.acquire`` and ``fence.release`` may be restricted to shared memory, the only one that is
    tracked. The last form speaks for initialisations of mbarriers only; here it counts as a full
    release. Effects on memory are visible in program order whatever the fence.
    """

    counter_class = "fence"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        words = instr.parts[1:]
        self.initialises = words == ("mbarrier_init", "release", "cluster")
        order = "acq_rel" if len(words) == 1 else words[0]
        restricted = words[1:] == (_RESTRICTIONS.get(order), "cluster")
        scoped = words[-1:] != () and words[-1] in _SCOPES and len(words) <= 2
        known = order in ("acq_rel", "sc", "acquire", "release") and (scoped or restricted)
        if not known and not self.initialises:
            raise self.unsupported("kind of fence")
        self.acquires = not self.initialises and order != "release"
        self.releases = order != "acquire"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = np.asarray((ctx.lanes.dense_mask() if mask is None else mask).any(axis=-1))
        unit: Fences = ctx.subsystem(Fences.name)
        if self.initialises:
            ctx.subsystem(Mbarriers.name).fence(ctx.rect, active)
        if self.acquires:
            unit.acquire(ctx, active)
        if self.releases:
            unit.release(ctx, active)


@effect("fence.proxy", "membar.proxy")
class ProxyFence(Decoded):
    """``fence.proxy.async{.global|.shared::cta|.shared::cluster}`` and ``fence.proxy.alias``.

    Only shared memory is tracked; a fence of the global space alone has no effect on it, and one
    address never has two names. ``fence.proxy.async::generic.acquire.sync_restrict…`` is half of a
    pair: what is ordered before it is good for the async proxy if a ``.release`` one is behind it,
    which is not asked.
    """

    counter_class = "fence"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        kind, words = instr.parts[2], instr.parts[3:]
        if kind == "async::generic":
            order = words[0] if words else ""
            known = words[1:] == (_RESTRICTIONS.get(order), "cluster")
            self.fences = order == "acquire"
        elif kind == "async":
            known = words in ((), ("global",), ("shared::cta",), ("shared::cluster",))
            self.fences = words != ("global",)
        else:
            known = kind == "alias" and not words
            self.fences = False
        if not known:
            raise self.unsupported("kind of proxy fence")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        if not self.fences:
            return
        active = np.asarray((ctx.lanes.dense_mask() if mask is None else mask).any(axis=-1))
        ctx.subsystem(Mbarriers.name).fence(ctx.rect, active)
        clocks = ctx.subsystem(AsyncShadow.name).clocks
        if clocks is not None and clocks.fenced is not None:
            clocks.fence(ctx.rect, active, clocks.fenced)
