"""PTX text to a Module (PTX ISA sections 4, 5 and 11).

Any well-formed statement is accepted, whatever its opcode: what an instruction means, and
whether it can be run, is for the reader of the module to say.
"""

from __future__ import annotations

import re

from cute_fa.ptx.body import parse_body
from cute_fa.ptx.declarations import ALIGNMENTS, declare_variables, is_alignment
from cute_fa.ptx.module import Kernel, Module, Param, Variable
from cute_fa.ptx.syntax import Source

_SPACE = re.compile(r"\s*")
_DIRECTIVE = re.compile(r"\.(\w+)")
_VERSION = re.compile(r"\.version\s+(\d+)\.(\d+)")
_TARGET = re.compile(r"\.target\s+(\w+(?:\s*,\s*\w+)*)")
_ADDRESS_SIZE = re.compile(r"\.address_size\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"((?:[^"\\\n]|\\.)*)"[^\n]*')
_LINKAGE = re.compile(r"\s*\.(?:visible|extern|weak|common)\b")
_STATEMENT_END = re.compile(r"[;{]")
_ENTRY = re.compile(r"\.entry\s+([%$\w]+)\s*(\(?)")
_FUNC_NAME = re.compile(
    r"\.func\s*(?:\.attribute\s*\([^)]*\)\s*)?(?:\([^)]*\)\s*)?(?:\.noreturn\s+)?([%$\w]+)"
)
_PARAM = re.compile(
    r"""\.param\s+
    (?:\.align\s+(?P<align>\d+)\s+)?
    \.(?P<type>[a-z]+\d+|pred|texref|samplerref|surfref)\s+
    (?:\.ptr(?:\s+\.(?:const|global|local|shared))?(?:\s+\.align\s+\d+)?\s+)?
    (?P<name>[%$\w]+)\s*(?:\[\s*(?P<count>\d*)\s*\])?\Z""",
    re.X,
)
_TUNING = re.compile(r"\s*\.(\w+)((?:\s+\d+(?:\s*,\s*\d+)*)|(?:\s+\"[^\"]*\"\s*;?))?")
_VARIABLE_SPACES = ("shared", "global", "const")


def parse(text: str) -> Module:
    """Parse a PTX module.

    Args:
        text: PTX of any target and of ISA 6 or later, 64-bit addresses.

    Raises:
        PtxSyntaxError: with the line and a caret at the place.
    """
    return _ModuleParser(Source(text)).run()


class _ModuleParser:
    """State of one pass over the module level."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.code = source.code
        self.version: tuple[int, int] | None = None
        self.target: list[str] = []
        self.kernels: dict[str, Kernel] = {}
        self.functions: dict[str, None] = {}
        self.shared_vars: dict[str, Variable] = {}
        self.global_vars: dict[str, Variable] = {}
        self.files: dict[int, str] = {}

    def run(self) -> Module:
        at = self._skip_space(0)
        while at < len(self.code):
            at = self._skip_space(self._statement(at))
        if self.version is None:
            raise self.source.error(0, "no .version directive", expected=".version 8.8")
        if not self.target:
            raise self.source.error(0, "no .target directive", expected=".target sm_90a")
        return Module(
            text=self.source.text,
            version=self.version,
            target=self.target[0],
            target_options=tuple(self.target[1:]),
            kernels=self.kernels,
            functions=tuple(self.functions),
            shared_vars=self.shared_vars,
            global_vars=self.global_vars,
            files=self.files,
        )

    def _skip_space(self, at: int) -> int:
        found = _SPACE.match(self.code, at)
        return found.end() if found else at

    def _statement(self, start: int) -> int:
        """Read the module-level statement at ``start``; return where it ends."""
        if self.code[start] == ";":
            return start + 1
        at = start
        is_extern = False
        while linkage := _LINKAGE.match(self.code, at):
            is_extern = is_extern or ".extern" in linkage.group()
            at = self._skip_space(linkage.end())
        directive = _DIRECTIVE.match(self.code, at)
        if directive is None:
            raise self.source.error(at, "no directive here", expected="a module-level directive")
        name = directive.group(1)
        if name == "entry":
            return self._entry(at)
        if name == "func":
            return self._function(at)
        if name in _VARIABLE_SPACES:
            return self._variables(at, name, is_extern)
        if name in ("version", "target", "address_size", "file"):
            return self._header(at, name)
        if name == "section":
            return self._block_end(self._find(at, "{"))
        if name in ("pragma", "alias"):
            return self._find(at, ";") + 1
        raise self.source.error(
            at,
            f"unknown module-level directive .{name}",
            expected=".entry, .func, .global, .shared, .const, .file or .section",
        )

    def _header(self, at: int, name: str) -> int:
        pattern = {
            "version": _VERSION,
            "target": _TARGET,
            "address_size": _ADDRESS_SIZE,
            "file": _FILE,
        }[name]
        found = pattern.match(self.code, at)
        if found is None:
            raise self.source.error(at, f".{name} directive is not well-formed")
        if name == "version":
            self.version = (int(found.group(1)), int(found.group(2)))
        elif name == "target":
            self.target = [word.strip() for word in found.group(1).split(",")]
        elif name == "file":
            self.files[int(found.group(1))] = found.group(2)
        elif found.group(1) != "64":
            raise self.source.error(
                found.start(1), "only 64-bit addresses are supported", expected=".address_size 64"
            )
        return found.end()

    def _variables(self, at: int, space: str, is_extern: bool) -> int:
        """Read one declaration; initialisers may hold nested braces."""
        end = at
        while True:
            found = _STATEMENT_END.search(self.code, end)
            if found is None:
                raise self.source.error(at, "declaration does not end", expected=";")
            if found.group() == ";":
                break
            end = self._block_end(found.start())
        variables = declare_variables(self.source, at, found.start(), is_extern=is_extern)
        into = self.shared_vars if space == "shared" else self.global_vars
        into.update((variable.name, variable) for variable in variables)
        return found.end()

    def _function(self, at: int) -> int:
        """Note a ``.func``'s name and step over its body.

        The parameter list may contain ``;``-free directives only, so the first ``;`` or ``{``
        tells a declaration from a definition.
        """
        found = _FUNC_NAME.match(self.code, at)
        if found is None:
            raise self.source.error(at, ".func is not well-formed", expected=".func name (…)")
        self.functions[found.group(1)] = None
        end = _STATEMENT_END.search(self.code, found.end())
        if end is None:
            raise self.source.error(at, ".func has no end", expected="; or { … }")
        return end.end() if end.group() == ";" else self._block_end(end.start())

    def _entry(self, at: int) -> int:
        header = _ENTRY.match(self.code, at)
        if header is None:
            raise self.source.error(at, ".entry has no name", expected=".entry name (…)")
        name = header.group(1)
        if name in self.kernels:
            raise self.source.error(header.start(1), f"kernel {name} is defined twice")
        params: tuple[Param, ...] = ()
        param_bytes = 0
        after = header.end()
        if header.group(2):
            close = self._find(after, ")")
            params, param_bytes = self._params(after, close)
            after = close + 1
        directives, after = self._tuning(after)
        if self.code[after : after + 1] == ";":
            return after + 1
        if self.code[after : after + 1] != "{":
            raise self.source.error(after, f"kernel {name} has no body", expected="{")
        body, end = parse_body(self.source, after + 1)
        if body.pragmas:
            directives["pragma"] = (*map(str, directives.get("pragma", ())), *body.pragmas)
        self.kernels[name] = Kernel(
            name=name,
            params=params,
            param_bytes=param_bytes,
            directives=directives,
            registers=body.registers,
            body=body.instructions,
            labels=body.labels,
            branch_targets=body.branch_targets,
            shared_vars={v.name: v for v in body.variables if v.space == "shared"},
            local_vars={v.name: v for v in body.variables if v.space == "local"},
            param_vars={v.name: v for v in body.variables if v.space == "param"},
            line=self.source.line_of(at),
        )
        for variable in body.variables:
            if variable.space in ("global", "const"):
                self.global_vars[variable.name] = variable
        return end

    def _params(self, start: int, stop: int) -> tuple[tuple[Param, ...], int]:
        params: list[Param] = []
        offset = 0
        at = start
        for piece in self.code[start:stop].split(","):
            text = piece.strip()
            where = at + len(piece) - len(piece.lstrip())
            at += len(piece) + 1
            if not text:
                if stop > start and self.code[start:stop].strip():
                    raise self.source.error(where, "a parameter is missing")
                continue
            found = _PARAM.match(text)
            if found is None:
                raise self.source.error(
                    where, "parameter is not well-formed", expected=".param .b64 name"
                )
            element = _type_bytes(found.group("type"))
            count = found.group("count")
            align = int(found.group("align") or element)
            if not is_alignment(align):
                raise self.source.error(where, f"{align} is no alignment", expected=ALIGNMENTS)
            offset = -(-offset // align) * align
            nbytes = element * (int(count) if count else 1)
            params.append(Param(found.group("name"), nbytes, align, offset))
            offset += nbytes
        return tuple(params), offset

    def _tuning(self, at: int) -> tuple[dict[str, tuple[int, ...] | tuple[str, ...]], int]:
        """The directives between an entry's parameters and its body."""
        directives: dict[str, tuple[int, ...] | tuple[str, ...]] = {}
        while found := _TUNING.match(self.code, at):
            name, rest = found.group(1), (found.group(2) or "").strip()
            if rest.startswith('"'):
                earlier = tuple(str(word) for word in directives.get(name, ()))
                directives[name] = (*earlier, rest.rstrip("; ").strip('"'))
            else:
                directives[name] = tuple(int(word) for word in rest.split(",")) if rest else ()
            at = found.end()
        return directives, self._skip_space(at)

    def _find(self, start: int, mark: str) -> int:
        found = self.code.find(mark, start)
        if found < 0:
            raise self.source.error(start, f"no {mark} follows", expected=mark)
        return found

    def _block_end(self, opening: int) -> int:
        """Where the block that opens at ``opening`` ends, past its closing brace."""
        depth = 0
        for brace in re.finditer(r"[{}]", self.code[opening:]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return opening + brace.end()
        raise self.source.error(opening, "this brace is never closed", expected="}")


def _type_bytes(name: str) -> int:
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) // 8 if digits else 8
