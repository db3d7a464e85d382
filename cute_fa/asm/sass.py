"""SASS as text and as data, by way of nvdisasm."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from cute_fa.asm.elf import Cubin
from cute_fa.asm.tools import run_on_cubin
from cute_fa.errors import CompileError
from cute_fa.ptx import Block, Blocks

_INSTRUCTION_BYTES = 16
_HEX = re.compile(r"(?:^|[,\s])(0x[0-9a-f]+)$")
_ENDS = ("EXIT", "RET", "BPT", "KILL")
# Control leaves through these; with a guard, or with a condition among the operands
# (``BRA.U UP0, …``), it may also go on.
_JUMPS = ("BRA", "JMP", "BRX", "JMX")


@dataclass(frozen=True)
class SassInstr:
    """One machine instruction.

    Attributes:
        address: in bytes from the kernel's start.
        opcode: with its modifiers, e.g. ``HMMA.16816.F32.BF16``.
        guard: ``@P0``, ``@!UP2`` or empty.
        operands: as nvdisasm writes them.
    """

    address: int
    opcode: str
    guard: str
    operands: str

    @property
    def op(self) -> str:
        """The instruction's name without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch names, or None."""
        found = _HEX.search(self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def text(self) -> str:
        """Guard, opcode and operands on one line."""
        return " ".join(filter(None, (self.guard, self.opcode, self.operands)))


@dataclass(frozen=True)
class SassKernel:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[SassInstr, ...]

    @cached_property
    def code(self) -> tuple[SassInstr, ...]:
        """The instructions without the NOPs that pad the end."""
        return tuple(instr for instr in self.instructions if instr.op != "NOP")

    @cached_property
    def blocks(self) -> Blocks:
        """Basic blocks over ``instructions``; see ``_basic_blocks`` for what is approximated."""
        return _basic_blocks(self.instructions)


def disassemble(cubin: bytes) -> str:
    """The SASS of every kernel in the cubin, as nvdisasm prints it.

    Raises:
        MissingToolError: nvdisasm is not installed.
        InvalidArgumentError: the bytes are no cubin.
    """
    Cubin(cubin)
    return run_on_cubin("nvdisasm", cubin, "-c")


def sass(cubin: bytes, kernel: str | None = None) -> SassKernel:
    """The code of ``kernel``; the name may be left out where the cubin holds one kernel.

    Raises:
        MissingToolError: nvdisasm is not installed.
        InvalidArgumentError: no cubin, or no such kernel in it.
    """
    name = Cubin(cubin).kernel(kernel)
    kernels = parse_sass(run_on_cubin("nvdisasm", cubin, "-json"))
    if name not in kernels:
        raise CompileError(
            "nvdisasm did not print the kernel", got=", ".join(kernels) or "nothing", expected=name
        )
    return kernels[name]


def parse_sass(text: str) -> dict[str, SassKernel]:
    """Kernels by name from what ``nvdisasm -json`` printed."""
    _, functions = json.loads(text)
    kernels = {}
    for function in functions:
        start = function["start"]
        kernels[function["function-name"]] = SassKernel(
            function["function-name"],
            tuple(
                SassInstr(
                    start + _INSTRUCTION_BYTES * position,
                    instr["opcode"],
                    instr.get("predicate", ""),
                    instr.get("operands", ""),
                )
                for position, instr in enumerate(function["sass-instructions"])
            ),
        )
    return kernels


def _basic_blocks(code: tuple[SassInstr, ...]) -> Blocks:
    """Blocks and their successors.

    Two things are approximated. A call's subroutine is not followed unless it is named by
    address, which is how ptxas also writes far jumps. The table of an indirect branch (BRX) is
    not in the disassembly: it is taken to reach every block that nothing else reaches.
    """
    index_at = {instr.address: i for i, instr in enumerate(code)}
    reconverge = _reconvergence_points(code, index_at)
    starts = {0}
    leaves: dict[int, tuple[list[int], bool]] = {}
    for i, instr in enumerate(code):
        targets, goes_on = _flow(instr, i, index_at, reconverge)
        if targets or not goes_on or instr.op in _JUMPS:
            leaves[i] = targets, goes_on
            starts.update(targets)
            starts.add(i + 1)
    starts.discard(len(code))
    ordered = sorted(starts)
    block_of = {start: index for index, start in enumerate(ordered)}
    successors: list[list[int]] = []
    for stop in (*ordered[1:], len(code)):
        targets, goes_on = leaves.get(stop - 1, ([], True))
        following = [stop] if goes_on and stop < len(code) else []
        successors.append(sorted({block_of[at] for at in (*following, *targets)}))
    _add_indirect_targets(code, ordered, successors)
    stops = [*ordered[1:], len(code)]
    return Blocks(
        [
            Block(index, ordered[index], stops[index], tuple(successors[index]))
            for index in range(len(ordered))
        ]
    )


def _flow(
    instr: SassInstr, index: int, index_at: dict[int, int], reconverge: dict[int, int]
) -> tuple[list[int], bool]:
    """(instructions that ``instr`` may jump to, whether control may go on to the next)."""
    op = instr.op
    conditional = bool(instr.guard) and instr.guard not in ("@PT", "@UPT")
    if op in _ENDS:
        return [], conditional or op == "BPT"
    target = index_at.get(instr.target) if instr.target is not None else None
    if op in _JUMPS:
        conditional = conditional or "," in instr.operands
        return ([] if target is None else [target]), conditional and op in ("BRA", "JMP")
    if op == "CALL":
        return ([] if target is None else [target]), True
    if op == "WARPSYNC" and target is not None:
        return [target], True
    if op == "BSYNC":
        return ([reconverge[index]], False) if index in reconverge else ([], True)
    return [], True


def _reconvergence_points(code: tuple[SassInstr, ...], index_at: dict[int, int]) -> dict[int, int]:
    """Where each BSYNC goes on that does not simply go on to the next instruction.

    BSSY names the place for its barrier register. Of several, the last one before the BSYNC
    counts; a BSYNC that stands right before one of them belongs to that one.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for instr in code:
        if instr.op == "BSSY" and instr.target in index_at:
            places[instr.operands.partition(",")[0]].append(index_at[instr.target])
    latest: dict[str, int] = {}
    found = {}
    for i, instr in enumerate(code):
        barrier = instr.operands.partition(",")[0]
        if instr.op == "BSSY" and instr.target in index_at:
            latest[barrier] = index_at[instr.target]
        elif instr.op == "BSYNC" and i + 1 not in places[barrier] and barrier in latest:
            found[i] = latest[barrier]
    return found


def _add_indirect_targets(
    code: tuple[SassInstr, ...], starts: list[int], successors: list[list[int]]
) -> None:
    stops = [*starts[1:], len(code)]
    indirect = [i for i, stop in enumerate(stops) if code[stop - 1].op in ("BRX", "JMX")]
    if not indirect:
        return
    reached = {0}
    pending = [0]
    while pending:
        for successor in successors[pending.pop()]:
            if successor not in reached:
                reached.add(successor)
                pending.append(successor)
    entered = {successor for out in successors for successor in out}
    for index in indirect:
        successors[index] += [
            block
            for block in range(len(starts))
            if block not in reached and block not in entered and code[starts[block]].op != "NOP"
        ]
