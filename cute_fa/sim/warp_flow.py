"""What can be said about the lanes of a warp from the program text alone.

The race checks know warps, not lanes. One mistake hides below that: lanes store, and then one lane
alone signals for all of them. ``mbarrier.arrive`` releases what its own thread has done, or has
learned from others; ``elect.sync`` makes lanes meet but orders no memory (PTX ISA 9.7.13.14). It
takes a ``bar.warp.sync``, or a barrier of the CTA, between the stores and the arrival.
"""

from __future__ import annotations

from functools import lru_cache

from cute_fa import ptx

_STORES = frozenset(("st", "stmatrix", "red"))
_PRIVATE = frozenset(("local", "param"))


@lru_cache(maxsize=64)
def unsynchronised_arrivals(kernel: ptx.Kernel) -> dict[int, int]:
    """``mbarrier.arrive`` that some path reaches from a store with no warp barrier between.

    Returns:
        index of one such store, by index of the arrival.
    """
    blocks = ptx.basic_blocks(kernel, lambda instr: False)
    found: dict[int, int] = {}
    entry: dict[int, int | None] = {0: None}  # latest store that is not yet ordered
    pending = [0]
    while pending:
        index = pending.pop()
        block = blocks[index]
        store = entry[index]
        for instr in kernel.body[block.start : block.stop]:
            if instr.op in _STORES and _PRIVATE.isdisjoint(instr.parts):
                store = instr.index
            elif instr.op in ("bar", "barrier") and "arrive" not in instr.parts:
                store = None
            elif instr.parts[:2] == ("mbarrier", "arrive") and store is not None:
                found.setdefault(instr.index, store)
        for successor in block.successors:
            if successor not in entry or (entry[successor] is None and store is not None):
                entry[successor] = store
                pending.append(successor)
    return found
