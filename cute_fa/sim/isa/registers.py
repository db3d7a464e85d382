"""``setmaxnreg``: moving registers between the warps of a CTA (PTX ISA 9.7.19.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.engines import WARPGROUP
from cute_fa.sim.isa import Decoded, Mask, Subsystem, Ticket, WaitReason, blocking, subsystem

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

REGISTER_FILE = 65536
"""32-bit registers of one SM."""

MOST_PER_THREAD = 255


def launch_registers(kernel: ptx.Kernel, threads: int) -> int:
    """Registers per thread with which a kernel that uses setmaxnreg starts.

    ``ptxas`` gives such a kernel all that its residency allows: ``.maxnreg``, or the register file
    over threads and ``.minnctapersm``, in units of 8.
    """
    if kernel.maxnreg:
        return kernel.maxnreg
    ctas = kernel.minnctapersm or 1
    return min(REGISTER_FILE // (threads * ctas) // 8 * 8, MOST_PER_THREAD // 8 * 8)


@subsystem
class RegisterPool(Subsystem):
    """Registers per thread of each warp, ``(W, R)``, and those who wait for more."""

    name = "register-pool"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        warps = wave.num_warps
        start = launch_registers(wave.kernel, warps * 32)
        self.held = np.full((warps, wave.num_ctas), start)
        self.total = start * warps
        self.waiting: list[list[Ticket]] = [[] for _ in range(wave.num_ctas)]
        self.released: ptx.Instr | None = None  # by this setmaxnreg.dec
        self.taken = False

    def free(self, slot: int) -> int:
        """Registers per lane that no warp of the CTA holds."""
        return self.total - int(self.held[:, slot].sum())

    def wake(self, ctx: BlockContext, slot: int) -> None:
        ctx.release(*self.waiting[slot])
        self.waiting[slot] = []

    def on_wave_end(self, wave: Wave) -> None:
        """Warps of one warpgroup have to agree; what is released should be for somebody."""
        if self.released is not None and not self.taken:
            text = "setmaxnreg.dec releases registers and no warp executes setmaxnreg.inc"
            self._report_at_end("register-balance", text, 0, 0)
        for first in range(0, wave.num_warps, WARPGROUP):
            held = self.held[first : first + WARPGROUP]
            uneven = np.flatnonzero((held != held[0]).any(axis=0))
            if uneven.size:
                counts = held[:, uneven[0]].tolist()
                text = f"the warps of a warpgroup end with {counts} registers per thread"
                self._report_at_end("register-budget", text, int(uneven[0]), first)

    def _report_at_end(self, rule: str, text: str, slot: int, warp: int) -> None:
        hazards.report(self.wave, rule, text, self.released, slot, warp=warp)

    def describe(self) -> list[str]:
        return [
            f"registers of CTA {tuple(int(x) for x in self.wave.cta_ids[slot])}: "
            f"{self.held[:, slot].tolist()} per thread of each warp, {self.free(slot)} free"
            for slot, waiting in enumerate(self.waiting)
            if waiting
        ]


@blocking("setmaxnreg.inc", "setmaxnreg.dec")
class SetMaxNReg(Decoded):
    """``setmaxnreg.inc|dec.sync.aligned.u32 count``: ``inc`` waits until the CTA has them."""

    counter_class = "control"
    collective = True
    own_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.count = self.literal(instr.operands[0], "a register count")
        self.grows = instr.parts[1] == "inc"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        pool: RegisterPool = ctx.subsystem(RegisterPool.name)
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, _, c0, _ = ctx.rect
        for c in np.flatnonzero(active.any(axis=(0, 2))):
            warps = [w0 + int(w) for w in np.flatnonzero(active[:, c].any(axis=-1))]
            self._change(ctx, pool, active, c0 + int(c), warps)
        return None

    def _change(
        self,
        ctx: BlockContext,
        pool: RegisterPool,
        active: np.ndarray,
        slot: int,
        warps: list[int],
    ) -> None:
        count = self.count
        if not 24 <= count <= 256 or count % 8:
            text = f"{count} registers, not a multiple of 8 from 24 to 256"
            report_warp(ctx, "register-budget", text, slot, warps[0])
            return
        w0, _, c0, _ = ctx.rect
        for group in sorted({warp // WARPGROUP for warp in warps}):
            members = [warp for warp in warps if warp // WARPGROUP == group]
            for warp in members:
                held = int(pool.held[warp, slot])
                if (count < held) if self.grows else (count > held):
                    way = "inc" if self.grows else "dec"
                    text = f"setmaxnreg.{way} to {count} from {held} registers"
                    report_warp(ctx, "register-budget", text, slot, warp)
            needed = sum(count - int(pool.held[warp, slot]) for warp in members)
            if needed <= pool.free(slot):
                if self.grows:
                    pool.taken = True
                else:
                    pool.released = self.instr
                pool.held[members, slot] = count
                if needed < 0:
                    pool.wake(ctx, slot)
                continue
            held_back = np.zeros(active.shape, bool)
            for warp in members:
                held_back[warp - w0, slot - c0] = active[warp - w0, slot - c0]
            reason = WaitReason(f"waits for {needed} registers per lane")
            pool.waiting[slot].append(ctx.park(held_back, reason, retry=True))
