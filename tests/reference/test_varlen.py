"""Packed sequences in the reference, against one large matrix with a block-diagonal mask."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import attention_low_precision, varlen_attention
from cute_fa.testing import normal_inputs
from cute_fa.testing.cases import mask_arguments
from cute_fa.varlen import Packing, VarlenProblem

PACKINGS = {
    "all": Packing.of_lengths((3, 0, 7, 4, 0), (5, 2, 0, 3, 0)),
    "used": Packing.of_lengths((3, 2, 7, 4), (5, 2, 6, 3), (2, 0, 7, 3), (5, 1, 0, 2)),
    "none": Packing((0,), (0,)),
}
MASKS = [
    {},
    {"causal": True},
    {"window_left": 1, "window_right": 2},
    {"softcap": 3.0, "softmax_scale": -0.7},
]


def block_diagonal(packing: Packing, problem: AttentionProblem, total_q: int, total_k: int):
    """(Tq, Tk) bool: whether row i and column j count, are of one sequence, and see each other."""
    visible = torch.zeros(total_q, total_k, dtype=torch.bool)
    left, right = problem.window
    for rows_q, rows_k in zip(packing.rows_q, packing.rows_k, strict=True):
        for i in rows_q:
            for j in rows_k:
                # From the last query and the last key backwards: they stand on the diagonal.
                distance = (rows_q.stop - i) - (rows_k.stop - j)
                visible[i, j] = (left is None or distance >= -left) and (
                    right is None or distance <= right
                )
    return visible


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_it_is_attention_under_a_block_diagonal_mask(packing, mask):
    base = AttentionProblem(1, 1, 1, 4, 2, 8, 16, "float16", **mask)
    problem = VarlenProblem.of(base, PACKINGS[packing])
    q, k, v = (x.double() for x in normal_inputs(problem)[:3])
    out, lse = varlen_attention(q, k, v, packing=PACKINGS[packing], **mask_arguments(problem))

    visible = block_diagonal(PACKINGS[packing], base, problem.total_q, problem.total_k)
    # Rows that do not count are NaN: 0 · NaN must not reach the sums below.
    q, k, v = (x.nan_to_num(nan=0.0) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * base.scale
    if base.softcap:
        scores = base.softcap * torch.tanh(scores / base.softcap)
    weights = scores.exp() * visible
    total = weights.sum(dim=-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v) / total.T[..., None]
    torch.testing.assert_close(out, expected.nan_to_num(nan=0.0))
    torch.testing.assert_close(lse, total.log())
    assert not out.isnan().any() and out.dtype == torch.float64


def test_the_yardstick_rounds_as_the_input_precision_does():
    problem = VarlenProblem.of(AttentionProblem(1, 1, 1, 1, 1, 8, 8, "bfloat16"), PACKINGS["all"])
    q, k, v, _ = normal_inputs(problem)
    rough, lse = varlen_attention(q, k, v, packing=problem.packing, compute=attention_low_precision)
    exact, _ = varlen_attention(*(x.double() for x in (q, k, v)), packing=problem.packing)
    error = (rough.double() - exact).abs().max()
    assert rough.dtype == torch.bfloat16 and 0 < error < 0.05
    assert (lse[:, 3:10] == -math.inf).all() and lse[:, :3].isfinite().all()
