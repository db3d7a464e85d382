"""Statements of a block as Python source, for full rectangles and for partial ones.

Unused results are dropped, names are reused after their last use so that memory stays in the cache,
and where all lanes are active a last result is computed straight into the register file.
"""

from __future__ import annotations

from collections.abc import Iterable

from cute_fa.sim.names import ROW, VALUE, WORD
from cute_fa.sim.statements import BlockSource, Statement


def render(source: BlockSource, *, masked: bool) -> str:
    """Source of ``make(bind)``, which returns ``block(ctx, mask)``.

    Args:
        masked: whether some lanes of the rectangle are inactive; registers are then stored where
            the mask holds only.
    """
    statements = _needed(source)
    changes = [store for store in source.stores if not _same_row(store[0], store[1])]
    if not masked:
        statements, stores, aliases = _compute_in_place(source, statements, changes)
    else:
        stores, aliases = [(view, value) for view, value, _ in changes], {}
    tail = [
        Statement(f"copyto({view}, {value}{', where=mask' if masked else ''})")
        for view, value in _ordered(stores, statements)
    ]
    if source.after is not None:
        tail.append(Statement(f"return {source.after.expr}"))
    elif source.result != "None":
        tail.append(Statement(f"return {source.result}"))
    lines = _allocate(statements + tail, aliases)
    used = set(WORD.findall(" ".join(lines)))
    bindings = [f"    {name} = {expr}" for name, expr in source.bindings.items() if name in used]
    body = [f"        {line}" for line in lines] or ["        pass"]
    return "\n".join(
        ["def make(bind):", *bindings, "    def block(ctx, mask):", *body, "    return block", ""]
    )


def _needed(source: BlockSource) -> list[Statement]:
    """The statements whose results somebody uses, and all effects."""
    wanted = {value for _, value, _ in source.stores}
    wanted.update(VALUE.findall(source.result))
    if source.after is not None:
        wanted.update(VALUE.findall(source.after.expr))
    kept = []
    for statement in reversed(source.statements):
        if statement.effect or any(target in wanted for target in statement.targets):
            kept.append(statement)
            wanted.update(VALUE.findall(statement.expr))
    kept.reverse()
    return kept


def _same_row(view: str, value: str) -> bool:
    return view.rpartition("_")[0] == value.rpartition("_")[0]


def _compute_in_place(
    source: BlockSource, statements: list[Statement], changes: list[tuple[str, str, bool]]
) -> tuple[list[Statement], list[tuple[str, str]], dict[str, str]]:
    """Give ufuncs whose result is only stored the register row as their out array.

    That is right if nobody reads the row's old contents afterwards, and if the result has the row's
    shape: what is known to be the same for all lanes must stay small.
    """
    last_read: dict[str, int] = {}
    defined: dict[str, int] = {}
    for index, statement in enumerate(statements):
        for row in ROW.findall(statement.expr):
            last_read[row] = index
        for target in statement.targets:
            defined[target] = index
    end = len(statements)
    for _, value, _ in changes:
        for row in ROW.findall(value):
            last_read[row] = end
    for text in (source.result, "" if source.after is None else source.after.expr):
        for row in ROW.findall(text):
            last_read[row] = end
    out, left, aliases = list(statements), [], {}
    for view, value, full in changes:
        index = defined.get(value, -1)
        row = view.rpartition("_")[0]
        if index < 0 or not full or not out[index].ufunc or last_read.get(row, -1) > index:
            left.append((view, value))
            continue
        out[index] = Statement(f"{out[index].expr[:-1]}, out={view})")
        aliases[value] = view
    return out, left, aliases


def _ordered(
    stores: list[tuple[str, str]], statements: list[Statement]
) -> Iterable[tuple[str, str]]:
    """The stores as a parallel copy: rows that another store overwrites are copied first."""
    overwritten = {view.rpartition("_")[0] for view, _ in stores}
    for number, (view, value) in enumerate(stores):
        row = ROW.fullmatch(value)
        if row and row[1] in overwritten:
            saved = f"v{1_000_000 + number}"
            statements.append(Statement(f"{value}.copy()", (saved,)))
            yield view, saved
        else:
            yield view, value


def _allocate(statements: list[Statement], aliases: dict[str, str]) -> list[str]:
    """Lines of code with values renamed to a small set of reused names."""
    last_use: dict[str, int] = {}
    for index, statement in enumerate(statements):
        for value in VALUE.findall(statement.expr):
            last_use[value] = index
    names: dict[str, str] = dict(aliases)
    free: list[str] = []
    made = 0
    lines = []
    for index, statement in enumerate(statements):
        used = VALUE.findall(statement.expr)
        text = VALUE.sub(lambda match: names[match[0]], statement.expr)
        for value in set(used):
            if last_use[value] == index and value not in aliases:
                free.append(names[value])
        targets = []
        for target in statement.targets:
            if target in aliases:
                continue
            if target not in last_use:
                targets.append("_")
                continue
            if free:
                name = free.pop()
            else:
                name = f"t{made}"
                made += 1
            names[target] = name
            targets.append(name)
        if not targets:
            lines.append(text)
        elif statement.effect:
            lines.append(f"{', '.join(targets)}, = {text}")
        else:
            lines.append(f"{targets[0]} = {text}")
    return lines
