"""Variable declarations (PTX ISA section 5.4)."""

from __future__ import annotations

import re
import struct

from cute_fa.ptx.module import Variable
from cute_fa.ptx.operand_parser import OperandError, parse_number
from cute_fa.ptx.operands import FloatImm, Imm, Symbol
from cute_fa.ptx.syntax import Source

_HEAD = re.compile(
    r"""\.(?P<space>shared|local|global|const|param)(?:::cta)?
    (?:\s*\.attribute\s*\([^)]*\))?
    (?:\s*\.align\s+(?P<align>\d+))?
    (?:\s*\.(?P<vector>v[248]))?
    \s*\.(?P<type>[a-z]+(?P<bits>\d+))\s+""",
    re.X,
)
_NAME = re.compile(r"\s*([%$A-Za-z_][\w$]*)((?:\s*\[\s*\d*\s*\])*)\s*")
_DIMENSION = re.compile(r"\[\s*(\d*)\s*\]")
_VALUE = re.compile(r"\s*([^\s,{}]+)\s*")


ALIGNMENTS = "a power of two"


def is_alignment(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def declare_variables(
    source: Source, start: int, stop: int, *, is_extern: bool = False
) -> list[Variable]:
    """Every variable of the declaration ``source.code[start:stop]`` (its ``;`` left off).

    Raises:
        PtxSyntaxError: the declaration is not well-formed.
    """
    code = source.code
    head = _HEAD.match(code, start, stop)
    if head is None:
        raise source.error(
            start, "declaration is not well-formed", expected=".space .align n .type name[n]"
        )
    lanes = int(head.group("vector")[1:]) if head.group("vector") else 1
    element = int(head.group("bits")) // 8 * lanes
    align = int(head.group("align") or element)
    if not is_alignment(align):
        where = head.start("align" if head.group("align") else "type")
        raise source.error(where, f"{align} is no alignment", expected=ALIGNMENTS)
    variables: list[Variable] = []
    at = head.end()
    while True:
        found = _NAME.match(code, at, stop)
        if found is None:
            raise source.error(at, "a variable's name is missing", expected="name or name[n]")
        name, dimensions = found.groups()
        count = 1
        for dimension in _DIMENSION.findall(dimensions):
            count *= int(dimension) if dimension else 0
        init = None
        at = found.end()
        if at < stop and code[at] == "=":
            init, at = _initialiser(source, at + 1, stop)
            if not count:
                count = len(init)
        variables.append(
            Variable(
                name=name,
                space=head.group("space"),
                type=f".{head.group('type')}",
                nbytes=element * count,
                align=align,
                init=init,
                is_extern=is_extern,
            )
        )
        if at >= stop:
            return variables
        if code[at] != ",":
            raise source.error(at, "declaration is not well-formed", expected=", or ;")
        at += 1


def initial_bytes(variable: Variable) -> bytes:
    """``variable``'s initial contents, little-endian, the rest of it zero.

    Raises:
        ValueError: a value is an address, which only a loader knows.
    """
    width = int(variable.type.lstrip(".abcdefghijklmnopqrstuvwxyz")) // 8
    packed = bytearray()
    for value in variable.init or ():
        if isinstance(value, Symbol):
            raise ValueError(f"{variable.name} is initialised with the address of {value}")
        if isinstance(value, Imm):
            packed += (value.value % (1 << (8 * width))).to_bytes(width, "little")
        else:
            packed += struct.pack({4: "<f", 8: "<d"}[width], value.value)
    return bytes(packed.ljust(variable.nbytes, b"\0"))


def _initialiser(
    source: Source, at: int, stop: int
) -> tuple[tuple[Imm | FloatImm | Symbol, ...], int]:
    """The values at ``at``, nested braces flattened, and where they end."""
    values: list[Imm | FloatImm | Symbol] = []
    depth = 0
    while at < stop:
        character = source.code[at]
        if character.isspace():
            at += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            at += 1
            if depth == 0:
                break
        elif character == "," and depth:
            at += 1
        elif character == ",":
            break
        else:
            found = _VALUE.match(source.code, at, stop)
            if found is None:
                raise source.error(at, "initialiser is not well-formed")
            values.append(_value(source, found.start(1), found.group(1)))
            at = found.end()
    while at < stop and source.code[at].isspace():
        at += 1
    return tuple(values), at


def _value(source: Source, at: int, text: str) -> Imm | FloatImm | Symbol:
    if text[0].isdigit() or text[0] in "-.":
        try:
            return parse_number(text)
        except OperandError as error:
            raise source.error(at, error.what) from None
    name, _, offset = text.partition("+")
    return Symbol(name, int(offset, 0) if offset else 0)
