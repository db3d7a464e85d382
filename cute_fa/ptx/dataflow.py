"""Which registers an instruction writes and reads, and which are live where.

PTX writes destinations first, but not every instruction has one, and some read what they
write: the tables below hold the exceptions (PTX ISA section 9.7, by instruction).
"""

from __future__ import annotations

from collections.abc import Sequence

from cute_fa.ptx.body import CARRY, carries_in, carries_out
from cute_fa.ptx.cfg import Blocks
from cute_fa.ptx.module import Instr, Kernel
from cute_fa.ptx.operands import (
    Address,
    Operand,
    TensorAddress,
    Vector,
    register_names,
)

# Instructions whose first operand may be a register and yet is a source. Those that start with
# an address (st, red, cp.async, mbarrier.init, tcgen05.mma, stmatrix …) need no entry: an
# address is never written, and its registers are read.
_NO_DESTINATION = frozenset(
    {
        "bar",
        "barrier",
        "bra",
        "brkpt",
        "brx",
        "discard",
        "exit",
        "fence",
        "griddepcontrol",
        "membar",
        "nanosleep",
        "pmevent",
        "prefetch",
        "prefetchu",
        "red",
        "ret",
        "setmaxnreg",
        "st",
        "stackrestore",
        "stmatrix",
        "sured",
        "sust",
        "trap",
        "wgmma",
    }
)
# Within families that are mixed: the second part decides.
_NO_DESTINATION_FORMS = frozenset(
    {
        ("cp", "async"),
        ("cp", "reduce"),
        ("mbarrier", "init"),
        ("mbarrier", "inval"),
        ("mbarrier", "expect_tx"),
        ("mbarrier", "complete_tx"),
        ("multimem", "st"),
        ("multimem", "red"),
        ("multimem", "cp"),
        ("tcgen05", "alloc"),
        ("tcgen05", "commit"),
        ("tcgen05", "cp"),
        ("tcgen05", "dealloc"),
        ("tcgen05", "mma"),
        ("tcgen05", "relinquish_alloc_permit"),
        ("tcgen05", "shift"),
        ("tcgen05", "st"),
        ("tensormap", "replace"),
        ("wmma", "store"),
    }
)
# bar.red, barrier.red and barrier.cta.red return a count or a predicate.
_BARRIER_REDUCTION = "red"


def destination_count(instr: Instr) -> int:
    """How many leading operands of ``instr`` are written."""
    parts = instr.parts
    op = parts[0]
    operands = instr.operands
    if not operands or isinstance(operands[0], (Address, TensorAddress)):
        return 0
    if op in ("bar", "barrier"):
        return 1 if _BARRIER_REDUCTION in parts[1:3] else 0
    if op == "wgmma":
        return 1 if parts[1] == "mma_async" else 0
    if op == "call":
        return 1 if isinstance(operands[0], Vector) else 0
    if op in _NO_DESTINATION or parts[:2] in _NO_DESTINATION_FORMS:
        return 0
    if parts[:2] == ("tcgen05", "ld") and "red" in parts:
        return 2
    return 1


def destinations(instr: Instr) -> tuple[Operand, ...]:
    """The operands that ``instr`` writes: registers, vectors, pairs or sinks."""
    return instr.operands[: destination_count(instr)]


def sources(instr: Instr) -> tuple[Operand, ...]:
    """The operands that ``instr`` reads; wgmma's accumulators stand in both lists."""
    if instr.op == "wgmma":
        return instr.operands
    return instr.operands[destination_count(instr) :]


def defs(instr: Instr) -> tuple[str, ...]:
    """Registers that ``instr`` writes, in order of writing, each once."""
    written = dict.fromkeys(
        name for operand in destinations(instr) for name in register_names(operand)
    )
    if instr.op in ("add", "sub", "mad", "addc", "subc", "madc") and carries_out(instr.parts):
        written[CARRY] = None
    return tuple(written)


def uses(instr: Instr) -> tuple[str, ...]:
    """Registers that ``instr`` reads, its guard first, each once."""
    read = dict.fromkeys(name for operand in sources(instr) for name in register_names(operand))
    if instr.guard is not None:
        read = {instr.guard.reg: None, **read}
    if carries_in(instr.op):
        read[CARRY] = None
    return tuple(read)


def kills(instr: Instr) -> tuple[str, ...]:
    """Registers whose earlier value is gone after ``instr``: none if it may not run."""
    return () if instr.guard is not None else defs(instr)


def liveness(kernel: Kernel, blocks: Blocks) -> list[tuple[frozenset[str], frozenset[str]]]:
    """Registers that are live at the start and at the end of each block.

    A register is live where some path from there reads it before an unguarded write. Sets are
    per thread: threads of a warp that stand in other blocks are not looked at.
    """
    names: list[str] = []
    bit_of: dict[str, int] = {}

    def mask(registers: Sequence[str]) -> int:
        bits = 0
        for register in registers:
            bit = bit_of.get(register)
            if bit is None:
                bit = bit_of[register] = 1 << len(names)
                names.append(register)
            bits |= bit
        return bits

    read_first = []
    written = []
    for block in blocks:
        reads = kill = 0
        for instr in kernel.body[block.start : block.stop]:
            reads |= mask(uses(instr)) & ~kill
            kill |= mask(kills(instr))
        read_first.append(reads)
        written.append(kill)

    live_in = list(read_first)
    live_out = [0] * len(blocks)
    predecessors = blocks.predecessors
    pending = list(range(len(blocks)))
    queued = set(pending)
    while pending:
        index = pending.pop()
        queued.discard(index)
        out = 0
        for successor in blocks[index].successors:
            out |= live_in[successor]
        live_out[index] = out
        into = read_first[index] | (out & ~written[index])
        if into != live_in[index]:
            live_in[index] = into
            for predecessor in predecessors[index]:
                if predecessor not in queued:
                    queued.add(predecessor)
                    pending.append(predecessor)

    known: dict[int, frozenset[str]] = {}

    def registers(bits: int) -> frozenset[str]:
        found = known.get(bits)
        if found is None:
            digits = f"{bits:b}"[::-1]
            live = []
            at = digits.find("1")
            while at >= 0:
                live.append(names[at])
                at = digits.find("1", at + 1)
            found = known[bits] = frozenset(live)
        return found

    return [(registers(live_in[b.index]), registers(live_out[b.index])) for b in blocks]
