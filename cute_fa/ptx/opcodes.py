"""What an opcode alone says: its destinations, its carry flag, whether control goes on.

PTX writes destinations first, but not every instruction has one: the tables below hold the
exceptions (PTX ISA section 9.7, by instruction). An opcode in no table writes its first operand.
"""

from __future__ import annotations

from cute_fa.ptx.module import Instr
from cute_fa.ptx.operands import Address, TensorAddress, Vector

JUMPS = ("bra", "brx")
ENDS_THREAD = ("ret", "exit", "trap")

# Add-with-carry instructions hand their carry on in a register that no operand names
# (PTX ISA section 9.7.2).
CARRY = "%cc.cf"
_CARRY_IN = ("addc", "subc", "madc")
_CARRY_OUT = ("add", "sub", "mad", *_CARRY_IN)

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


def falls_through(instr: Instr) -> bool:
    """Whether control may go on to the next instruction."""
    return instr.guard is not None or instr.op not in (*ENDS_THREAD, *JUMPS)


def carries_in(parts: tuple[str, ...]) -> bool:
    """Whether the instruction reads the carry flag: ``addc.u32`` …"""
    return parts[0] in _CARRY_IN


def carries_out(parts: tuple[str, ...]) -> bool:
    """Whether the instruction writes the carry flag: ``add.cc.s32``, ``madc.lo.cc.u32`` …"""
    return parts[0] in _CARRY_OUT and "cc" in parts[1:3]


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
