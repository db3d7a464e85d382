"""Natural loops of a control-flow graph, and which of them is the hot one.

A backward branch is not yet a loop: ptxas moves the retries of barrier waits to the end of the
code, and their way back to the wait looks like a loop around everything in between. So:
dominators (Cooper, Harvey, Kennedy), back edges, natural loops; loops that only poll are folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cute_fa.ptx import Blocks


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        header: the block through which it is entered.
        blocks: its blocks, those of loops inside it among them.
        parent: index of the smallest loop around it in the list that natural_loops returns.
        depth: 1 for an outermost loop.
    """

    header: int
    blocks: frozenset[int]
    parent: int | None
    depth: int


def immediate_dominators(successors: Sequence[Sequence[int]]) -> list[int | None]:
    """The immediate dominator of each node of a graph entered at node 0.

    Node 0 is its own; None for nodes that cannot be reached.
    """
    order = _reverse_postorder(successors)
    rank = {node: position for position, node in enumerate(order)}
    predecessors: list[list[int]] = [[] for _ in successors]
    for node in order:
        for successor in successors[node]:
            predecessors[successor].append(node)
    dominator: list[int | None] = [None] * len(successors)
    dominator[0] = 0
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            best: int | None = None
            for predecessor in predecessors[node]:
                if dominator[predecessor] is not None:
                    best = (
                        predecessor
                        if best is None
                        else _common_dominator(best, predecessor, dominator, rank)
                    )
            if best != dominator[node]:
                dominator[node] = best
                changed = True
    return dominator


def natural_loops(blocks: Blocks) -> list[Loop]:
    """The loops of a kernel in order of their headers, each before the loops inside it.

    Back edges to one header make one loop.
    """
    dominator = immediate_dominators(blocks.successors)
    bodies: dict[int, set[int]] = {}
    for block in blocks:
        if dominator[block.index] is None:
            continue
        for header in block.successors:
            if _dominates(header, block.index, dominator):
                body = bodies.setdefault(header, {header})
                pending = [block.index]
                while pending:
                    node = pending.pop()
                    if node not in body and dominator[node] is not None:
                        body.add(node)
                        pending.extend(blocks.predecessors[node])
    inside: dict[int | None, list[int]] = {}
    for header in sorted(bodies):
        around = [h for h, body in bodies.items() if header in body and h != header]
        inside.setdefault(min(around, key=lambda h: len(bodies[h]), default=None), []).append(
            header
        )
    loops: list[Loop] = []

    def add(header: int, parent: int | None) -> None:
        depth = loops[parent].depth + 1 if parent is not None else 1
        index = len(loops)
        loops.append(Loop(header, frozenset(bodies[header]), parent, depth))
        for inner in inside.get(header, ()):
            add(inner, index)

    for header in inside.get(None, ()):
        add(header, None)
    return loops


def own_blocks(loops: Sequence[Loop], index: int, folded: frozenset[int]) -> frozenset[int]:
    """Blocks of loop ``index`` that are in no loop inside it; ``folded`` loops do not count."""
    inner: set[int] = set()
    for i, loop in enumerate(loops):
        if i != index and i not in folded and loop.blocks < loops[index].blocks:
            inner |= loop.blocks
    return loops[index].blocks - inner


def _reverse_postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, children = stack[-1]
        for child in children:
            if child not in seen:
                seen.add(child)
                stack.append((child, iter(successors[child])))
                break
        else:
            stack.pop()
            order.append(node)
    return order[::-1]


def _common_dominator(a: int, b: int, dominator: Sequence[int | None], rank: dict[int, int]) -> int:
    while a != b:
        while rank[a] > rank[b]:
            a = _parent(a, dominator)
        while rank[b] > rank[a]:
            b = _parent(b, dominator)
    return a


def _parent(node: int, dominator: Sequence[int | None]) -> int:
    found = dominator[node]
    assert found is not None, "only reached nodes are compared"
    return found


def _dominates(above: int, node: int, dominator: Sequence[int | None]) -> bool:
    while node != above:
        parent = dominator[node]
        if parent is None or parent == node:
            return False
        node = parent
    return True
