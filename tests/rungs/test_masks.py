"""Lengths and masks at the places where a rung's blocks begin, end, are empty or are cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cute_fa.problem import AttentionProblem


def _problem(seqlen_q: int, seqlen_k: int, **features) -> AttentionProblem:
    values = {"head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", **features}
    return AttentionProblem(1, seqlen_q, seqlen_k, 1, 1, **values)


def _each(table: dict[str, Iterable[Any]]) -> list[Any]:
    """(rung, case) for every case of every rung."""
    return [
        pytest.param(name, case, id=f"{name}-{'x'.join(map(str, case))}")
        for name, cases in table.items()
        for case in cases
    ]


# FA2's tile is 128 × 64; FA3's 192 × 128, in strips of 64 rows; FA4's 256 × 128, in two Q tiles.
# Without a mask only Sk matters: nothing, one key, a full block, one more, and more blocks than the
# rings have slots (FA3: an even and an odd number); Sq leaves none, one or two strips without rows.
LENGTHS = {
    "fa2": [(1, 1), (7, 0), (129, 64), (3, 65), (128, 257)],
    "fa3": [(1, 1), (7, 0), (193, 128), (65, 129), (130, 513), (64, 641)],
    "fa4": [(1, 1), (7, 0), (257, 128), (129, 129), (130, 513), (64, 641)],
}
# A causal mask adds the diagonal: on a tile's corner, off it by one either way, entirely left of
# the tile (Sq > Sk: whole row tiles without a key), far to the right, and a single query, as in
# decoding.
CAUSAL_LENGTHS = {
    "fa2": [(128, 128), (129, 128), (127, 191), (300, 5), (5, 0), (1, 200), (2, 1)],
    "fa3": [(192, 192), (193, 192), (191, 320), (600, 5), (5, 0), (1, 700), (2, 1), (400, 400)],
    "fa4": [(256, 256), (257, 256), (127, 257), (600, 5), (5, 0), (1, 700), (2, 1), (400, 400)],
}
# Sq, Sk, left, right: windows narrower than a block, than a tile, of the diagonal only, wider than
# the sequence (2³¹ − 1 must not overflow), and with rows that see no key at all on either side of
# those that do.
FAR = 2**31 - 1
WINDOWS = {
    "fa2": [
        (150, 330, 0, 0),
        (140, 150, 70, 3),
        (130, 200, FAR, FAR),
        (200, 70, 10, 20),
        (257, 257, 64, 64),
    ],
    "fa3": [
        (250, 630, 0, 0),
        (240, 250, 150, 3),
        (230, 400, FAR, FAR),
        (400, 170, 10, 20),
        (460, 460, 128, 128),
    ],
    "fa4": [
        (270, 630, 0, 0),
        (260, 270, 150, 3),
        (230, 400, FAR, FAR),
        (520, 170, 10, 20),
        (400, 400, 128, 128),
    ],
}
LEFT_WINDOWS = {"fa2": [(200, 330, 100)], "fa3": [(300, 730, 200)], "fa4": [(300, 730, 200)]}


@pytest.mark.parametrize(("rung", "lengths"), _each(LENGTHS))
def test_lengths(request, rung, lengths):
    request.getfixturevalue(rung).check(_problem(*lengths))


@pytest.mark.parametrize(("rung", "lengths"), _each(CAUSAL_LENGTHS))
def test_causal_lengths(request, rung, lengths):
    request.getfixturevalue(rung).check(_problem(*lengths, causal=True))


@pytest.mark.parametrize(("rung", "case"), _each(WINDOWS))
def test_window(request, rung, case):
    seqlen_q, seqlen_k, left, right = case
    problem = _problem(seqlen_q, seqlen_k, window_left=left, window_right=right)
    request.getfixturevalue(rung).check(problem)


@pytest.mark.parametrize(("rung", "case"), _each(LEFT_WINDOWS))
def test_left_window_under_causal(request, rung, case):
    seqlen_q, seqlen_k, left = case
    problem = _problem(seqlen_q, seqlen_k, causal=True, window_left=left)
    request.getfixturevalue(rung).check(problem)
