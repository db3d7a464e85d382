"""A block's code before it is rendered: statements, stores, and what they are about."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cute_fa.sim.isa.types import CLASS_DTYPE


class Location(NamedTuple):
    """Where a register lives: a row of a register file (a ``.b128`` is two 64-bit registers)."""

    file: str
    row: int

    @property
    def dtype(self) -> str:
        return CLASS_DTYPE[self.file]


class Value:
    """What a register holds at some point of a block.

    ``axes`` is exact: the array has extent 1 along every other axis, or is 0-d. ``bound`` is the
    register row ("Rr5") of which the value is a view, or None.
    """

    __slots__ = ("axes", "bound", "dtype", "name", "views")

    def __init__(self, name: str, dtype: str, axes: int, bound: str | None = None) -> None:
        self.name = name
        self.dtype = dtype
        self.axes = axes
        self.bound = bound
        self.views = {dtype: name}


@dataclass
class Statement:
    """One line of a block: ``target = expr``, or ``expr`` alone.

    ``ufunc``: the expression is a numpy ufunc call that takes an out array. ``effect``: it must be
    executed even if nobody uses the result, which is a tuple with one item per target.
    """

    expr: str
    targets: tuple[str, ...] = ()
    ufunc: bool = False
    effect: bool = False
    product: Product | None = None


@dataclass(frozen=True)
class Product:
    """Names of the registers of an ``mma.sync``; ``number`` is the instruction's index."""

    number: int
    form: Any
    a: tuple[str, ...]
    b: tuple[str, ...]
    c: tuple[str, ...]
    d: tuple[str, ...]


@dataclass
class BlockSource:
    """What codegen knows of a block before it is compiled for full or partial lanes.

    Attributes:
        kind: how the block ends: "fall", "jump", "branch", "switch", "exit", "exit_if" or
            "blocking".
        statements: in order of execution.
        stores: (register-file view, value, whether it has the rectangle's full shape) for every
            live register that the block changes.
        after: the call of a blocking handler, which follows the stores.
        result: the expression that the function returns, "None" if nothing depends on it.
        bindings: expression by name for what ``make`` binds per rectangle.
        warp_counts, lane_counts: static counters per active warp and per active lane.
        handlers: indices of the effect instructions, the numbers in their handlers' names.
    """

    kind: str
    statements: list[Statement] = field(default_factory=list)
    stores: list[tuple[str, str, bool]] = field(default_factory=list)
    result: str = "None"
    after: Statement | None = None
    bindings: dict[str, str] = field(default_factory=dict)
    warp_counts: Counter[str] = field(default_factory=Counter)
    lane_counts: Counter[str] = field(default_factory=Counter)
    handlers: tuple[int, ...] = ()
    constants: set[str] = field(default_factory=set)
