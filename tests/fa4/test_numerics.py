"""FA4 computes what its reference does: the same cubics, the same rescales, the same roundings.

That both are attention, within the error budget, is what ``Bench.check`` holds the kernel to, here
and in all of tests/rungs, and tests/reference the reference.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.reference import fa4 as reference
from cute_fa.testing.cases import call_arguments
from cute_fa.testing.inputs import Inputs, normal_inputs

BASE = AttentionProblem(1, 140, 280, 1, 1, 64, 64, "float16", causal=True)
LN_2 = math.log(2.0)


def _reference(config, problem, inputs, counts=None):
    """(out, lse) of the reference with the plan's tiles, share of cubics and threshold."""
    return reference.forward(
        *inputs[:3],
        **call_arguments(problem),
        tile_m=config.tile_m,
        tile_n=config.tile_n,
        num_q_tiles=config.num_q_tiles,
        stages=config.stages,
        pairs_per_chunk=config.polynomial_pairs,
        rescale_threshold=config.rescale_threshold,
        counts=counts,
    )


def _rescaled_warps(launch, config, blocks: int) -> int:
    """How often a correction warp of a single row tile rescaled its 32 rows of O.

    From what threads wrote to tensor memory; the rest of that is P.
    """
    assert launch.grid == (config.num_ctas, 1, 1)
    p_bytes = 4 * config.tile_m * blocks * config.tmem_map.p_columns
    rescaled, remainder = divmod(
        launch.counters["tmem_bytes_written"] - p_bytes, 4 * 32 * config.padded_dv
    )
    assert remainder == 0
    return rescaled


def _assert_like_reference(got, expected, softcap: float = 0.0):
    """O to two units in the last place, LSE to a few fp32 roundings."""
    (out, lse), (out_ref, lse_ref) = got, expected
    unit = torch.finfo(out.dtype).eps * out_ref.float().abs().clamp_min(2.0**-6)
    assert ((out.float() - out_ref.float()).abs() <= 2.0 * unit).all()
    torch.testing.assert_close(lse, lse_ref, rtol=2.0**-20, atol=2.0**-19 + softcap * 2.0**-22)


# Two Q tiles and a pair's one, both dtypes, blocks of 128 and 96 columns, a mask, a softcap.
CASES = [
    BASE,
    AttentionProblem(1, 40, 570, 1, 1, 128, 128, "bfloat16"),
    AttentionProblem(1, 133, 300, 1, 1, 192, 128, "bfloat16", softcap=20.0),
    AttentionProblem(1, 100, 210, 1, 1, 256, 256, "bfloat16"),
]


@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize("problem", CASES, ids=lambda p: f"d{p.head_dim}")
def test_agrees_with_its_reference(fa4, problem, size):
    """Closer than either is to exact attention; with large scores O is rescaled now and then, as
    often as the reference says."""
    q, k, v = normal_inputs(problem)[:3]
    inputs = Inputs(q * size, k, v)
    config = fa4.config(problem)
    out, lse, launch = fa4.run(problem, inputs)
    counts = reference.RescaleCounts()
    expected = _reference(config, problem, inputs, counts)
    _assert_like_reference((out, lse), expected, problem.softcap)
    blocks = -(-problem.seqlen_k // config.tile_n)
    assert _rescaled_warps(launch, config, blocks) == counts.rescaled_warps
    assert (counts.rescaled_warps > 0) == (size > 1.0)


def test_without_a_threshold_every_growth_is_followed(fa4):
    inputs = normal_inputs(BASE)
    how: dict[str, Any] = {"rescale_threshold": 0.0}
    config = fa4.config(BASE, **how)
    out, lse, launch = fa4.run(BASE, inputs, **how)
    counts = reference.RescaleCounts()
    _assert_like_reference((out, lse), _reference(config, BASE, inputs, counts))
    assert _rescaled_warps(launch, config, blocks=3) == counts.rescaled_warps > counts.warps // 2


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_which_exponentials_are_cubics(fa4, arch):
    """Row i has weight at column i and at the last one, whose score is 0, only: its LSE is
    ln(1 + 2^x), by which both ways to compute 2^x can be told apart. On sm_103a all are exact."""
    x = torch.tensor([-0.25, -1.25, -2.75, -4.25])  # per head; cubics are 4e-5 to 1e-4 off there
    problem = AttentionProblem(1, 128, 128, 4, 1, 128, 128, "bfloat16", softmax_scale=LN_2)
    rows = torch.arange(127)
    q = torch.full((1, 128, 4, 128), -1e4)
    q[0, :, :, 127] = 0.0
    q[0, rows, :, rows] = x
    k = torch.eye(128)[None, :, None]
    inputs = Inputs(q.bfloat16(), k.bfloat16(), normal_inputs(problem).v)
    out, lse, _ = fa4.run(problem, inputs, arch=arch)
    config = fa4.config(problem, arch)
    is_cubic = torch.zeros(4, 32, dtype=torch.bool)  # chunks of 32 columns
    if arch == "sm_100a":
        is_cubic[[0, 3], [[4], [5], [16], [17], [26], [27]]] = True
        is_cubic[1:3, [2, 3, 8, 9, 12, 13, 18, 19, 24, 25, 28, 29]] = True
    is_cubic = is_cubic.flatten()
    exact, cubic = torch.exp2(x), reference.exp2_cubic(x)
    power = torch.where(is_cubic[:, None], cubic, exact)  # (row, head)
    power[127] = 0.0
    tolerance = 4e-7
    assert ((exact.log1p() - cubic.log1p()).abs() > 4 * tolerance).all()
    torch.testing.assert_close(lse[0].T, power.log1p(), rtol=0.0, atol=tolerance)
    _assert_like_reference((out, lse), _reference(config, problem, inputs))


def _creeping(problem: AttentionProblem, growth: float) -> Inputs:
    """Every row's largest score grows by ``growth`` log2 units per block of 128 keys from right to
    left. Two columns of K spell it exactly."""
    q = torch.zeros(1, problem.seqlen_q, 1, problem.head_dim)
    q[..., :2] = 1.0
    keys = torch.arange(problem.seqlen_k).flip(0)
    score = keys // 128 * growth
    k = torch.zeros(1, problem.seqlen_k, 1, problem.head_dim)
    k[0, :, 0, 0] = score - score % 8.0
    k[0, :, 0, 1] = score % 8.0 - 0.5 * (keys % 7)
    dtype = getattr(torch, problem.dtype)
    return Inputs(q.to(dtype), k.to(dtype), normal_inputs(problem).v)


def test_a_maximum_that_grows_a_hundred_times(fa4):
    """By less than the threshold of 8: it is followed every other time. O and LSE stay within the
    budget, and are what the reference makes of them."""
    problem = AttentionProblem(1, 3, 101 * 128, 1, 1, 8, 40, "float16", softmax_scale=LN_2)
    inputs, config = _creeping(problem, 7.875), fa4.config(problem)
    out, lse, launch = fa4.run(problem, inputs)
    fa4.assert_right(problem, inputs, out, lse, launch)
    counts = reference.RescaleCounts()
    _assert_like_reference((out, lse), _reference(config, problem, inputs, counts))
    assert _rescaled_warps(launch, config, blocks=101) == counts.rescaled_warps == 50


# Blocks of 128 keys among which the row's maximum creeps, by 4, 8 or 16 log2 units a block.
@pytest.mark.parametrize("growth", [0.03125, 0.0625, 0.125])
def test_a_maximum_that_creeps_within_a_block(fa4, growth):
    problem = replace(BASE, seqlen_k=700, softmax_scale=LN_2)
    q = torch.zeros(1, problem.seqlen_q, 1, 64, dtype=torch.float16)
    q[..., 0] = 1.0
    k = torch.zeros(1, problem.seqlen_k, 1, 64, dtype=torch.float16)
    k[0, :, 0, 0] = torch.arange(problem.seqlen_k).flip(0) * growth
    inputs = Inputs(q, k, normal_inputs(problem).v)
    out, lse, launch = fa4.run(problem, inputs)
    fa4.assert_right(problem, inputs, out, lse, launch)
    _assert_like_reference((out, lse), _reference(fa4.config(problem), problem, inputs))


@pytest.mark.parametrize("key", [4, 6])
def test_a_nan_of_a_key_is_in_every_row(fa4, key):
    """Whether its exponential is a cubic, whose clamp would drop it, or not."""
    inputs = normal_inputs(BASE)
    inputs.k[0, key, 0, 0] = float("nan")
    out, lse, _ = fa4.run(BASE, inputs)
    assert out.isnan().all() and lse.isnan().all()
