"""Control flow, hints and traps: PTX ISA section 9.7.12 and the miscellaneous ones of 9.7.19.

Branches, ``ret`` and ``exit`` have no handlers: the code generator turns them into the ends of
basic blocks (``codegen.TERMINATORS``). A trap stops its threads and is always an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Decoded, Mask, effect, pure

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext


@pure(
    "pragma",
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "pmevent",
    "createpolicy",
    "griddepcontrol.launch_dependents",
    "griddepcontrol.wait",
    counter_class="hint",
)
def emit_hint(e: Any) -> None:
    """Cache, profiling and grid-dependency hints: no effect on results.

    ``createpolicy`` writes an opaque cache policy (9.7.9.18): any value will do, it is 0 here.
    Grids run one after another, so ``griddepcontrol`` has nothing to wait for (9.7.13.13).
    """
    if e.parts[0] == "createpolicy":
        e.dst(e.constant(0, "u8"), "u8")


@effect("nanosleep")
class Nanosleep(Decoded):
    """``nanosleep.u32 t``: lets the other warps run first (9.7.19.2)."""

    counter_class = "hint"
    ends_block = True
    progress = False

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        ctx.yield_(mask)


@effect("activemask")
class ActiveMask(Decoded):
    """``activemask.b32 d``: the lanes of the warp that execute it together (9.7.13.11)."""

    counter_class = "warp"
    progress = False

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        target = instr.operands[0]
        if not isinstance(target, ptx.Reg):
            raise self.unsupported("destination is not a register")
        self.dests = (target.name,)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        active = ctx.lanes.dense_mask() if mask is None else mask
        weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return (np.where(active, weights, np.uint32(0)).sum(axis=2, keepdims=True, dtype="u4"),)


@effect("trap", "brkpt")
class Trap(Decoded):
    """``trap``, ``brkpt``: the program gave up, a failed assertion for one (9.7.19.4, .1)."""

    counter_class = "control"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        lanes = ctx.lanes.dense_mask() if mask is None else mask
        report_lanes(ctx, "trap", f"the program executed {self.instr.opcode}", lanes)
