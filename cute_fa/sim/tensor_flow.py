"""Which loads from tensor memory are over by themselves, from the program text alone.

A ``tcgen05.ld`` is asynchronous. An instruction that uses its registers waits for them all the same
(PTX ISA 9.7.16.6.4.5), so that a load whose registers have all been used has taken place. Whether
that happens before the warp does anything by which others could come to write the cells follows
from a pass over the control flow.
"""

from __future__ import annotations

from functools import lru_cache

from cute_fa import ptx

_LOST = "<overwritten>"
_ARRIVALS = ("arrive", "arrive_drop")
_HARMLESS = ("ld", "wait::ld", "wait::st", "fence::after_thread_sync", "alloc")


def _lets_others_on(instr: ptx.Instr) -> bool:
    """Whether others may know of the instruction, or whether it writes tensor memory itself."""
    parts = instr.parts
    if instr.op == "tcgen05":
        return parts[1] not in _HARMLESS
    if instr.op in ("bar", "barrier"):
        return "warp" not in parts
    if instr.op in ("mbarrier", "cp"):
        return not set(_ARRIVALS).isdisjoint(parts)
    return instr.op in ("st", "red", "atom") and not {"release", "acq_rel", "async"}.isdisjoint(
        parts
    )


def _ends(instr: ptx.Instr) -> bool:
    return instr.parts[:2] == ("tcgen05", "wait::ld")


@lru_cache(maxsize=64)
def used_loads(kernel: ptx.Kernel) -> frozenset[int]:
    """Indices of the ``tcgen05.ld`` whose registers are all used before others are let on."""
    loads = [i for i in kernel.body if i.parts[:2] == ("tcgen05", "ld")]
    if not loads:
        return frozenset()
    blocks = ptx.basic_blocks(kernel, lambda instr: False)
    home = {i: number for number, b in enumerate(blocks) for i in range(b.start, b.stop)}
    reads = [frozenset(ptx.uses(instr)) for instr in kernel.body]
    writes = [frozenset(ptx.defs(instr)) for instr in kernel.body]
    return frozenset(
        load.index
        for load in loads
        if _is_used(kernel, blocks, home[load.index], load, reads, writes)
    )


def _is_used(
    kernel: ptx.Kernel,
    blocks: ptx.Blocks,
    home: int,
    load: ptx.Instr,
    reads: list[frozenset[str]],
    writes: list[frozenset[str]],
) -> bool:
    def walk(start: int, stop: int, left: frozenset[str]) -> frozenset[str] | None:
        """Registers still unused behind a stretch of instructions; None: others were let on."""
        for instr in kernel.body[start:stop]:
            left -= reads[instr.index]
            if not left or _ends(instr):
                return frozenset()
            if left & writes[instr.index]:  # what is overwritten is not used any more
                left = left - writes[instr.index] | {_LOST}
            if _lets_others_on(instr):
                return None
        return left

    unused = walk(load.index + 1, blocks[home].stop, frozenset(ptx.defs(load)))
    if unused is None:
        return False
    entered: dict[int, frozenset[str]] = {}
    pending = [(successor, unused) for successor in blocks[home].successors]
    while pending:
        number, left = pending.pop()
        known = entered.get(number, frozenset())
        if left <= known:
            continue
        entered[number] = known | left
        block = blocks[number]
        behind = walk(block.start, block.stop, entered[number])
        if behind is None:
            return False
        pending += [(successor, behind) for successor in block.successors]
    return True
