"""Many ``mma.sync`` of one block as one matrix product.

A tile of a GEMM is a grid of accumulators: chains of ``mma.sync`` in which D of one is C of the
next, one chain per accumulator. Chains that take the same A fragments lie side by side along n,
chains that take the same B fragments along m. Where the chains of a block form a whole grid, they
become one ``numpy.matmul`` per warp instead of one per instruction.

The order of additions along k is then BLAS's; a tensor core's own order is not specified either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_fa.sim import fragments
from cute_fa.sim.names import VALUE
from cute_fa.sim.statements import BlockSource, Product, Statement

Array = np.ndarray
_ZERO = "Ff4_0"  # the constant's name in generated code


@dataclass
class _Chain:
    """``mma.sync`` instructions that hand one accumulator on."""

    positions: list[int] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    @property
    def a(self) -> tuple[tuple[str, ...], ...]:
        return tuple(product.a for product in self.products)

    @property
    def b(self) -> tuple[tuple[str, ...], ...]:
        return tuple(product.b for product in self.products)


def fuse_products(source: BlockSource) -> None:
    """Replace grids of accumulator chains in a block by fused statements."""
    statements = source.statements
    at = {p: s.product for p, s in enumerate(statements) if s.product is not None}
    if len(at) < 2:
        return
    uses = _uses(source)
    defined = {target: p for p, statement in enumerate(statements) for target in statement.targets}
    dropped: set[int] = set()
    inserted: dict[int, list[Statement]] = {}
    waiting = list(_groups(_chains(at, uses)))
    while waiting:
        group = waiting.pop()
        if len(group) * len(group[0].products) < 2:
            continue
        place = _place(group, uses, defined)
        if place is None:  # one member's operand is another one's result
            waiting += _smaller(group)
            continue
        inserted.setdefault(place, []).append(_fused(group))
        dropped.update(p for chain in group for p in chain.positions)
    out: list[Statement] = []
    for position, statement in enumerate(statements):
        out += inserted.get(position, ())
        if position not in dropped:
            out.append(statement)
    source.statements = out + inserted.get(len(statements), [])


def _uses(source: BlockSource) -> dict[str, list[int]]:
    """Positions where each value is read; the block's end counts as one position."""
    uses: dict[str, list[int]] = {}
    for position, statement in enumerate(source.statements):
        for value in set(VALUE.findall(statement.expr)):
            uses.setdefault(value, []).append(position)
    end = len(source.statements)
    after = "" if source.after is None else source.after.expr
    texts = [source.result, after, *(value for _, value, _ in source.stores)]
    for value in set(VALUE.findall(" ".join(texts))):
        uses.setdefault(value, []).append(end)
    return uses


def _chains(at: dict[int, Product], uses: dict[str, list[int]]) -> list[_Chain]:
    """Chains of products whose D is read by nothing but the next one's C."""
    chains: list[_Chain] = []
    ending: dict[tuple[str, ...], _Chain] = {}
    for position, product in at.items():
        chain = ending.pop(product.c, None)
        if chain is None or chain.products[-1].form != product.form:
            chain = _Chain()
            chains.append(chain)
        chain.positions.append(position)
        chain.products.append(product)
        if all(len(uses.get(value, ())) == 1 for value in product.d):
            ending[product.d] = chain
    return chains


def _groups(chains: Sequence[_Chain]) -> Iterable[list[_Chain]]:
    """Chains that form whole grids, in row-major order; what forms none goes by rows."""
    by_a: dict[Any, list[_Chain]] = {}
    for chain in chains:
        by_a.setdefault((chain.products[0].form, chain.a), []).append(chain)
    rows: dict[Any, list[list[_Chain]]] = {}
    for (form, _), row in by_a.items():
        columns = tuple(chain.b for chain in row)
        if len(set(columns)) == len(columns):
            rows.setdefault((form, columns), []).append(row)
        else:
            for chain in row:
                yield [chain]
    for together in rows.values():
        yield [chain for row in together for chain in row]


def _smaller(group: Sequence[_Chain]) -> list[list[_Chain]]:
    """A grid's rows, or a row's chains."""
    rows: dict[Any, list[_Chain]] = {}
    for chain in group:
        rows.setdefault(chain.a, []).append(chain)
    if len(rows) > 1:
        return list(rows.values())
    return [[chain] for chain in group] if len(group) > 1 else []


def _place(
    group: Sequence[_Chain], uses: dict[str, list[int]], defined: dict[str, int]
) -> int | None:
    """A position after every operand is known and before any result is needed."""
    members = {p for chain in group for p in chain.positions}
    known, needed = -1, max(members)
    for chain in group:
        for product in chain.products:
            for value in (*product.a, *product.b):
                known = max(known, defined.get(value, -1))
        known = max(known, *(defined.get(value, -1) for value in chain.products[0].c))
        for value in chain.products[-1].d:
            needed = min([needed, *(p for p in uses.get(value, ()) if p not in members)])
    return needed if known < needed else None


def _fused(group: Sequence[_Chain]) -> Statement:
    """The statement that computes a grid of chains."""
    rows = list(dict.fromkeys(chain.a for chain in group))
    columns = list(dict.fromkeys(chain.b for chain in group))
    place = {(chain.a, chain.b): chain for chain in group}
    ordered = [place[row, column] for row in rows for column in columns]
    left = _nest(_flat(row) for row in rows)
    right = _nest(_flat(column) for column in columns)
    addends = [value for chain in ordered for value in chain.products[0].c]
    zero = all(value == _ZERO for value in addends)
    third = "None" if zero else f"({', '.join(addends)},)"
    targets = tuple(value for chain in ordered for value in chain.products[-1].d)
    number = group[0].products[0].number
    return Statement(f"mma_grid(E{number}, {left}, {right}, {third})", targets, effect=True)


def _flat(steps: tuple[tuple[str, ...], ...]) -> str:
    return f"({', '.join(name for step in steps for name in step)},)"


def _nest(parts: Iterable[str]) -> str:
    return f"({', '.join(parts)},)"


def mma_grid(
    handler: Any,
    a: Sequence[Sequence[Array]],
    b: Sequence[Sequence[Array]],
    c: Sequence[Array] | None,
) -> tuple[Array, ...]:
    """D = A B + C for a grid of accumulators; called by generated code.

    Args:
        handler: the ``mma.sync`` handler of one instruction, for its form.
        a: for each row of the grid the A registers along k, ``(w, c, 32)`` each.
        b: for each column of the grid the B registers along k.
        c: accumulators in row-major order of the grid, None for zeros.

    Returns:
        D's registers in the order of ``c``.
    """
    form = handler.form
    blocks = form.m // 8
    left = fragments.operand_matrix([row[r::blocks] for row in a for r in range(blocks)], form.a)
    right = fragments.operand_matrix(b, form.b)
    product = np.matmul(left, right.swapaxes(-1, -2))
    w, ctas, m, n = product.shape
    grid = product.reshape(w, ctas, m // 8, 8, n // 8, 4, 2).transpose(2, 4, 6, 0, 1, 3, 5)
    lanes = np.ascontiguousarray(grid).reshape(m // 8, n // 8, 2, w, ctas, 32)
    out = [
        lanes[row * blocks + block, column, parity]
        for row in range(len(a))
        for column in range(len(b))
        for block in range(blocks)
        for parity in range(2)
    ]
    if c is None:
        return tuple(out)
    return tuple([np.add(x, y, x) for x, y in zip(out, c, strict=True)])
