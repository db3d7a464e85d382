"""Every head dim of the tile table, and those that are padded inside the kernel."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem

# One problem per head dim: the row of the tile table that it picks, both dtypes in turn, lengths
# that fill no tile, and each head dim with a mask that the others do not have. Padded dims cover a
# panel of 16 (8, 40), of 32 (72, 160) and Dv on either side of D.
CASES = [
    AttentionProblem(1, 130, 70, 1, 1, 32, 32, "float16"),
    AttentionProblem(1, 65, 131, 2, 1, 64, 64, "bfloat16", causal=True),
    AttentionProblem(1, 61, 129, 1, 1, 96, 96, "float16", window_left=40, window_right=7),
    AttentionProblem(1, 129, 97, 1, 1, 128, 128, "bfloat16", causal=True),
    AttentionProblem(1, 33, 100, 1, 1, 192, 128, "bfloat16"),
    AttentionProblem(1, 70, 67, 1, 1, 256, 256, "float16", causal=True, window_left=30),
    AttentionProblem(1, 50, 66, 1, 1, 8, 40, "bfloat16"),
    AttentionProblem(1, 40, 90, 1, 1, 160, 72, "float16", causal=True),
]


@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"d{p.head_dim}-dv{p.head_dim_v}")
def test_head_dim(fa2, problem):
    fa2.check(problem)
