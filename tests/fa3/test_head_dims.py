"""Every row of the tile table, and head dims that are padded inside the kernel."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem

# One problem per row of the table, both dtypes in turn, lengths that fill no tile, and each with a
# mask that the others do not have. TMA pads 8, 72, 160 and 200 with zeros; Dv is on either side of
# D, and wider than it, so that O's strip is larger than Q's. D = 64: the other files.
CASES = [
    AttentionProblem(1, 130, 370, 1, 1, 96, 96, "float16"),
    AttentionProblem(1, 129, 397, 2, 1, 128, 128, "bfloat16", causal=True),
    AttentionProblem(1, 40, 570, 1, 1, 128, 128, "float16"),
    AttentionProblem(1, 133, 300, 1, 1, 192, 128, "bfloat16", softcap=20.0),
    AttentionProblem(1, 70, 267, 1, 1, 256, 256, "float16", causal=True, window_left=130),
    AttentionProblem(1, 50, 166, 1, 1, 8, 40, "bfloat16"),
    AttentionProblem(1, 140, 290, 1, 1, 160, 72, "float16", softmax_scale=-0.1),
    AttentionProblem(1, 70, 330, 1, 1, 72, 200, "bfloat16", window_left=90, window_right=7),
]


@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"d{p.head_dim}-dv{p.head_dim_v}")
def test_head_dim(fa3, problem):
    fa3.check(problem)
