"""A kernel prepared for simulation: registers placed, instructions decoded, blocks generated."""

from __future__ import annotations

import hashlib
import marshal
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim import addresses, block_cache, isa
from cute_fa.sim.codegen import TERMINATORS, BlockEmitter, halves
from cute_fa.sim.collectives import members_of
from cute_fa.sim.fusion import fuse_products, mma_grid
from cute_fa.sim.isa import Decoded, Handler, UnsupportedInstruction
from cute_fa.sim.isa.types import CLASS_DTYPE, NUMPY, register_class
from cute_fa.sim.render import render
from cute_fa.sim.runner import HELPERS
from cute_fa.sim.statements import BlockSource, Location

_UFUNCS = (
    *("absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "copysign", "cos", "divide"),
    *("equal", "exp2", "greater", "greater_equal", "invert", "left_shift", "less", "less_equal"),
    *("logical_or", "maximum", "minimum", "multiply", "negative", "not_equal", "right_shift"),
    *("sin", "sqrt", "subtract", "tanh"),
)


@dataclass
class CompiledBlock:
    """What the scheduler knows of a basic block.

    Attributes:
        kind: how it ends, see ``BlockSource``.
        last: index of its last instruction.
        target: block index of the branch's target; next: of the fall-through.
        table: targets of a ``brx.idx``.
        members: member masks of the instructions that lanes of a warp must execute together, as
            bits or as the register that holds them; empty if there is none.
        progress: does more than look at memory and branch.
        warp_counts, lane_counts: what one active warp or lane adds to the counters.
        constants: names of the constants that its code uses.
        handlers: indices of its effect instructions.
    """

    index: int
    kind: str
    last: int
    target: int = -1
    next: int = -1
    table: tuple[int, ...] = ()
    members: tuple[int | str, ...] = ()
    progress: bool = False
    warp_counts: dict[str, int] = field(default_factory=dict)
    lane_counts: dict[str, int] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    handlers: tuple[int, ...] = ()


Maker = Callable[[Any], Any]
Variant = tuple[int, bool]  # block index, whether for partial lane sets


class Program:
    """A kernel's blocks and where its registers live.

    Raises:
        UnsupportedInstruction: naming every instruction that the simulator cannot carry out.
    """

    def __init__(self, module: ptx.Module, kernel: ptx.Kernel) -> None:
        self.module = module
        self.kernel = kernel
        self.rows: dict[str, int] = {}
        self.locations: dict[str, Location] = {}
        self._wide: set[str] = set()
        self._place_registers()
        self._local, _ = addresses.local_layout(kernel)
        self._shared = {**module.shared_vars, **kernel.shared_vars}
        self.variables: dict[str, np.ndarray] = {}
        self._handlers, self._decoded = self._decode()
        self.undefined: frozenset[str] = frozenset()
        self.blocks: list[CompiledBlock] = []
        self._sources: list[BlockSource] | None = None
        self._packed_sources = b""
        self._codes: dict[Variant, bytes] = {}
        self._makers: dict[Variant, Maker] = {}
        self._is_saved = False
        self._key = ""
        if len(kernel.body) >= block_cache.MIN_INSTRUCTIONS:
            self._key = block_cache.key_of(module.text, kernel.name)
        if not self._restore():
            self._generate()
        self._scope = self._namespace()

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

    # --- what traces and timelines ask ------------------------------------------------------------

    def body_of(self, block: int) -> tuple[ptx.Instr, ...]:
        """The instructions of a block."""
        first = self.blocks[block - 1].last + 1 if block else 0
        return self.kernel.body[first : self.blocks[block].last + 1]

    def decoded(self, instr: ptx.Instr) -> Decoded | None:
        """The handler of an effect; None for pure instructions and branches."""
        return self._decoded.get(instr.index)

    def counter_class(self, instr: ptx.Instr) -> str:
        """The class under which an instruction is counted."""
        if instr.op in TERMINATORS:
            return "branch" if instr.op in ("bra", "brx") else "control"
        known = self._decoded.get(instr.index) or self._handlers[instr.index]
        return known.counter_class

    # --- construction -----------------------------------------------------------------------------

    def _place_registers(self) -> None:
        counts = dict.fromkeys(CLASS_DTYPE, 0)
        files: dict[str, str] = {}
        for name, type_name in self.kernel.registers.items():
            file = files.get(type_name)
            if file is None:
                file = files[type_name] = register_class(type_name)
            if file == "q":
                self._wide.add(name)
                for half in halves(name):
                    self.locations[half] = Location("d", counts["d"])
                    counts["d"] += 1
            else:
                self.locations[name] = Location(file, counts[file])
                counts[file] += 1
        self.rows = counts

    def _decode(self) -> tuple[dict[int, Handler], dict[int, Decoded]]:
        handlers: dict[int, Handler] = {}
        decoded: dict[int, Decoded] = {}
        errors: list[UnsupportedInstruction] = []
        known: dict[str, Handler | None] = {}
        for instr in self.kernel.body:
            if instr.op in TERMINATORS:
                continue
            handler = known.get(instr.opcode)
            if handler is None:
                handler = known[instr.opcode] = isa.find_handler(instr.opcode)
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

    def _generate(self) -> None:
        """Emit every block."""
        blocks = ptx.basic_blocks(self.kernel, self._splits_after)
        live = ptx.liveness(self.kernel, blocks)
        self.undefined = live[0][0]
        errors: list[UnsupportedInstruction] = []
        self._sources = []
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
            self._sources.append(source)
            self.blocks.append(self._describe(blocks, block, body, source))
        if errors:
            raise UnsupportedInstruction.of_many(errors)

    def _restore(self) -> bool:
        """Take everything that :meth:`save` stored from the disk; False if there is nothing."""
        stored = block_cache.load(self._key) if self._key else None
        if stored is None:
            return False
        self.undefined, self.blocks, names, self._codes, self._packed_sources = stored
        for name in names:
            self.variables[name] = _initial_data(self.module.global_vars[name])
        self._is_saved = True
        return True

    def save(self) -> None:
        """Keep the generated code on disk if a later process would gain from it."""
        if not self._key or self._is_saved:
            return
        if self._sources is not None:
            self._packed_sources = pickle.dumps(self._sources, pickle.HIGHEST_PROTOCOL)
        names = tuple(self.variables)
        stored = (self.undefined, self.blocks, names, self._codes, self._packed_sources)
        block_cache.save(self._key, stored)
        self._is_saved = True

    def source(self, index: int) -> BlockSource:
        """A block's statements."""
        if self._sources is None:
            self._sources = pickle.loads(self._packed_sources)
        return self._sources[index]

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
        out = CompiledBlock(block.index, source.kind, last.index)
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
        out.members = tuple({members_of(item): None for item in decoded if item.collective})
        out.progress = any(item.progress for item in decoded)
        out.warp_counts = _static_counts(source.warp_counts)
        out.lane_counts = dict(source.lane_counts)
        out.constants = tuple(source.constants)
        out.handlers = source.handlers
        return out

    def _namespace(self) -> dict[str, Any]:
        """The globals of every block: semantics, ufuncs, dtypes, constants and handlers."""
        space: dict[str, Any] = {name: getattr(np, name) for name in _UFUNCS}
        space |= {"where": np.where, "copyto": np.copyto, "mma_grid": mma_grid}
        space |= {**NUMPY, **HELPERS, **isa.semantics()}
        for block in self.blocks:
            for name in block.constants:
                if name not in space:
                    space[name] = _constant(name)
            for index in block.handlers:
                space[f"E{index}"] = self._decoded[index]
                space[f"I{index}"] = self.kernel.body[index]
        return space

    def maker(self, index: int, masked: bool) -> Maker:
        """``make(bind)`` of a block for full or partial lane sets."""
        variant = index, masked
        make = self._makers.get(variant)
        if make is None:
            if variant in self._codes:
                code = marshal.loads(self._codes[variant])
            else:
                text = render(self.source(index), masked=masked)
                kind = " masked" if masked else ""
                code = compile(text, f"<{self.kernel.name[:40]} block {index}{kind}>", "exec")
                self._codes[variant] = marshal.dumps(code)
                self._is_saved = False
            scope: dict[str, Any] = {}
            exec(code, self._scope, scope)
            make = self._makers[variant] = scope["make"]
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
