"""What is FA4's own: its tiles, its reference, its threshold, and CTAs that take several tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.reference import fa4 as reference
from cute_fa.testing.inputs import Inputs, index_coded_inputs, normal_inputs

# One problem per row of the tile table and per mask, both dtypes in turn, lengths that fill no
# tile. D = 64 with a causal mask: tests/rungs. 8 and 40 are padded; Dv wider than D makes O's place
# larger than Q's.
CASES = [
    (AttentionProblem(1, 130, 300, 1, 1, 128, 128, "bfloat16", causal=True, window_left=190), {}),
    (AttentionProblem(1, 140, 290, 1, 1, 8, 40, "float16", softmax_scale=-0.1), {}),
    (AttentionProblem(1, 135, 210, 1, 1, 192, 128, "bfloat16", softcap=20.0), {}),
    (AttentionProblem(1, 70, 330, 1, 1, 72, 96, "bfloat16", window_left=90, window_right=7), {}),
    (AttentionProblem(1, 130, 260, 1, 1, 256, 256, "float16", causal=True), {}),
    (AttentionProblem(1, 70, 300, 1, 1, 160, 192, "bfloat16"), {"completion": "random"}),
]


@pytest.mark.parametrize(("problem", "how"), CASES, ids=lambda x: getattr(x, "head_dim", None))
def test_head_dim_and_mask(fa4, problem, how):
    if isinstance(problem, AttentionProblem):
        fa4.check(problem, **how)


BASE = AttentionProblem(1, 140, 280, 1, 1, 64, 64, "float16", causal=True)


# The diagonal on a tile's corner, off it by one either way, left of the tile (whole Q tiles, and
# whole tiles, without a key), no key at all, and one query.
@pytest.mark.parametrize(
    "lengths", [(128, 128), (129, 128), (127, 257), (400, 5), (5, 0), (1, 300)], ids=str
)
def test_causal_lengths(fa4, lengths):
    fa4.check(replace(BASE, seqlen_q=lengths[0], seqlen_k=lengths[1]))


def _assert_like_reference(got, expected, dtype):
    """O to two units in the last place, LSE to a few fp32 roundings."""
    (out, lse), (out_ref, lse_ref) = got, expected
    unit = torch.finfo(dtype).eps * out_ref.float().abs().clamp_min(2.0**-6)
    assert ((out.float() - out_ref.float()).abs() <= 2.0 * unit).all()
    torch.testing.assert_close(lse, lse_ref, rtol=2.0**-20, atol=2.0**-19)


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_agrees_with_its_reference(fa4, size):
    """The same cubics, thresholds and roundings: closer to it than to exact attention."""
    q, k, v = normal_inputs(BASE)[:3]
    inputs = Inputs(q * size, k, v)
    config = fa4.config(BASE)
    out, lse, _ = fa4.run(BASE, inputs)
    counts = reference.RescaleCounts()
    expected = reference.forward(
        *inputs[:3], causal=True, pairs_per_chunk=config.polynomial_pairs, counts=counts
    )
    _assert_like_reference((out, lse), expected, out.dtype)
    assert (counts.rescaled_warps > 0) == (size > 1.0)


def _creeping(problem: AttentionProblem, growth: float) -> Inputs:
    """Every row's largest score grows by ``growth`` log2 units per key from right to left."""
    q = torch.zeros(1, problem.seqlen_q, 1, 64, dtype=torch.float16)
    q[..., 0] = 1.0
    k = torch.zeros(1, problem.seqlen_k, 1, 64, dtype=torch.float16)
    k[0, :, 0, 0] = torch.arange(problem.seqlen_k).flip(0) * growth
    return Inputs(q, k, normal_inputs(problem).v)


@pytest.mark.parametrize("growth", [0.03125, 0.0625, 0.125])
def test_a_maximum_that_creeps(fa4, growth):
    """Per block of 128 keys the maximum grows by 4, 8 or 16: below, at and above the threshold of
    8. Followed or not, O stays within the budget, and is what the reference makes of it."""
    problem = replace(BASE, seqlen_k=700, softmax_scale=0.6931471805599453)
    inputs = _creeping(problem, growth)
    fa4.check(problem, inputs)
    out, lse, _ = fa4.run(problem, inputs)
    pairs = fa4.config(problem).polynomial_pairs
    expected = reference.forward(
        *inputs[:3], causal=True, softmax_scale=problem.softmax_scale, pairs_per_chunk=pairs
    )
    _assert_like_reference((out, lse), expected, out.dtype)


def test_threshold_decides_how_often_o_is_rescaled(fa4):
    """CORRECTION's loads and stores of O: every block at threshold 0, hardly any at 8."""
    inputs = normal_inputs(BASE)
    always = fa4.run(BASE, inputs, rescale_threshold=0.0)[2].counters
    rarely = fa4.run(BASE, inputs)[2].counters
    assert rarely["tmem_bytes_read"] < always["tmem_bytes_read"]


@pytest.mark.parametrize("has_own_o", [True, False])
def test_persistent_ctas(fa4, has_own_o, monkeypatch):
    """Two SMs, more tiles than that; tiles without keys among them (Sq > Sk)."""
    problem = replace(BASE, batch=2, seqlen_q=700, seqlen_k=200)
    plan = {"is_persistent": True, "has_own_o": has_own_o, "stages": 4}
    launch = fa4.check(problem, index_coded_inputs(problem), sms=2, completion="random", **plan)
    assert launch.grid == (2, 1, 1)


def test_packed_query_heads(fa4):
    """Eight heads of 20 queries are 160 rows of one tile."""
    problem = replace(BASE, seqlen_q=20, heads_q=8)
    launch = fa4.check(problem, packed_group=8)
    assert launch.grid == (1, 1, 1)


def test_sm_103a_leaves_exponentials_to_the_hardware(fa4):
    problem = replace(BASE, seqlen_q=70, seqlen_k=100)
    on_100 = fa4.check(problem).counters.exponentials
    on_103 = fa4.check(problem, arch="sm_103a").counters.exponentials
    # 24 of the 128 columns of a row are cubics on sm_100a.
    assert on_103 - on_100 == 2 * 128 * 24
