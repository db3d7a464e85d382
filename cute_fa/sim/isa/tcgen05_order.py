"""``tcgen05.wait`` and ``tcgen05.fence`` (PTX ISA 9.7.16.8.5, 9.7.16.11.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.tensor_memory import TensorMemory, check_whole_warps

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext


@effect("tcgen05.wait::ld", "tcgen05.wait::st")
class Wait(Decoded):
    """``tcgen05.wait::ld.sync.aligned`` and ``wait::st``: the warp's loads or stores are done.

    Registers have their values as soon as they are loaded: an instruction that uses them waits for
    them by itself (9.7.16.6.4.5). The wait is about the order of accesses to tensor memory.
    """

    counter_class = "tmem_wait"
    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.stores = instr.parts[1] == "wait::st"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        check_whole_warps(ctx, mask)
        if not memory.stores and not memory.shadow.active:
            return
        active = np.asarray((ctx.lanes.dense_mask() if mask is None else mask).any(axis=-1))
        if self.stores:
            memory.land(active, ctx.rect)
        if memory.shadow.active:
            memory.shadow.wait(ctx, active, stores=self.stores)


@effect("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
class Fence(Decoded):
    """``tcgen05.fence::before_thread_sync`` and ``after_thread_sync``.

    Release and acquire order accesses to tensor memory like all others (9.7.16.6.3); the fences do
    it for what is synchronised by relaxed operations.
    """

    counter_class = "fence"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.before = "before" in instr.parts[1]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        shadow = ctx.subsystem(TensorMemory.name).shadow
        if not shadow.active:
            return
        active = np.asarray((ctx.lanes.dense_mask() if mask is None else mask).any(axis=-1))
        if self.before:
            shadow.fence_before(ctx, active)
        else:
            shadow.fence_after(ctx, active)
