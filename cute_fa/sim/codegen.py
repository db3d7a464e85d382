"""Basic blocks as Python functions over numpy arrays.

Each block of a kernel becomes the source of a function ``block(ctx, mask)``. Inside it registers
are local variables in single-assignment form: a value computed in the block is a fresh array of the
rectangle's shape, or a smaller one that broadcasts to it (a constant, a parameter, something that
depends on the CTA only). Everything is computed for the whole rectangle, inactive lanes included;
only registers that are live at the block's end are stored to the register file, and only there
does the mask matter.

Names in generated code::

    v12            a value                          Rr5_f4     row 5 of file "r", viewed as float32
    Ku4_3f800000   a constant, 0-d array            Fu4_0      the same over the whole rectangle
    P8_u4          parameter bytes 8 to 11          S_tid_x    a special register
    E7, I7         handler and instruction 7        Z_u4       zeros over the whole rectangle
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.isa import Decoded, Handler, UnsupportedInstruction
from cute_fa.sim.isa.matrix import Mma
from cute_fa.sim.isa.move import CLOCKS, EVERY_LANE, SPECIALS
from cute_fa.sim.isa.types import NUMPY
from cute_fa.sim.names import ROW, WORD
from cute_fa.sim.statements import BlockSource, Location, Product, Statement, Value

CARRY = "%cc.cf"
TERMINATORS = ("bra", "brx", "ret", "exit")


class BlockEmitter:
    """Turns one block's instructions into statements; what emitters call ``e``.

    Args:
        program: supplies register locations and decoded handlers.
        live_out: registers whose values are needed after the block.
    """

    def __init__(self, program: Any, live_out: frozenset[str]) -> None:
        self.program = program
        self.kernel: ptx.Kernel = program.kernel
        self.live_out = live_out
        self.source = BlockSource("fall")
        self.values: dict[str, Value] = {}
        self.changed: dict[str, None] = {}
        self._counter = 0
        self.instr: ptx.Instr
        self.parts: tuple[str, ...] = ()
        self.operands: tuple[ptx.Operand, ...] = ()
        self.type = ""
        self.axes = 0
        self.guard: str | None = None
        self.guard_axes = 0

    # --- what emitters of pure instructions use ---------------------------------------------------

    def src(self, index: int, dtype: str) -> str:
        """Operand ``index`` viewed as ``dtype``."""
        return self.value(self.operands[index], dtype)

    def value(self, operand: ptx.Operand, dtype: str) -> str:
        """An operand viewed as ``dtype``."""
        if isinstance(operand, ptx.Reg):
            return self._view(self._read(operand.name), dtype)
        if isinstance(operand, ptx.Negated):
            return self.let(f"invert({self._view(self._read(operand.reg.name), 'b1')})")
        if isinstance(operand, ptx.Imm):
            return self.constant(operand.value, dtype)
        if isinstance(operand, ptx.FloatImm):
            return self.constant(_float_bits(operand, dtype), dtype)
        if isinstance(operand, ptx.Special):
            text = self.special(operand.name)
            held = _special_dtype(operand.name)
            return text if held == dtype else self.let(f"{text}.astype({dtype})")
        if isinstance(operand, ptx.Symbol):
            return self._symbol(operand, dtype)
        raise self.unsupported(f"operand {operand} has no value")

    def literal(self, index: int) -> int | None:
        """The integer literal that operand ``index`` is, or None."""
        operand = self.operands[index]
        return operand.value if isinstance(operand, ptx.Imm) else None

    def immediate(self, index: int) -> int:
        """The integer literal that operand ``index`` must be."""
        value = self.literal(index)
        if value is None:
            raise self.unsupported(f"operand {index + 1} is not a literal")
        return value

    def constant(self, bits: int, dtype: str) -> str:
        """A constant by its bit pattern."""
        width = 1 if dtype == "b1" else 8 * int(dtype[1])
        name = f"K{dtype}_{bits & ((1 << width) - 1):x}"
        self.source.constants.add(name)
        return name

    def full(self, index: int, dtype: str) -> str:
        """Operand ``index`` with the rectangle's whole shape and a contiguous last axis."""
        return self._expand(self.operands[index], dtype)

    def special(self, name: str) -> str:
        """A special register's array."""
        if name in CLOCKS:
            return self.let(f"read_clock(ctx, {name!r})")
        if name not in SPECIALS:
            raise self.unsupported(f"special register {name}")
        bound = "S_" + name[1:].replace(".", "_")
        self.source.bindings[bound] = f"bind.special({name!r})"
        self.axes |= SPECIALS[name][0]
        return bound

    def param(self, offset: int, nbytes: int) -> str:
        """Parameter bytes as an unsigned 0-d array."""
        if offset < 0 or offset + nbytes > self.kernel.param_bytes:
            raise self.unsupported(f"reads past the {self.kernel.param_bytes} parameter bytes")
        name = f"P{offset}_u{nbytes}"
        self.source.bindings[name] = f"bind.param({offset}, {nbytes})"
        return name

    def params(self) -> str:
        """The whole parameter block as bytes."""
        self.source.bindings["PARAMS"] = "bind.params()"
        return "PARAMS"

    def address(self, operand: ptx.Address, further: int = 0) -> str:
        """An address operand's value, plus ``further`` bytes, as unsigned of the base's width."""
        base, offset = operand.base, operand.offset + further
        dtype = self._address_dtype(operand)
        text = self.value(base, dtype)
        return self.let(f"add({text}, {self.constant(offset, dtype)})") if offset else text

    def _address_dtype(self, operand: ptx.Address) -> str:
        """Of an address, by its base."""
        base = operand.base
        if isinstance(base, ptx.Reg):
            return self.program.location(base.name).dtype
        if isinstance(base, ptx.Symbol):
            return self.program.symbol_dtype(base.name)
        return "u4" if _fits(base, 32) else "u8"

    def let(self, expr: str) -> str:
        """Give an intermediate result a name."""
        name = self._new()
        self.source.statements.append(Statement(expr, (name,)))
        return name

    def dst(
        self,
        expr: str,
        dtype: str,
        *,
        operand: ptx.Operand | None = None,
        ufunc: bool = False,
        alias: bool = False,
    ) -> str:
        """Assign ``expr`` to a destination register (by default operand 0); returns its name.

        Args:
            dtype: of the array that ``expr`` gives; its size must be the register's.
            ufunc: ``expr`` is a plain numpy ufunc call, to which an out array may be added.
            alias: ``expr`` is the name of an existing value, so that no statement is needed.
        """
        target = self.operands[0] if operand is None else operand
        if isinstance(target, ptx.Sink):
            return self.let(expr)
        if not isinstance(target, ptx.Reg):
            raise self.unsupported(f"cannot write to {target}")
        return self._assign(target.name, expr, dtype, ufunc, alias)

    def destination_pair(self) -> tuple[ptx.Operand, ptx.Operand | None]:
        """Operand 0 as (d, p) of ``d|p``; p is None without a bar or with a sink."""
        first = self.operands[0]
        if not isinstance(first, ptx.Pair):
            return first, None
        return first.first, None if isinstance(first.second, ptx.Sink) else first.second

    def dtype_of(self, operand: ptx.Operand) -> str:
        """Unsigned dtype of the register that ``operand`` names."""
        if not isinstance(operand, ptx.Reg):
            raise self.unsupported(f"{operand} is not a register")
        return self.program.location(operand.name).dtype

    def register_dtype(self, index: int) -> str | None:
        """Unsigned dtype of operand ``index`` if it is a register, else None."""
        operand = self.operands[index]
        return self.dtype_of(operand) if isinstance(operand, ptx.Reg) else None

    def carry(self) -> str:
        """The carry flag."""
        return self._view(self._read(CARRY), "b1")

    def set_carry(self, expr: str) -> None:
        """Write the carry flag."""
        self._assign(CARRY, expr, "b1", False, False)

    def wide(self, operand: ptx.Operand) -> tuple[str, str]:
        """Low and high 64 bits of a ``.b128`` register."""
        if not isinstance(operand, ptx.Reg):
            raise self.unsupported("a 128-bit operand must be a register")
        low, high = (self._view(self._read(name), "u8") for name in halves(operand.name))
        return low, high

    def set_wide(self, operand: ptx.Operand, low: str, high: str) -> None:
        """Write a ``.b128`` register."""
        if isinstance(operand, ptx.Sink):
            return
        if not isinstance(operand, ptx.Reg):
            raise self.unsupported("a 128-bit destination must be a register")
        for name, text in zip(halves(operand.name), (low, high), strict=True):
            self._assign(name, text, "u8", False, True)

    def copy_wide(self, target: ptx.Operand, source: ptx.Operand) -> None:
        """``mov.b128`` between registers."""
        low, high = self.wide(source)
        self.set_wide(target, low, high)

    def count(self, name: str, per_lane: int = 1) -> None:
        """Add to a counter for every active lane each time the block runs."""
        self.source.lane_counts[name] += per_lane

    def unsupported(self, why: str) -> UnsupportedInstruction:
        """The error for a form that the simulator does not carry out."""
        return UnsupportedInstruction(self.instr, why)

    # --- what the program uses --------------------------------------------------------------------

    def begin(self, instr: ptx.Instr) -> None:
        """Point the emitter at an instruction and evaluate its guard."""
        self.instr = instr
        self.parts = instr.parts
        self.operands = instr.operands
        self.type = instr.parts[-1]
        self.axes = 0
        self.guard = None
        self.guard_axes = 0
        if instr.guard is not None:
            text = self._view(self._read(instr.guard.reg), "b1")
            self.guard = self.let(f"invert({text})") if instr.guard.negated else text
            self.guard_axes, self.axes = self.axes, 0

    def pure(self, instr: ptx.Instr, handler: Handler) -> None:
        """Emit a pure instruction."""
        self.begin(instr)
        self.source.warp_counts[handler.counter_class] += 1
        if handler.modifiers is not None:
            skipped = handler.prefix.count(".") + handler.prefix.count("::") + 1
            for part in self.parts[skipped:-1]:
                if part not in handler.modifiers:
                    raise self.unsupported(f"modifier .{part}")
        handler.target(self)

    def effect(self, instr: ptx.Instr, handler: Handler, decoded: Decoded) -> None:
        """Emit the call of an effect handler; a blocking one ends the block."""
        self.begin(instr)
        self.source.warp_counts[decoded.counter_class] += 1
        for name, count in decoded.static_counts.items():
            self.source.warp_counts[f"+{name}"] += count
        self.source.handlers += (instr.index,)
        sources = self._effect_sources(decoded)
        arguments = "".join(f", {text}" for text in sources)
        number = instr.index
        if handler.kind == "blocking":
            self.source.kind = "blocking"
            call = f"run_blocking(E{number}, ctx, I{number}, {self.guard}, mask{arguments})"
            self.source.after = Statement(call)
            self.source.result = "after"
            return
        self._call(decoded, arguments)
        if self.guard is None and isinstance(decoded, Mma) and decoded.form.d == "f32":
            statement = self.source.statements[-1]
            a, b, c = (tuple(WORD.findall(text)) for text in sources)
            statement.product = Product(number, decoded.form, a, b, c, statement.targets)
        if instr.op == "trap":
            self.source.kind = "exit" if self.guard is None else "exit_if"
            self.source.result = self.guard or "None"

    def terminate(self, instr: ptx.Instr) -> None:
        """Emit a branch, return or exit."""
        self.begin(instr)
        self.source.warp_counts["branch" if instr.op in ("bra", "brx") else "control"] += 1
        if instr.op == "brx":
            self.source.kind = "switch"
            index = self.src(0, "u4")
            self.source.result = index
            if self.guard is not None:
                raise self.unsupported("guarded brx.idx")
            return
        unconditional = "jump" if instr.op == "bra" else "exit"
        conditional = "branch" if instr.op == "bra" else "exit_if"
        if self.guard is None:
            self.source.kind = unconditional
            return
        self.source.kind = conditional
        self.source.result = f"bool({self.guard})" if self.guard_axes == 0 else self.guard

    def finish(self) -> BlockSource:
        """Collect the stores of live registers."""
        for register in self.changed:
            if register not in self.live_out:
                continue
            value = self.values[register]
            place = self.program.location(register)
            view = self._bind_register(place, value.dtype)
            self.source.stores.append((view, value.name, value.axes == EVERY_LANE))
        return self.source

    # --- inside -----------------------------------------------------------------------------------

    def _new(self) -> str:
        self._counter += 1
        return f"v{self._counter}"

    def _bind_register(self, place: Location, dtype: str) -> str:
        name = f"R{place.file}{place.row}_{dtype}"
        self.source.bindings[name] = f"bind.reg({place.file!r}, {place.row}, {dtype})"
        return name

    def _read(self, register: str) -> Value:
        value = self.values.get(register)
        if value is None:
            place = self.program.location(register)
            name = self._bind_register(place, place.dtype)
            value = Value(name, place.dtype, EVERY_LANE, bound=f"R{place.file}{place.row}")
            self.values[register] = value
        self.axes |= value.axes
        return value

    def _view(self, value: Value, dtype: str) -> str:
        known = value.views.get(dtype)
        if known is not None:
            return known
        if dtype == "b1" or value.dtype == "b1":
            raise self.unsupported("a predicate where a number is needed, or the reverse")
        if int(dtype[1]) != int(value.dtype[1]):
            # A register wider than the instruction's type gives its low bits (9.4.1).
            if int(dtype[1]) > int(value.dtype[1]):
                raise self.unsupported("a register narrower than the instruction's type")
            low = self.let(f"{self._view(value, 'u' + value.dtype[1])}.astype(u{dtype[1]})")
            text = low if dtype[0] == "u" else self.let(f"{low}.view({dtype})")
        elif value.bound is not None:
            text = f"{value.bound}_{dtype}"
            file, row = value.bound[1], int(value.bound[2:])
            self.source.bindings[text] = f"bind.reg({file!r}, {row}, {dtype})"
        else:
            text = self.let(f"{value.name}.view({dtype})")
        value.views[dtype] = text
        return text

    def _assign(self, register: str, expr: str, dtype: str, ufunc: bool, alias: bool) -> str:
        place = self.program.location(register)
        if (dtype == "b1") != (place.file == "p") or (
            NUMPY[dtype] != NUMPY[place.dtype]
            and (NUMPY[dtype].itemsize != NUMPY[place.dtype].itemsize)
        ):
            raise self.unsupported(f"a result of {dtype} in a register of {place.dtype}")
        axes = self.axes
        if self.guard is not None:
            before = self._read(register)
            expr = f"where({self.guard}, {expr}, {self._view(before, dtype)})"
            ufunc = alias = False
            self.axes = axes
            axes |= self.guard_axes | before.axes
        bound = None
        if alias:
            name = expr
            row = ROW.fullmatch(expr)
            bound = row[1] if row else None
        else:
            name = self._new()
            self.source.statements.append(Statement(expr, (name,), ufunc))
        self.values[register] = Value(name, dtype, axes, bound)
        self.changed[register] = None
        return name

    def _symbol(self, operand: ptx.Symbol, dtype: str) -> str:
        kind, value = self.program.symbol(operand.name, self.instr)
        if kind == "constant":
            return self.constant(value + operand.offset, dtype)
        name = f"A_{_identifier(operand.name)}"
        if kind == "shared":
            self.axes |= SPECIALS["%cluster_ctarank"][0]
            self.source.bindings[name] = f"bind.shared({operand.name!r})"
        else:
            self.source.bindings[name] = f"bind.variable({operand.name!r})"
        held = "u4" if kind == "shared" else "u8"
        text = name if held == dtype else self.let(f"{name}.astype({dtype})")
        if operand.offset:
            text = self.let(f"add({text}, {self.constant(operand.offset, dtype)})")
        return text

    def _expand(self, operand: ptx.Operand, dtype: str) -> str:
        """The operand's value over the whole rectangle, viewed as ``dtype``."""
        if isinstance(operand, (ptx.Imm, ptx.FloatImm)):
            name = "F" + self.value(operand, dtype)[1:]
            self.source.bindings[name] = f"bind.full({'K' + name[1:]})"
            return name
        before, self.axes = self.axes, 0
        text = self.value(operand, dtype)
        axes, self.axes = self.axes, before | self.axes
        return self._spread(text, dtype, axes)

    def _spread(self, text: str, dtype: str, axes: int) -> str:
        """A value that varies along ``axes`` only, over the whole rectangle."""
        if axes == EVERY_LANE:
            return text
        if dtype == "b1":
            self.source.bindings["Z_b1"] = "bind.zeros(b1)"
            return self.let(f"logical_or({text}, Z_b1)")
        unsigned = f"u{dtype[1]}"
        self.source.bindings[f"Z_{unsigned}"] = f"bind.zeros({unsigned})"
        raw = text if dtype == unsigned else f"{text}.view({unsigned})"
        spread = self.let(f"bitwise_or({raw}, Z_{unsigned})")
        return spread if dtype == unsigned else self.let(f"{spread}.view({dtype})")

    def _effect_sources(self, decoded: Decoded) -> list[str]:
        dtypes = decoded.source_dtypes or [None] * len(decoded.sources)
        return [
            self._effect_source(operand, None if dtype is None else _code(dtype))
            for operand, dtype in zip(decoded.sources, dtypes, strict=True)
        ]

    def _effect_source(self, operand: ptx.Operand, dtype: str | None) -> str:
        if isinstance(operand, ptx.Sink):
            return "None"
        if isinstance(operand, ptx.Vector):
            items = [self._effect_source(item, dtype) for item in operand.items]
            return f"({', '.join(items)},)"
        if isinstance(operand, ptx.Pair):
            parts = (operand.first, operand.second)
            return f"({', '.join(self._effect_source(item, dtype) for item in parts)})"
        if isinstance(operand, ptx.Address):
            return self._address_source(operand)
        if isinstance(operand, ptx.TensorAddress):
            base = self._address_source(ptx.Address(operand.base, operand.offset))
            coords = [self._effect_source(item, dtype or "i4") for item in operand.coords]
            return f"({base}, ({', '.join(coords)},))"
        if isinstance(operand, ptx.Reg) and self.program.is_wide(operand.name):
            return "({}, {})".format(*self.wide(operand))
        return self._expand(operand, dtype or self._natural_dtype(operand))

    def _address_source(self, operand: ptx.Address) -> str:
        before, self.axes = self.axes, 0
        text = self.address(operand)
        axes, self.axes = self.axes, before | self.axes
        return self._spread(text, self._address_dtype(operand), axes)

    def _natural_dtype(self, operand: ptx.Operand) -> str:
        if isinstance(operand, ptx.Reg):
            return self.program.location(operand.name).dtype
        if isinstance(operand, ptx.Negated):
            return "b1"
        if isinstance(operand, ptx.FloatImm):
            return f"u{operand.width // 8}"
        if isinstance(operand, ptx.Symbol):
            return self.program.symbol_dtype(operand.name)
        if isinstance(operand, ptx.Special):
            return _special_dtype(operand.name)
        return "u4" if _fits(operand, 32) else "u8"

    def _call(self, decoded: Decoded, arguments: str) -> None:
        """The statement that runs an effect, with its destinations."""
        number = self.instr.index
        names = self.program.flat_destinations(decoded)
        dtypes = self._dest_dtypes(decoded, names)
        targets = tuple(self._new() for _ in names)
        if self.guard is None:
            call = f"run_effect(E{number}, ctx, I{number}, mask{arguments})"
        else:
            olds = []
            for register, dtype in zip(names, dtypes, strict=True):
                olds.append("None" if register is None else self._view(self._read(register), dtype))
            old = f"({', '.join(olds)}{',' if olds else ''})"
            call = f"run_guarded(E{number}, ctx, I{number}, {self.guard}, mask, {old}{arguments})"
        self.source.statements.append(Statement(call, targets, effect=True))
        for register, name, dtype in zip(names, targets, dtypes, strict=True):
            if register is not None:
                self.values[register] = Value(name, dtype, EVERY_LANE)
                self.changed[register] = None

    def _dest_dtypes(self, decoded: Decoded, names: list[str | None]) -> list[str]:
        if decoded.dest_dtypes is not None and len(names) == len(decoded.dests):
            return [_code(dtype) for dtype in decoded.dest_dtypes]
        return ["u4" if n is None else self.program.location(n).dtype for n in names]


def halves(register: str) -> tuple[str, str]:
    """The two 64-bit names under which a ``.b128`` register is tracked."""
    return f"{register}.low", f"{register}.high"


def _code(dtype: Any) -> str:
    """The two-letter code of a numpy dtype given in any form."""
    found = np.dtype(dtype)
    return "b1" if found.kind == "b" else f"{found.kind}{found.itemsize}"


def _special_dtype(name: str) -> str:
    return "b1" if name == "%is_explicit_cluster" else CLOCKS.get(name, "u4")


def _fits(operand: ptx.Operand, width: int) -> bool:
    return isinstance(operand, ptx.Imm) and -(1 << (width - 1)) <= operand.value < (1 << width)


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _float_bits(operand: ptx.FloatImm, dtype: str) -> int:
    """Bit pattern of a float literal in the width of ``dtype``; decimal literals are doubles."""
    width = 8 * int(dtype[1])
    if operand.width == width:
        return operand.bits
    if width == 32:
        return int(np.float32(operand.value).view(np.uint32))
    if width == 64:
        return int(np.float64(operand.value).view(np.uint64))
    raise InvalidArgumentError("a float literal cannot be 16 bits wide", got=str(operand))
