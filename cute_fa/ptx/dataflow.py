"""Which registers an instruction writes and reads, and which are live where.

Which operands are destinations is in cute_fa.ptx.opcodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from cute_fa.ptx.cfg import Blocks
from cute_fa.ptx.module import Instr, Kernel
from cute_fa.ptx.opcodes import CARRY, carries_in, carries_out, destination_count
from cute_fa.ptx.operands import Operand, register_names


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
    if carries_out(instr.parts):
        written[CARRY] = None
    return tuple(written)


def uses(instr: Instr) -> tuple[str, ...]:
    """Registers that ``instr`` reads, its guard first, each once."""
    read = dict.fromkeys(name for operand in sources(instr) for name in register_names(operand))
    if instr.guard is not None:
        read = {instr.guard.reg: None, **read}
    if carries_in(instr.parts):
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
