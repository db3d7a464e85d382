"""Plans that the tile table does not choose at D = 64: deeper rings, fewer strips, no order."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem

PROBLEM = AttentionProblem(1, 260, 530, 1, 1, 64, 64, "bfloat16", causal=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 3},
        {"num_consumers": 2, "tile_n": 64},
        {"has_turns": False},
    ],
    ids=["stages3", "consumers2", "no-turns"],
)
def test_other_plans(fa3, changes):
    fa3.check(PROBLEM, completion="random", **changes)
