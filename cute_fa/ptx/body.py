"""A kernel's body: statements, scopes, labels and instructions (PTX ISA section 4.3).

Statements end at ``;``, not at line ends. A ``{`` where a statement may start opens a scope;
anywhere else it opens a vector operand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from cute_fa.ptx.declarations import declare_variables
from cute_fa.ptx.module import Guard, Instr, Variable
from cute_fa.ptx.opcodes import CARRY, JUMPS, carries_in, carries_out, falls_through
from cute_fa.ptx.operand_parser import MISSING, OperandError, parse_operands
from cute_fa.ptx.operands import Operand, Symbol
from cute_fa.ptx.scope import Scope
from cute_fa.ptx.syntax import Source

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<label>[$%A-Za-z_][\w$]*)\s*:(?!:)
    | (?P<open>\{)
    | (?P<close>\})
    | (?P<line>\.(?:loc|file)\b[^\n]*)
    | (?P<pragma>\.pragma\s+"[^"]*"(?:\s*,\s*"[^"]*")*\s*;)
    | (?P<statement>[^;{}]*(?:\{[^{};]*\}[^;{}]*)*);
    )""",
    re.X,
)
_INSTRUCTION = re.compile(
    r"(?:@\s*(!?)\s*([%$\w]+)\s+)?([a-z_]\w*(?:\s*\.\w+(?:::\w+)*)*)(?=[\s\[{(]|\Z)", re.S
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_REG = re.compile(r"\.reg\s*\.(?:v([248])\s*\.)?([a-z]+\d*(?:x\d+)?)\s+", re.S)
_REG_NAME = re.compile(r"([%$A-Za-z_][\w$]*)\s*(?:<\s*(\d+)\s*>)?\Z")
_TABLE = re.compile(r"\.branchtargets\s+(.*)\Z", re.S)
_NOTHING_BETWEEN = re.compile(r"[,\[{(]\s*(?=[,\]})]|\Z)|\s+(?=,)")
_PRAGMA_TEXT = re.compile(r'"([^"]*)"')
# Members of a vector family are declared one by one, so a typing error must not fill the memory.
_MAX_VECTORS = 1 << 16
_VARIABLE_SPACES = ("shared", "local", "param", "global", "const")


@dataclass(eq=False)
class Body:
    """What parse_body found; see Kernel for the fields."""

    instructions: tuple[Instr, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    pragmas: list[str] = field(default_factory=list)


def parse_body(source: Source, start: int) -> tuple[Body, int]:
    """The kernel body after the ``{`` before ``start``, and the offset past its ``}``.

    Raises:
        PtxSyntaxError: a statement is not well-formed, or a name is not declared.
    """
    parser = _BodyParser(source)
    end = parser.run(start)
    return parser.body, end


class _BodyParser:
    """State of one pass over one kernel body."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.body = Body()
        self.scope = Scope(0, None, registers=self.body.registers)
        self.scopes = 1
        self.instructions: list[Instr] = []
        # (index, scope, offset) of instructions that name labels: a label may stand later.
        self.jumps: list[tuple[int, Scope, int]] = []
        self.tables: list[tuple[str, list[str], Scope, int]] = []
        self.last_label: str | None = None
        self.loc: tuple[int, int] | None = None
        self.opcodes: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.guards: dict[tuple[str, str], Guard] = {}

    def run(self, start: int) -> int:
        """Read statements until the body's closing brace; return the offset past it."""
        source = self.source
        match = _TOKEN.match
        code = source.code
        at = start
        line = source.line_of(start)
        counted = start
        while True:
            token = match(code, at)
            if token is None:
                raise self._unreadable(at)
            at = token.end()
            kind = token.lastgroup
            if kind == "statement":
                begin = token.start("statement")
                # A leading \s* never backtracks into the statement, so it starts at ink.
                line += code.count("\n", counted, begin)
                counted = begin
                text = token.group("statement")
                if not text:
                    continue
                if text[0] == ".":
                    self._directive(text, begin)
                else:
                    self._instruction(text, begin, line)
            elif kind == "line":
                loc = _LOC.match(token.group("line"))
                if loc is not None:
                    self.loc = (int(loc.group(1)), int(loc.group(2)))
            elif kind == "label":
                self._label(token.group("label"), token.start("label"))
            elif kind == "open":
                self.scope = self.scope.inner(self.scopes)
                self.scopes += 1
            elif kind == "close":
                if self.scope.parent is None:
                    self._finish(source.line_of(token.start("close")))
                    return at
                self.scope = self.scope.parent
            else:
                self.body.pragmas += _PRAGMA_TEXT.findall(token.group("pragma"))

    def _unreadable(self, at: int) -> Exception:
        code = self.source.code
        rest = code[at:]
        where = at + len(rest) - len(rest.lstrip())
        if not rest.strip():
            return self.source.error(at, "the kernel's body is never closed", expected="}")
        return self.source.error(where, "this statement does not end", expected=";")

    def _label(self, name: str, at: int) -> None:
        if name in self.scope.labels:
            raise self.source.error(at, f"label {name} is defined twice in its scope")
        unique = self.scope.labels[name] = self.scope.unique(name)
        self.body.labels[unique] = len(self.instructions)
        self.last_label = unique

    def _directive(self, text: str, at: int) -> None:
        word = re.match(r"\.(\w+)", text)
        name = word.group(1) if word else ""
        if name == "reg":
            self._registers(text, at)
        elif name in _VARIABLE_SPACES:
            self._variables(at, at + len(text))
        elif name == "extern":
            skipped = len(text) - len(text[len(".extern") :].lstrip())
            self._variables(at + skipped, at + len(text), is_extern=True)
        elif name == "branchtargets":
            self._branch_targets(text, at)
        elif name not in ("callprototype", "calltargets"):
            raise self.source.error(
                at,
                f"unknown directive .{name}",
                expected=".reg, .local, .shared, .param, .pragma or .branchtargets",
            )

    def _branch_targets(self, text: str, at: int) -> None:
        table = _TABLE.match(text)
        if table is None or self.last_label is None:
            raise self.source.error(
                at, ".branchtargets is not well-formed", expected="ts: .branchtargets L1, L2;"
            )
        names = [name.strip() for name in table.group(1).split(",")]
        # The label names the table, not a place in the code.
        del self.body.labels[self.last_label]
        self.tables.append((self.last_label, names, self.scope, at))

    def _registers(self, text: str, at: int) -> None:
        head = _REG.match(text)
        if head is None:
            raise self.source.error(at, ".reg is not well-formed", expected=".reg .b32 %r<8>")
        scope = self.scope
        lanes, register_type = head.group(1), f".{head.group(2)}"
        scope.operands.clear()
        where = at + head.end()
        for piece in text[head.end() :].split(","):
            found = _REG_NAME.match(piece.strip())
            if found is None:
                raise self.source.error(where, "register name is not well-formed")
            name, count = found.groups()
            if name in scope.families if count else name in scope.names:
                raise self.source.error(where, f"register {name} is declared twice in its scope")
            if lanes:
                if count and int(count) > _MAX_VECTORS:
                    raise self.source.error(
                        where, f"more than {_MAX_VECTORS} vector registers of one name"
                    )
                copies = [f"{name}{i}" for i in range(int(count))] if count else [name]
                for copy in copies:
                    scope.declare_vector(copy, int(lanes), register_type)
            elif count:
                scope.families[name] = (register_type, int(count))
            else:
                unique = scope.names[name] = scope.unique(name)
                self.body.registers[unique] = register_type
            where += len(piece) + 1

    def _variables(self, start: int, stop: int, *, is_extern: bool = False) -> None:
        scope = self.scope
        scope.operands.clear()
        for variable in declare_variables(self.source, start, stop, is_extern=is_extern):
            unique = scope.names[variable.name] = scope.unique(variable.name)
            self.body.variables.append(replace(variable, name=unique))

    def _instruction(self, text: str, at: int, line: int) -> None:
        found = _INSTRUCTION.match(text)
        if found is None:
            raise self._not_an_instruction(text, at)
        negated, guard_name, written = found.groups()
        opcode, parts = self.opcodes.get(written) or self._opcode(written)
        guard = self._guard(negated, guard_name, at) if guard_name else None
        scope = self.scope
        rest = text[found.end() :].strip()
        operands: list[Operand] = []
        if rest:
            try:
                operands = parse_operands(rest, scope)
            except OperandError as error:
                raise self._operand_error(error, text, at, found.end()) from None
        instructions = self.instructions
        if parts[0] in JUMPS:
            self.jumps.append((len(instructions), scope, at))
        instructions.append(
            Instr(
                len(instructions),
                opcode,
                parts,
                guard,
                tuple(operands),
                line,
                " ".join(text.split()),
                self.loc,
            )
        )

    def _opcode(self, written: str) -> tuple[str, tuple[str, ...]]:
        opcode = "".join(written.split())
        parts = tuple(opcode.split("."))
        if carries_in(parts) or carries_out(parts):
            self.body.registers[CARRY] = ".pred"
        self.opcodes[written] = opcode, parts
        return opcode, parts

    def _guard(self, negated: str, name: str, at: int) -> Guard:
        unique = self.scope.resolve(name)
        if unique is None or unique not in self.body.registers:
            where = self.source.code.find(name, at)
            raise self.source.error(where, f"predicate {name} is not declared")
        if self.body.registers[unique] != ".pred":
            where = self.source.code.find(name, at)
            raise self.source.error(
                where, f"{name} is no predicate", expected="a register declared .pred"
            )
        guard = self.guards.get((negated, unique))
        if guard is None:
            guard = self.guards[negated, unique] = Guard(unique, bool(negated))
        return guard

    def _not_an_instruction(self, text: str, at: int) -> Exception:
        if text[0] == "@" and re.fullmatch(r"@\s*!?\s*[%$\w]+\s*", text):
            return self.source.error(at, "a guard without an instruction")
        # An unfinished statement swallows the next ones: point at where the ink starts.
        return self.source.error(
            at, "this is no instruction", expected="[@p] opcode.modifiers operands;"
        )

    def _operand_error(
        self, error: OperandError, text: str, at: int, operands_at: int
    ) -> Exception:
        if error.fragment == MISSING:
            pattern = _NOTHING_BETWEEN
        else:
            pattern = re.compile(rf"(?<![\w%$.]){re.escape(error.fragment)}(?![\w$])")
        found = pattern.search(text, operands_at)
        where = found.end() - len(error.fragment) if found else operands_at
        broken = text.find("\n", operands_at)
        fix = None
        if broken >= 0 and re.match(r"\s*(?:@|[a-z]\w*[.\s])", text[broken:]):
            fix = "if the instruction ends with its line, end it with ;"
        return self.source.error(
            at + where,
            error.what,
            expected=error.expected,
            fix=fix,
        )

    def _finish(self, closing_line: int) -> None:
        """Resolve labels, and make sure that control cannot run off the end."""
        body = self.body
        instructions = self.instructions
        for label, names, scope, at in self.tables:
            body.branch_targets[label] = tuple(self._target(name, scope, at) for name in names)
        for index, scope, at in self.jumps:
            instr = instructions[index]
            operands = tuple(
                Symbol(self._target(operand.name, scope, at))
                if isinstance(operand, Symbol)
                else operand
                for operand in instr.operands
            )
            if not any(isinstance(operand, Symbol) for operand in operands):
                raise self.source.error(at, f"{instr.opcode} names no label")
            if operands != instr.operands:
                instructions[index] = replace(instr, operands=operands)
        runs_off = not instructions or falls_through(instructions[-1])
        if runs_off or any(index == len(instructions) for index in body.labels.values()):
            instructions.append(
                Instr(len(instructions), "ret", ("ret",), None, (), closing_line, "ret", self.loc)
            )
        body.instructions = tuple(instructions)

    def _target(self, name: str, scope: Scope, at: int) -> str:
        unique = scope.label(name)
        if unique is None:
            where = self.source.code.find(name, at)
            raise self.source.error(where, f"label {name} is not defined")
        return unique
