"""Operand text to operand values (PTX ISA sections 4.5, 5.4, 6 and 9.7)."""

from __future__ import annotations

import re
import struct

from cute_fa.ptx.operands import (
    Address,
    FloatImm,
    Imm,
    Negated,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)
from cute_fa.ptx.scope import Scope

_NAME = re.compile(r"[%$A-Za-z_][\w$]*(?:\.[A-Za-z]\w*)?\Z")
_SYMBOL_OFFSET = re.compile(r"([$A-Za-z_][\w$]*)\s*([+-])\s*(\w+)\Z")
_ADDRESS = re.compile(
    r"""\[\s*(?P<base>-?[%$\w]+(?:\.[xyzw])?)
    \s*(?:(?P<sign>[+-])\s*(?P<offset>-?\s*\w+)\s*)?
    (?:,\s*(?P<coords>.+?)\s*)?\]\Z""",
    re.X | re.S,
)
# What compilers write nearly always: [%rd4], [%rd4+16], [%rd4+-16].
_PLAIN_ADDRESS = re.compile(r"\[(%\w+)(?:\+(-?(?:0|[1-9]\d*)))?\]\Z")
_INTEGER = re.compile(r"(-?)\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?\Z")
_FLOAT_BITS = re.compile(r"(-?)\s*0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))\Z")
_DECIMAL = re.compile(
    r"-?\s*(?:\d+\.\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)\Z"
)
_PIECE = re.compile(
    r"""\s*( (?: [^,\[\]{}()]
               | \[ [^\[\]{}]* (?: \{[^{}]*\} [^\[\]{}]* )? \]
               | \{ [^{}]* \} | \( [^()]* \) )+ )(,|\Z)""",
    re.X,
)
# Operands without brackets, a blank after each comma: nothing to strip.
_PLAIN = re.compile(r"[^\s,\[{(]*(?:, [^\s,\[{(]+)*\Z")
_BRACKETS = re.compile(r"[\[{(]")

# PTX ISA section 10.
_SPECIAL = re.compile(
    r"""%(?: (?:n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)(?:\.[xyzw])?
      | laneid | warpid | nwarpid | smid | nsmid | gridid | is_explicit_cluster
      | cluster_ctarank | cluster_nctarank | lanemask_(?:eq|le|lt|ge|gt)
      | clock | clock_hi | clock64 | pm\d(?:_64)? | envreg\d+ | globaltimer(?:_lo|_hi)?
      | reserved_smem_offset_\w+ | total_smem_size | aggr_smem_size | dynamic_smem_size
      | current_graph_exec )\Z""",
    re.X,
)
_WARP_SZ = 32

# The fragment of an OperandError where nothing stands at all.
MISSING = ""


class OperandError(Exception):
    """``fragment`` of an operand is wrong; the parser turns this into a PtxSyntaxError."""

    def __init__(self, fragment: str, what: str, expected: str | None = None) -> None:
        super().__init__(what)
        self.fragment = fragment
        self.what = what
        self.expected = expected


def parse_operands(text: str, scope: Scope) -> list[Operand]:
    """The operands of ``text``, split at its outermost commas.

    Raises:
        OperandError: a piece is no operand, or names a register that is not declared.
    """
    known = scope.operands
    operands = []
    for piece in text.split(", ") if _PLAIN.match(text) else _split(text):
        operand = known.get(piece)
        if operand is None:
            operand = known[piece] = parse_operand(piece.strip(), scope)
        operands.append(operand)
    return operands


def _split(text: str) -> list[str]:
    if not _BRACKETS.search(text):
        return text.split(",")
    pieces = []
    at = 0
    while True:
        found = _PIECE.match(text, at)
        if found is None:
            raise OperandError(text[at:].strip() or text, "operands are not well-formed")
        pieces.append(found.group(1))
        at = found.end()
        if found.group(2) != ",":
            return pieces


def parse_operand(text: str, scope: Scope) -> Operand:
    """One operand; see parse_operands."""
    if not text:
        raise OperandError(MISSING, "an operand is missing")
    first = text[0]
    if first == "%":
        unique = scope.resolve(text)
        if unique in scope.registers:
            return Reg(unique)
    elif first == "[":
        return _address(text, scope)
    elif first in "{(":
        closing = "}" if first == "{" else ")"
        if text[-1] != closing:
            raise OperandError(text, "operand is not well-formed", f"{first}…{closing}")
        inner = text[1:-1].strip()
        return Vector(tuple(parse_operands(inner, scope)) if inner else ())
    if "|" in text:
        halves = [half.strip() for half in text.split("|")]
        if len(halves) != 2:
            raise OperandError(text, "more than two destinations joined by |")
        return Pair(parse_operand(halves[0], scope), parse_operand(halves[1], scope))
    if first == "!":
        inverted = parse_operand(text[1:].lstrip(), scope)
        if not isinstance(inverted, Reg):
            raise OperandError(text, "only a predicate register can be negated", "!%p")
        return Negated(inverted)
    if first.isdigit() or first in "-.":
        return _number(text)
    return _name(text, scope)


def parse_number(text: str) -> Imm | FloatImm:
    """An integer or floating-point literal."""
    return _number(text)


def _name(text: str, scope: Scope) -> Operand:
    unique = scope.resolve(text)
    if unique is not None:
        if unique in scope.registers:
            return Reg(unique)
        return scope.vectors.get(unique) or Symbol(unique)
    if text == "_":
        return Sink()
    if text == "WARP_SZ":
        return Imm(_WARP_SZ)
    if text[0] == "%":
        if _SPECIAL.match(text):
            return Special(text)
        stem, _, part = text.partition(".")
        if part and scope.resolve(stem):
            raise OperandError(text, f"{stem} has no component .{part}", "a register")
        if _NAME.match(text):
            raise OperandError(text, f"register {text} is not declared")
        raise OperandError(text, "operand is not well-formed")
    if _NAME.match(text) and "." not in text:
        return Symbol(text)
    displaced = _SYMBOL_OFFSET.match(text)
    if displaced is None:
        raise OperandError(text, "operand is not well-formed")
    name, sign, offset = displaced.groups()
    base = _name(name, scope)
    if not isinstance(base, Symbol):
        raise OperandError(text, "an offset can be added to a symbol only, or inside [ ]")
    value = _integer(offset)
    return Symbol(base.name, -value if sign == "-" else value)


def _address(text: str, scope: Scope) -> Operand:
    plain = _PLAIN_ADDRESS.match(text)
    if plain is not None:
        name, offset = plain.groups()
        known = scope.operands
        register = known.get(name)
        if register is None:
            register = known[name] = parse_operand(name, scope)
        if isinstance(register, Reg):
            return Address(register, int(offset) if offset else 0)
    found = _ADDRESS.match(text)
    if found is None:
        raise OperandError(text, "address is not well-formed", "[base], [base+offset]")
    base_text, sign, offset_text, coords_text = found.group("base", "sign", "offset", "coords")
    base = parse_operand(base_text, scope)
    if not isinstance(base, (Reg, Symbol, Imm, Special)):
        raise OperandError(text, "an address starts with a register, a symbol or an integer")
    offset = _integer(offset_text) if offset_text else 0
    if sign == "-":
        offset = -offset
    if coords_text is None:
        return Address(base, offset)
    coords = parse_operand(coords_text, scope)
    items = coords.items if isinstance(coords, Vector) else (coords,)
    return TensorAddress(base, items, offset)


def _integer(text: str) -> int:
    found = _INTEGER.match(text.replace(" ", ""))
    if found is None:
        raise OperandError(text, f"{text} is not an integer")
    sign, digits = found.groups()
    if digits[:2] in ("0x", "0X"):
        value = int(digits, 16)
    elif digits[:2] in ("0b", "0B"):
        value = int(digits, 2)
    elif digits[0] == "0" and len(digits) > 1:
        try:
            value = int(digits, 8)
        except ValueError:
            raise OperandError(text, f"{text} is not an octal integer") from None
    else:
        value = int(digits)
    return -value if sign else value


def _number(text: str) -> Imm | FloatImm:
    if _INTEGER.match(text):
        return Imm(_integer(text))
    hexadecimal = _FLOAT_BITS.match(text)
    if hexadecimal is not None:
        sign, single, double = hexadecimal.groups()
        width = 32 if single else 64
        bits = int(single or double, 16)
        return FloatImm(bits ^ (1 << (width - 1)) if sign else bits, width)
    if _DECIMAL.match(text):
        packed = struct.pack("<d", float(text.replace(" ", "")))
        return FloatImm(int.from_bytes(packed, "little"), 64)
    raise OperandError(text, f"{text} is not a number")
