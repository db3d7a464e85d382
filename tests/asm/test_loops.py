"""Dominators and natural loops against their definitions, on random graphs."""

from __future__ import annotations

import random

from cute_fa.asm.loops import immediate_dominators, natural_loops, own_blocks
from cute_fa.ptx import Block, Blocks


def random_graph(rng: random.Random) -> list[tuple[int, ...]]:
    size = rng.randrange(1, 12)
    return [
        tuple(sorted({rng.randrange(size) for _ in range(rng.randrange(3))})) for _ in range(size)
    ]


def reachable(graph: list[tuple[int, ...]], start: int, without: int | None = None) -> set[int]:
    if start == without:
        return set()
    seen = {start}
    pending = [start]
    while pending:
        for node in graph[pending.pop()]:
            if node != without and node not in seen:
                seen.add(node)
                pending.append(node)
    return seen


def blocks_of(graph: list[tuple[int, ...]]) -> Blocks:
    return Blocks([Block(i, i, i + 1, out) for i, out in enumerate(graph)])


def dominates(graph: list[tuple[int, ...]], above: int, node: int) -> bool:
    """By definition: every path from the entry to ``node`` passes ``above``."""
    return above == node or node not in reachable(graph, 0, without=above)


def test_dominators_of_random_graphs() -> None:
    rng = random.Random(0)
    compared = 0
    for _ in range(600):
        graph = random_graph(rng)
        found = immediate_dominators(graph)
        alive = reachable(graph, 0)
        for node in range(len(graph)):
            if node not in alive:
                assert found[node] is None
                continue
            strict = {d for d in alive if d != node and dominates(graph, d, node)}
            if node == 0:
                assert found[0] == 0
                continue
            # The immediate dominator is the strict dominator that all others dominate.
            (nearest,) = [d for d in strict if all(dominates(graph, o, d) for o in strict)]
            assert found[node] == nearest
            compared += 1
    assert compared > 500


def test_natural_loops_of_random_graphs() -> None:
    rng = random.Random(1)
    compared = 0
    for _ in range(300):
        graph = random_graph(rng)
        alive = reachable(graph, 0)
        expected: dict[int, set[int]] = {}
        for tail in alive:
            for header in graph[tail]:
                if dominates(graph, header, tail):
                    # Whatever reaches the tail without passing the header.
                    body = {n for n in alive if tail in reachable(graph, n, without=header)}
                    expected.setdefault(header, {header}).update(body)
        loops = natural_loops(blocks_of(graph))
        assert {loop.header: set(loop.blocks) for loop in loops} == expected
        for index, loop in enumerate(loops):
            around = [other for other in loops if loop.blocks < other.blocks]
            assert loop.depth == len(around) + 1
            if loop.parent is None:
                assert not around
            else:
                assert loop.parent < index
                assert loops[loop.parent] in around
                assert loops[loop.parent].depth == loop.depth - 1
            compared += 1
    assert compared > 100


def test_own_blocks_leave_out_inner_loops_that_are_not_folded() -> None:
    #  0 → 1 → 2 ⟲ → 3 ⟲ → 1, 3 → 4
    loops = natural_loops(blocks_of([(1,), (2,), (2, 3), (1, 3, 4), ()]))
    assert [sorted(loop.blocks) for loop in loops] == [[1, 2, 3], [2], [3]]
    assert own_blocks(loops, 0, frozenset()) == {1}
    assert own_blocks(loops, 0, frozenset({1})) == {1, 2}
    assert own_blocks(loops, 1, frozenset()) == {2}
