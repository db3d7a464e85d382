"""A parsed PTX module: kernels, their parameters, variables and instructions."""

from __future__ import annotations

from dataclasses import dataclass, field

from cute_fa.ptx.operands import FloatImm, Imm, Operand, Symbol


@dataclass(frozen=True)
class Param:
    """A kernel parameter; ``offset`` bytes into the block that the launch fills."""

    name: str
    nbytes: int
    align: int
    offset: int


@dataclass(frozen=True)
class Variable:
    """A variable in a state space.

    Attributes:
        space: ``shared``, ``local``, ``global``, ``const`` or ``param``.
        type: element type with its dot, e.g. ``.b8``.
        nbytes: size of the whole array; 0 for ``name[]``, whose size the launch gives.
        init: the initialiser's flattened values, or None.
        is_extern: declared with ``.extern``.
    """

    name: str
    space: str
    type: str
    nbytes: int
    align: int
    init: tuple[Imm | FloatImm | Symbol, ...] | None = None
    is_extern: bool = False


@dataclass(frozen=True)
class Guard:
    """``@%p`` or ``@!%p`` before an instruction."""

    reg: str
    negated: bool

    def __str__(self) -> str:
        return f"@{'!' if self.negated else ''}{self.reg}"


@dataclass(eq=False, slots=True)
class Instr:
    """One instruction; never changed once made (frozen would double the time to parse).

    Attributes:
        index: its place in ``Kernel.body``.
        opcode: every modifier included, e.g. ``ld.global.v4.b32``.
        parts: ``opcode`` split at its dots; ``kind::f16`` is one part.
        operands: in order of writing, destinations first where there are any.
        line: 1-based line of the PTX text where it starts.
        text: the instruction as written, on one line.
        loc: (file number, source line) of the last ``.loc``; ``Module.files`` names the file.
    """

    index: int
    opcode: str
    parts: tuple[str, ...]
    guard: Guard | None
    operands: tuple[Operand, ...]
    line: int
    text: str
    loc: tuple[int, int] | None = None

    @property
    def op(self) -> str:
        """The instruction's name without modifiers."""
        return self.parts[0]

    def __repr__(self) -> str:
        return f"<Instr {self.index} line {self.line}: {self.text}>"


@dataclass(frozen=True, eq=False)
class Kernel:
    """One ``.entry``.

    Attributes:
        params: in order; ``param_bytes`` is the end of the last.
        reqntid: threads per block that the launch must have, as (x, y, z).
        maxntid: most threads per block, as (x, y, z).
        directives: every performance directive by name with its numbers; strings for pragmas.
        registers: type of each register that the body names, e.g. ``{"%r1": ".b32"}``.
        body: never empty, and control never runs off its end (a ``ret`` is added if it could).
        labels: index into ``body`` for each label; labels of scopes read ``LOOP@3``.
        branch_targets: the labels of each ``.branchtargets`` table, by the table's own label.
        shared_vars, local_vars, param_vars: variables declared inside the kernel;
            ``param_vars`` are arguments of calls that the kernel makes.
        line: 1-based line of its ``.entry``.
    """

    name: str
    params: tuple[Param, ...]
    param_bytes: int
    directives: dict[str, tuple[int, ...] | tuple[str, ...]]
    registers: dict[str, str]
    body: tuple[Instr, ...]
    labels: dict[str, int]
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared_vars: dict[str, Variable] = field(default_factory=dict)
    local_vars: dict[str, Variable] = field(default_factory=dict)
    param_vars: dict[str, Variable] = field(default_factory=dict)
    line: int = 1

    @property
    def reqntid(self) -> tuple[int, int, int] | None:
        """Threads of a CTA in x, y, z, exactly (``.reqntid``)."""
        return self._dims("reqntid")

    @property
    def maxntid(self) -> tuple[int, int, int] | None:
        """The most threads of a CTA in x, y, z (``.maxntid``)."""
        return self._dims("maxntid")

    @property
    def reqnctapercluster(self) -> tuple[int, int, int] | None:
        """Blocks per cluster that the launch must have."""
        return self._dims("reqnctapercluster")

    @property
    def minnctapersm(self) -> int | None:
        """Blocks that the compiler was asked to make room for on one SM."""
        return self._number("minnctapersm")

    @property
    def maxnreg(self) -> int | None:
        """The most registers of a thread (``.maxnreg``)."""
        return self._number("maxnreg")

    def param(self, name: str) -> Param:
        """The parameter called ``name``; KeyError if there is none."""
        for param in self.params:
            if param.name == name:
                return param
        raise KeyError(name)

    def _number(self, directive: str) -> int | None:
        values = self.directives.get(directive)
        return int(values[0]) if values else None

    def _dims(self, directive: str) -> tuple[int, int, int] | None:
        values = self.directives.get(directive)
        if not values:
            return None
        x, y, z = (*(int(v) for v in values), 1, 1)[:3]
        return x, y, z


@dataclass(frozen=True, eq=False)
class Module:
    """One PTX file.

    Attributes:
        text: what was parsed.
        version: of the PTX ISA, e.g. (8, 8).
        target: the first word of ``.target``, e.g. ``sm_90a``.
        target_options: the other words of ``.target``, e.g. ``debug``.
        kernels: by name, in order of appearance.
        functions: names of ``.func`` declarations and definitions; their bodies are not kept.
        shared_vars: module-scope ``.shared`` variables, ``.extern`` ones among them.
        global_vars: module-scope ``.global`` and ``.const`` variables.
        files: path of each file number that ``.loc`` lines use.
    """

    text: str
    version: tuple[int, int]
    target: str
    target_options: tuple[str, ...]
    kernels: dict[str, Kernel]
    functions: tuple[str, ...]
    shared_vars: dict[str, Variable]
    global_vars: dict[str, Variable]
    files: dict[int, str]

    def source_of(self, instr: Instr) -> str | None:
        """``path:line`` of the source that ``instr`` was compiled from, if the PTX says it."""
        if instr.loc is None:
            return None
        file, line = instr.loc
        return f"{self.files.get(file, f'file {file}')}:{line}"
