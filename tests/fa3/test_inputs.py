"""What reaches the kernel: layouts, heads, scales, softcaps, and values that show an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import (
    LAYOUTS,
    Inputs,
    extreme_inputs,
    index_coded_inputs,
    normal_inputs,
    one_hot_inputs,
)

# One compiled variant serves all but the softcap tests.
BASE = AttentionProblem(1, 100, 210, 2, 1, 64, 64, "float16", causal=True)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strides(fa3, layout):
    problem = replace(BASE, batch=2)
    fa3.check(problem, normal_inputs(problem, layouts=(layout, layout, layout)))


@pytest.mark.parametrize("heads", [(5, 1), (25, 5), (3, 3)], ids=["5to1", "25to5", "mha"])
def test_heads(fa3, heads):
    """Which K/V head each query head reads is in V's integers; any head count divides."""
    problem = replace(BASE, seqlen_q=20, seqlen_k=40, heads_q=heads[0], heads_k=heads[1])
    fa3.check(problem, index_coded_inputs(problem))


def test_index_coded_columns(fa3):
    """Each row picks one column of a several-block sequence, exactly."""
    problem = replace(BASE, batch=2, seqlen_q=240, seqlen_k=470)
    fa3.check(problem, index_coded_inputs(problem))


def test_one_hot(fa3):
    problem = replace(BASE, seqlen_q=90)
    fa3.check(problem, one_hot_inputs(problem))


@pytest.mark.parametrize("magnitude", [1e3, -1e3, 3e4, -3e4])
def test_extreme_scores(fa3, magnitude):
    """Rows whose scores are all huge or all very negative: a maximum started at 0 would show.

    At 3e4 a row's maximum in log2 units is rounded by 0.002, which every P of the row shares before
    it is rounded to 16 bits itself: O is 1 within the budget, but no longer bit for bit.
    """
    inputs = extreme_inputs(BASE, magnitude=magnitude)
    if abs(magnitude) > 1e3:
        inputs = inputs._replace(expected=None)
    fa3.check(BASE, inputs)


def test_large_random_scores(fa3):
    q, k, v = normal_inputs(BASE)[:3]
    fa3.check(BASE, Inputs(q * 30, k * 30, v))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 2.0])
def test_scale(fa3, scale):
    """A negative scale turns the order of the scores round; 0 must not make 0 · −inf of a mask."""
    fa3.check(replace(BASE, softmax_scale=scale))


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 15.0},
        {"softcap": 2.0, "softmax_scale": -0.5},
        {"softcap": 5.0, "softmax_scale": 0.0},
    ],
)
def test_softcap(fa3, changes):
    fa3.check(replace(BASE, **changes))


def test_softcap_extreme_scores(fa3):
    """Scores far beyond the cap all become the cap: tanh is exact there, both signs."""
    problem = replace(BASE, softcap=15.0)
    for magnitude in (1e3, -1e3):
        fa3.check(problem, extreme_inputs(problem, magnitude=magnitude))


def test_offsets_beyond_32_bits(fa3):
    """Rows of K 2²⁵ elements apart: the last ones are more than 2³¹ elements from the first."""
    problem = replace(BASE, seqlen_q=9, seqlen_k=70, heads_q=1)
    inputs = index_coded_inputs(problem)
    far = torch.empty(70 << 25, dtype=inputs.k.dtype).as_strided(
        inputs.k.shape, (70 << 25, 1 << 25, 64, 1)
    )
    far.copy_(inputs.k)
    fa3.check(problem, inputs._replace(k=far))


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(fa3, completion):
    """Copies and products that complete as late as they may, or at random, change no bit."""
    problem = replace(BASE, seqlen_q=230, seqlen_k=730)
    inputs = normal_inputs(problem)
    out, lse, _ = fa3.run(problem, inputs)
    other_out, other_lse, launch = fa3.run(problem, inputs, completion=completion)
    assert launch.hazards == []
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)
