"""Instructions of PTX that machine code does not have, because another instruction does their work.

Two of the patterns matter on these kernels' critical paths, and both can be seen in ptxas's output
(cuobjdump -sass): a tensor-core or copy instruction that one elected thread of a warp issues is
executed once per warp anyway, without the election, and a shift before an addition is one LEA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cute_fa.ptx import uses
from cute_fa.sim.program import Program
from cute_fa.sim.timeline.costs import Cost

_ONCE_PER_WARP = frozenset(("tcgen05_mma", "tcgen05_commit", "tensor_copy"))
_ADDRESSES = frozenset(("add", "mov", "cvta", "shl", "or", "and"))


def reads_of(program: Program) -> Counter[str]:
    """How many instructions of a kernel read each register."""
    return Counter(name for instr in program.kernel.body for name in uses(instr))


def fused(program: Program, block: int, costs: Sequence[Cost], reads: Counter[str]) -> list[Cost]:
    """The costs of a block; what machine code does not have takes no slot, unit or time.

    Args:
        reads: ``reads_of`` the program.
    """
    vanishing = _shifts(costs, reads)
    if _elects_once_per_warp(program, block):
        vanishing |= _election(costs)
    return [
        replace(cost, unit="", cycles=0.0, latency=0.0, issues=False) if i in vanishing else cost
        for i, cost in enumerate(costs)
    ]


def _elects_once_per_warp(program: Program, block: int) -> bool:
    """Whether the block ends by skipping nothing but instructions that are executed once per warp,
    and the addresses that they need."""
    last = program.blocks[block]
    if last.target < 0 or last.next < 0:
        return False
    guarded = program.body_of(last.next)
    classes = [program.counter_class(instr) for instr in guarded]
    return any(name in _ONCE_PER_WARP for name in classes) and all(
        name in _ONCE_PER_WARP or instr.op in _ADDRESSES
        for instr, name in zip(guarded, classes, strict=True)
    )


def _election(costs: Sequence[Cost]) -> set[int]:
    """From the branch at the end back to the elect.sync that its predicate comes from."""
    found = {len(costs) - 1}
    wanted = set(costs[-1].reads)
    for i in reversed(range(len(costs) - 1)):
        if wanted & set(costs[i].writes):
            found.add(i)
            wanted |= set(costs[i].reads)
            if costs[i].instr.op == "elect":
                return found
    return set()


def _shifts(costs: Sequence[Cost], reads: Counter[str]) -> set[int]:
    """shl.b32 by a constant whose only reader is an addition, one for each."""
    shifts = {
        cost.writes[0]: i
        for i, cost in enumerate(costs)
        if cost.instr.opcode == "shl.b32" and len(cost.reads) == 1 and reads[cost.writes[0]] == 1
    }
    found = set()
    for cost in costs:
        if cost.instr.opcode in ("add.s32", "add.u32"):
            found.update([shifts[name] for name in cost.reads if name in shifts][:1])
    return found
