"""A kernel prepared for simulation: registers placed, instructions decoded, blocks generated."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim import addresses, isa
from cute_fa.sim.codegen import TERMINATORS, BlockEmitter, BlockSource, Location, halves
from cute_fa.sim.fusion import fuse_products, mma_grid
from cute_fa.sim.isa import Decoded, Handler, UnsupportedInstruction
from cute_fa.sim.isa.types import NUMPY, register_class
from cute_fa.sim.render import render
from cute_fa.sim.runner import HELPERS

_UFUNCS = (
    *("absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "copysign", "cos", "divide"),
    *("equal", "exp2", "greater", "greater_equal", "invert", "left_shift", "less", "less_equal"),
    *("logical_or", "maximum", "minimum", "multiply", "negative", "not_equal", "right_shift"),
    *("sin", "sqrt", "subtract", "tanh"),
)


@dataclass
class CompiledBlock:
    """One basic block, ready to run.

    Attributes:
        kind: how it ends, see ``BlockSource``.
        target: block index of the branch's target; next: of the fall-through.
        table: targets of a ``brx.idx``.
        instr: the last instruction, which the terminator's hazards quote.
        collective: holds an instruction that lanes of a warp must execute together.
        progress: does more than look at memory and branch.
        full, masked: code of ``make`` by variant, compiled at first use.
    """

    index: int
    kind: str
    source: BlockSource
    instr: ptx.Instr
    target: int = -1
    next: int = -1
    table: tuple[int, ...] = ()
    collective: bool = False
    progress: bool = False
    makers: dict[bool, Callable[[Any], Any]] = field(default_factory=dict)
    warp_counts: dict[str, int] = field(default_factory=dict)
    lane_counts: dict[str, int] = field(default_factory=dict)


class Program:
    """A kernel's blocks and where its registers live.

    Raises:
        UnsupportedInstruction: naming every instruction that the simulator cannot carry out.
    """

    def __init__(self, module: ptx.Module, kernel: ptx.Kernel) -> None:
        self.module = module
        self.kernel = kernel
        self.rows: Counter[str] = Counter()
        self.locations: dict[str, Location] = {}
        self._wide: set[str] = set()
        self._place_registers()
        self._local, _ = addresses.local_layout(kernel.local_vars)
        self._shared = {**module.shared_vars, **kernel.shared_vars}
        self.variables: dict[str, np.ndarray] = {}
        self._handlers, self._decoded = self._decode()
        blocks = ptx.basic_blocks(kernel, self._splits_after)
        live = ptx.liveness(kernel, blocks)
        self.undefined = live[0][0]
        self.constants: dict[str, Any] = {}
        self.blocks = self._emit(blocks, live)
        self.namespace = self._namespace()

    # --- what code generation asks ----------------------------------------------------------------

    def location(self, register: str) -> Location:
        """Register-file rows of a register."""
        return self.locations[register]

    def is_wide(self, register: str) -> bool:
        """Whether a register is a ``.b128``."""
        return register in self._wide

    def flat_destinations(self, decoded: Decoded) -> list[str | None]:
        """An effect's destinations with ``.b128`` registers as their two halves."""
        names: list[str | None] = []
        for register in decoded.dests:
            if register is not None and self.is_wide(register):
                names.extend(halves(register))
            else:
                names.append(register)
        return names

    def symbol_dtype(self, name: str) -> str:
        """Width of a symbol's address: shared ones have 32 bits."""
        return "u4" if name in self._shared else "u8"

    def symbol(self, name: str, instr: ptx.Instr) -> tuple[str, int]:
        """What a symbol is: ("shared", 0), ("variable", 0) or ("constant", its address)."""
        if name in self._shared:
            return "shared", 0
        if name in self._local:
            return "constant", self._local[name]
        if name in self.module.global_vars:
            if name not in self.variables:
                self.variables[name] = _initial_data(self.module.global_vars[name])
            return "variable", 0
        for param in self.kernel.params:
            if param.name == name:
                return "constant", addresses.PARAM_BASE + param.offset
        raise UnsupportedInstruction(instr, f"symbol {name} is not a variable or parameter")

    # --- construction -----------------------------------------------------------------------------

    def _place_registers(self) -> None:
        for name, type_name in self.kernel.registers.items():
            file = register_class(type_name)
            parts = (name,) if file != "q" else halves(name)
            if file == "q":
                self._wide.add(name)
                file = "d"
            for part in parts:
                self.locations[part] = Location(file, (self.rows[file],))
                self.rows[file] += 1

    def _decode(self) -> tuple[dict[int, Handler], dict[int, Decoded]]:
        handlers: dict[int, Handler] = {}
        decoded: dict[int, Decoded] = {}
        errors: list[UnsupportedInstruction] = []
        for instr in self.kernel.body:
            if instr.op in TERMINATORS:
                continue
            handler = isa.find_handler(instr.opcode)
            if handler is None:
                errors.append(UnsupportedInstruction(instr))
                continue
            handlers[instr.index] = handler
            if handler.kind != "pure":
                try:
                    decoded[instr.index] = handler.target(instr, self.kernel)
                except UnsupportedInstruction as error:
                    errors.append(error)
        if errors:
            raise UnsupportedInstruction.of_many(errors)
        return handlers, decoded

    def _splits_after(self, instr: ptx.Instr) -> bool:
        decoded = self._decoded.get(instr.index)
        if decoded is not None and decoded.ends_block:
            return True
        following = self._decoded.get(instr.index + 1)
        return following is not None and following.own_block

    def _emit(self, blocks: ptx.Blocks, live: Any) -> list[CompiledBlock]:
        errors: list[UnsupportedInstruction] = []
        out = []
        for block in blocks:
            body = self.kernel.body[block.start : block.stop]
            emitter = BlockEmitter(self, self._with_halves(live[block.index][1]))
            for instr in body:
                try:
                    self._emit_instruction(emitter, instr)
                except UnsupportedInstruction as error:
                    errors.append(error)
            source = emitter.finish()
            fuse_products(source)
            out.append(self._describe(blocks, block, body, source))
        if errors:
            raise UnsupportedInstruction.of_many(errors)
        return out

    def _with_halves(self, registers: frozenset[str]) -> frozenset[str]:
        wide = registers & self._wide
        return registers.union(*(halves(name) for name in wide)) if wide else registers

    def _emit_instruction(self, emitter: BlockEmitter, instr: ptx.Instr) -> None:
        if instr.op in TERMINATORS:
            emitter.terminate(instr)
            return
        handler = self._handlers[instr.index]
        if handler.kind == "pure":
            emitter.pure(instr, handler)
        else:
            emitter.effect(instr, handler, self._decoded[instr.index])

    def _describe(
        self,
        blocks: ptx.Blocks,
        block: ptx.Block,
        body: tuple[ptx.Instr, ...],
        source: BlockSource,
    ) -> CompiledBlock:
        last = body[-1]
        out = CompiledBlock(block.index, source.kind, source, last)
        following = block.index + 1 if block.index + 1 < len(blocks) else -1
        if source.kind in ("jump", "branch"):
            label = next(o.name for o in last.operands if isinstance(o, ptx.Symbol))
            out.target = blocks.starting_at(self.kernel.labels[label]).index
        if source.kind == "switch":
            table = next(o.name for o in last.operands if isinstance(o, ptx.Symbol))
            labels = self.kernel.branch_targets[table]
            out.table = tuple(
                blocks.starting_at(self.kernel.labels[label]).index for label in labels
            )
        out.next = -1 if source.kind in ("jump", "exit", "switch") else following
        decoded = [self._decoded[i.index] for i in body if i.index in self._decoded]
        out.collective = any(item.collective for item in decoded)
        out.progress = any(item.progress for item in decoded)
        out.warp_counts = _static_counts(source.warp_counts)
        out.lane_counts = dict(source.lane_counts)
        return out

    def _namespace(self) -> dict[str, Any]:
        """The globals of every block: semantics, ufuncs, dtypes, constants and handlers."""
        space: dict[str, Any] = {name: getattr(np, name) for name in _UFUNCS}
        space |= {"where": np.where, "copyto": np.copyto, "mma_grid": mma_grid}
        space |= {**NUMPY, **HELPERS, **isa.semantics()}
        for block in self.blocks:
            for name in block.source.constants:
                if name not in space:
                    space[name] = _constant(name)
            for index, decoded in block.source.handlers.items():
                space[f"E{index}"] = decoded
                space[f"I{index}"] = self.kernel.body[index]
        return space

    def maker(self, index: int, masked: bool) -> Callable[[Any], Any]:
        """``make(bind)`` of a block for full or partial lane sets."""
        block = self.blocks[index]
        make = block.makers.get(masked)
        if make is None:
            text = render(block.source, masked=masked)
            name = f"<{self.kernel.name[:40]} block {index}{' masked' if masked else ''}>"
            scope: dict[str, Any] = {}
            exec(compile(text, name, "exec"), self.namespace, scope)
            make = block.makers[masked] = scope["make"]
        return make


def _static_counts(counts: Counter[str]) -> dict[str, int]:
    """Counters that one warp adds by running a block, from emission's raw counts.

    Keys with a plus sign are counters of their own; the others are instruction classes.
    """
    out: Counter[str] = Counter()
    for name, count in counts.items():
        if name.startswith("+"):
            out[name[1:]] += count
        else:
            out[f"warp_instructions.{name}"] += count
            out["warp_instructions"] += count
    return dict(out)


def _constant(name: str) -> np.ndarray:
    """The array that a constant's name ``K<dtype>_<hex bits>`` stands for."""
    dtype, _, digits = name[1:].partition("_")
    bits = int(digits, 16)
    if dtype == "b1":
        return np.array(bool(bits))
    return np.array(bits, f"u{dtype[1]}").view(NUMPY[dtype])


def _initial_data(variable: ptx.Variable) -> np.ndarray:
    return np.frombuffer(bytearray(ptx.initial_bytes(variable)), np.uint8)


_PROGRAMS: OrderedDict[tuple[str, str], Program] = OrderedDict()
_MAX_PROGRAMS = 64


def prepare(module: ptx.Module, name: str) -> Program:
    """The prepared kernel ``name`` of a module; kept for later launches of the same PTX text.

    Raises:
        InvalidArgumentError: if the module has no such kernel.
        UnsupportedInstruction: listing all unsupported instructions.
    """
    kernel = module.kernels.get(name)
    if kernel is None:
        raise InvalidArgumentError(
            "the PTX module has no such kernel", got=name, expected=", ".join(module.kernels)
        )
    key = (hashlib.sha256(module.text.encode()).hexdigest(), name)
    program = _PROGRAMS.get(key)
    if program is None:
        program = _PROGRAMS[key] = Program(module, kernel)
        while len(_PROGRAMS) > _MAX_PROGRAMS:
            _PROGRAMS.popitem(last=False)
    else:
        _PROGRAMS.move_to_end(key)
    return program
