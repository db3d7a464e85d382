"""What stands after an opcode: the operand kinds of PTX ISA section 6, as immutable values."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Reg:
    """A declared register, e.g. ``%r7``; inside an inline-asm scope ``P1@3`` (scope 3)."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Imm:
    """An integer literal with its sign; the instruction's type says how many bits count."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class FloatImm:
    """A floating-point literal as its bit pattern.

    ``0f`` literals have width 32; ``0d`` literals and decimal ones (``1.5``) have width 64.
    """

    bits: int
    width: int

    @property
    def value(self) -> float:
        """The number itself."""
        raw = self.bits.to_bytes(self.width // 8, "little")
        return float(struct.unpack("<f" if self.width == 32 else "<d", raw)[0])

    def __str__(self) -> str:
        return f"0{'f' if self.width == 32 else 'd'}{self.bits:0{self.width // 4}X}"


@dataclass(frozen=True)
class Symbol:
    """A name that is not a register: parameter, variable, label or function.

    ``offset`` bytes are added to the symbol's address (``mov.b64 %rd1, table+16``).
    """

    name: str
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name}+{self.offset}" if self.offset else self.name


@dataclass(frozen=True)
class Special:
    """A special register of PTX ISA section 10, e.g. ``%tid.x``."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sink:
    """``_``: the value in this position is thrown away."""

    def __str__(self) -> str:
        return "_"


@dataclass(frozen=True)
class Address:
    """``[base+offset]``, offset in bytes."""

    base: Reg | Symbol | Imm | Special
    offset: int = 0

    def __str__(self) -> str:
        return f"[{self.base}+{self.offset}]" if self.offset else f"[{self.base}]"


@dataclass(frozen=True)
class TensorAddress:
    """``[map, {c0, c1, …}]``: a tensor map with coordinates, innermost dimension first."""

    base: Reg | Symbol | Imm | Special
    coords: tuple[Operand, ...]
    offset: int = 0

    def __str__(self) -> str:
        base = f"{self.base}+{self.offset}" if self.offset else str(self.base)
        return f"[{base}, {{{', '.join(map(str, self.coords))}}}]"


@dataclass(frozen=True)
class Vector:
    """``{a, b, …}``; a call's argument list ``(a, b)`` is one too."""

    items: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"{{{', '.join(map(str, self.items))}}}"


@dataclass(frozen=True)
class Pair:
    """``d|p``: two destinations, of which one may be a sink (``_|%p1``)."""

    first: Operand
    second: Operand

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


@dataclass(frozen=True)
class Negated:
    """``!%p1``: the complement of a predicate."""

    reg: Reg

    def __str__(self) -> str:
        return f"!{self.reg}"


Operand: TypeAlias = (
    Reg
    | Imm
    | FloatImm
    | Symbol
    | Special
    | Sink
    | Address
    | TensorAddress
    | Vector
    | Pair
    | Negated
)


def register_names(operand: Operand) -> Iterator[str]:
    """Every register that ``operand`` names, in order of writing, addresses included."""
    if isinstance(operand, Reg):
        yield operand.name
    elif isinstance(operand, Negated):
        yield operand.reg.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from register_names(item)
    elif isinstance(operand, Pair):
        yield from register_names(operand.first)
        yield from register_names(operand.second)
    elif isinstance(operand, Address):
        yield from register_names(operand.base)
    elif isinstance(operand, TensorAddress):
        yield from register_names(operand.base)
        for coord in operand.coords:
            yield from register_names(coord)
