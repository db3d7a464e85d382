"""Every row of the tile tables, and head dims that are padded inside the kernels."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem

# One problem per row of a rung's table, both dtypes, lengths that fill no tile; Dv on each side of
# D, and wider than it. Where a rung's test_build compiles a row, dtype and mask are those: one
# kernel serves both tests, and test_masks has the masks.
CASES = {
    # Padded to a panel of 16 columns (8, 40) and of 32 (72, 160).
    "fa2": [
        AttentionProblem(1, 130, 70, 1, 1, 32, 32, "bfloat16", causal=True),
        AttentionProblem(1, 65, 131, 2, 1, 64, 64, "bfloat16", causal=True),
        AttentionProblem(
            *(1, 61, 129, 1, 1, 96, 96, "bfloat16"), window_left=40, window_right=7, softcap=15.0
        ),
        AttentionProblem(1, 129, 97, 1, 1, 128, 128, "float16", causal=True),
        AttentionProblem(1, 33, 100, 1, 1, 192, 128, "bfloat16"),
        AttentionProblem(
            *(1, 70, 67, 1, 1, 256, 256, "float16"), window_left=30, window_right=0, softcap=15.0
        ),
        AttentionProblem(1, 50, 66, 1, 1, 8, 40, "bfloat16"),
        AttentionProblem(1, 40, 90, 1, 1, 160, 72, "float16", causal=True),
    ],
    # TMA pads 8, 72, 160 and 200 with zeros; where Dv is wider than D, so is O's strip than Q's.
    "fa3": [
        AttentionProblem(1, 130, 370, 1, 1, 96, 96, "float16"),
        AttentionProblem(1, 129, 397, 2, 1, 128, 128, "float16", causal=True),
        AttentionProblem(1, 40, 570, 1, 1, 128, 128, "float16"),
        AttentionProblem(1, 133, 300, 1, 1, 192, 128, "bfloat16", softcap=20.0),
        AttentionProblem(1, 70, 267, 1, 1, 256, 256, "float16", causal=True),
        AttentionProblem(1, 50, 166, 1, 1, 8, 40, "bfloat16"),
        AttentionProblem(1, 140, 290, 1, 1, 160, 72, "float16", softmax_scale=-0.1),
        AttentionProblem(1, 70, 330, 1, 1, 72, 200, "bfloat16", window_left=90, window_right=7),
    ],
    # The same padding, to 32 columns. Two Q tiles, with and without places of O's own, then one.
    "fa4": [
        AttentionProblem(1, 130, 370, 1, 1, 96, 96, "bfloat16", window_left=90, window_right=7),
        AttentionProblem(1, 129, 397, 2, 1, 128, 128, "bfloat16", causal=True),
        AttentionProblem(1, 40, 570, 1, 1, 128, 128, "bfloat16"),
        AttentionProblem(1, 133, 300, 1, 1, 192, 128, "bfloat16", softcap=20.0),
        AttentionProblem(1, 70, 267, 1, 1, 256, 256, "float16", causal=True, window_left=130),
        AttentionProblem(1, 140, 210, 2, 1, 256, 256, "bfloat16"),
        AttentionProblem(1, 50, 166, 1, 1, 8, 40, "float16", softmax_scale=-0.1),
        AttentionProblem(1, 140, 290, 1, 1, 160, 72, "float16", causal=True),
        AttentionProblem(1, 70, 330, 1, 1, 72, 200, "bfloat16", window_left=90, window_right=7),
    ],
}


@pytest.mark.parametrize(
    ("rung", "problem"),
    [
        pytest.param(name, problem, id=f"{name}-d{problem.head_dim}-dv{problem.head_dim_v}-{index}")
        for name, problems in CASES.items()
        for index, problem in enumerate(problems)
    ],
)
def test_head_dim(request, rung, problem):
    request.getfixturevalue(rung).check(problem)


@pytest.mark.parametrize("head_dim", [24, 48, 88, 112])
def test_multiple_of_8(fa4, head_dim):
    """Widths between those above: a half and three quarters of the 32 columns that tiles end on."""
    dtype = "bfloat16" if head_dim % 16 else "float16"
    fa4.check(AttentionProblem(1, 70, 150, 1, 1, head_dim, head_dim, dtype, causal=True))
