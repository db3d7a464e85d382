"""What can be said about the lanes of a warp from the program text alone.

The race checks know warps, not lanes. One mistake hides below that: lanes access memory, and then
one lane alone signals for all of them that they have. ``mbarrier.arrive`` releases what its own
thread has done, or has learned from others; ``elect.sync`` makes lanes meet but orders no memory
(PTX ISA 9.7.13.14). It takes a ``bar.warp.sync``, or a barrier of the CTA, between the accesses and
the arrival. Global memory is left out: nobody hands it over by an mbarrier within a kernel here.
"""

from __future__ import annotations

from functools import lru_cache

from cute_fa import ptx

_PLAIN = frozenset(("ld", "st", "ldmatrix", "stmatrix", "atom", "red"))
_ELSEWHERE = frozenset(("local", "param", "global", "const"))


@lru_cache(maxsize=64)
def unsynchronised_arrivals(kernel: ptx.Kernel) -> dict[int, int]:
    """``mbarrier.arrive`` that some path reaches from an access to shared or tensor memory with no
    warp barrier between.

    Returns:
        index of one such access, by index of the arrival.
    """
    blocks = ptx.basic_blocks(kernel, lambda instr: False)
    found: dict[int, int] = {}
    entry: dict[int, int | None] = {0: None}  # latest access that is not yet ordered
    pending = [0]
    while pending:
        index = pending.pop()
        block = blocks[index]
        access = entry[index]
        for instr in kernel.body[block.start : block.stop]:
            if _is_access(instr):
                access = instr.index
            elif instr.op in ("bar", "barrier") and "arrive" not in instr.parts:
                access = None
            elif instr.parts[:2] == ("mbarrier", "arrive") and access is not None:
                found.setdefault(instr.index, access)
        for successor in block.successors:
            if successor not in entry or (entry[successor] is None and access is not None):
                entry[successor] = access
                pending.append(successor)
    return found


def _is_access(instr: ptx.Instr) -> bool:
    if instr.op == "tcgen05":
        return instr.parts[1] in ("ld", "st")
    return instr.op in _PLAIN and _ELSEWHERE.isdisjoint(instr.parts)
