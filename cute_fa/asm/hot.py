"""The loops of a kernel with what is in them, for SASS and for PTX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cute_fa.asm.loops import Loop, natural_loops, own_blocks
from cute_fa.asm.mix import ptx_class, ptx_mix, sass_class, sass_mix
from cute_fa.asm.sass import SassInstr, SassKernel
from cute_fa.ptx import Blocks, Instr, Kernel, basic_blocks

# A loop of nothing else that polls a barrier, a flag or an allocator waits; it does no work.
_WAITING = frozenset({"sync", "branch", "move", "int", "uniform", "warp", "constant"})
_MAX_WAIT_LOOP = 16
_SASS_POLLS = ("SYNCS.PHASECHK", "NANOSLEEP", "UTCATOMSWS", "USETMAXREG.TRY_ALLOC")
_PTX_POLLS = ("try_wait", "test_wait", "acquire", "volatile")
# What attention kernels are about: the loop that holds most of it is the hot one.
_WORK = ("tensor", "mufu")
# How often a loop is taken to run for each run of the loop around it: without that, the
# iterations that compilers peel off a main loop would outweigh the loop itself.
_TRIPS = 4

_I = TypeVar("_I", SassInstr, Instr)


@dataclass(frozen=True)
class LoopSummary:
    """One loop that does work.

    Attributes:
        where: of its header: an address in SASS, a line in PTX.
        depth: 1 for an outermost loop.
        instructions: all of them, those of loops inside among them.
        mix: instructions by class, likewise.
        own_mix: without the loops inside that do work themselves.
        folded_waits: loops inside that only wait for a barrier.
        is_hot: whether its own tensor and MUFU instructions weigh more than any other loop's,
            a level of nesting counting fourfold (its own instructions, where there are none).
    """

    where: str
    depth: int
    instructions: int
    mix: dict[str, int]
    own_mix: dict[str, int]
    folded_waits: int
    is_hot: bool

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def sass_loops(kernel: SassKernel) -> list[LoopSummary]:
    """The loops of machine code that do work, outer before inner."""
    return [summary for _, summary in _summarised_sass(kernel)]


def hot_code(kernel: SassKernel) -> list[SassInstr]:
    """The instructions of the hot loop's whole body; empty if the kernel has no loop."""
    for loop, summary in _summarised_sass(kernel):
        if summary.is_hot:
            return loop_code(kernel.instructions, kernel.blocks, loop.blocks)
    return []


def _summarised_sass(kernel: SassKernel) -> list[tuple[Loop, LoopSummary]]:
    return _summarised(
        kernel.instructions,
        kernel.blocks,
        classify=sass_class,
        count=sass_mix,
        polls=lambda instr: instr.opcode.startswith(_SASS_POLLS) or ".STRONG" in instr.opcode,
        where=lambda instr: f"{instr.address:#06x}",
    )


def ptx_loops(kernel: Kernel) -> list[LoopSummary]:
    """The loops of PTX that do work, outer before inner."""
    found = _summarised(
        kernel.body,
        basic_blocks(kernel),
        classify=ptx_class,
        count=ptx_mix,
        polls=lambda instr: any(word in instr.parts for word in _PTX_POLLS),
        where=lambda instr: f"line {instr.line}",
    )
    return [summary for _, summary in found]


def loop_code(code: Sequence[_I], blocks: Blocks, members: frozenset[int]) -> list[_I]:
    """The instructions of some blocks, in order."""
    return [instr for b in sorted(members) for instr in code[blocks[b].start : blocks[b].stop]]


def _summarised(
    code: Sequence[_I],
    blocks: Blocks,
    *,
    classify: Callable[[_I], str],
    count: Callable[[list[_I]], dict[str, int]],
    polls: Callable[[_I], bool],
    where: Callable[[_I], str],
) -> list[tuple[Loop, LoopSummary]]:
    """The loops that do work."""
    loops = natural_loops(blocks)
    bodies = [loop_code(code, blocks, loop.blocks) for loop in loops]
    waits = frozenset(
        index
        for index, body in enumerate(bodies)
        if len(body) <= _MAX_WAIT_LOOP
        and any(polls(instr) for instr in body)
        and all(polls(instr) or instr.op == "NOP" or classify(instr) in _WAITING for instr in body)
    )
    working = [index for index in range(len(loops)) if index not in waits]
    own = {
        index: count(loop_code(code, blocks, own_blocks(loops, index, waits))) for index in working
    }

    def weight(index: int) -> tuple[int, int]:
        trips = _TRIPS ** loops[index].depth
        work = sum(own[index].get(name, 0) for name in _WORK)
        return work * trips, sum(own[index].values()) * trips

    hot = max(working, key=weight, default=None)
    summarised = []
    for index in working:
        loop, mix = loops[index], count(bodies[index])
        summary = LoopSummary(
            where=where(code[blocks[loop.header].start]),
            depth=loop.depth,
            instructions=sum(mix.values()),
            mix=mix,
            own_mix=own[index],
            folded_waits=sum(loops[wait].blocks < loop.blocks for wait in waits),
            is_hot=index == hot,
        )
        summarised.append((loop, summary))
    return summarised
