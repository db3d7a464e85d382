"""What reaches a kernel: layouts, heads, scales, softcaps, and values that show an error."""

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
from tests.rungs.bench import Bench

# One compiled variant of each rung serves all but the softcap tests. Lengths make two row tiles
# or more, and two blocks of keys, with every rung's own tiles; ``long`` makes several.
BASE = AttentionProblem(1, 70, 130, 2, 1, 64, 64, "float16", causal=True)
LENGTHS = {
    "fa1": {"base": (70, 270), "long": (70, 530)},
    "fa2": {"base": (70, 130), "long": (140, 330)},
    "fa3": {"base": (100, 210), "long": (240, 730)},
    "fa4": {"base": (140, 210), "long": (290, 730)},
}


@pytest.fixture(params=list(LENGTHS), ids=str)
def rung(request) -> Bench:
    return request.getfixturevalue(request.param)


def _problem(rung: Bench, size: str = "base", **changes) -> AttentionProblem:
    seqlen_q, seqlen_k = LENGTHS[rung.generation][size]
    return replace(BASE, **{"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, **changes})


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strides(rung, layout):
    problem = _problem(rung, batch=2)
    rung.check(problem, normal_inputs(problem, layouts=(layout, layout, layout)))


@pytest.mark.parametrize("heads", [(5, 1), (25, 5), (3, 3)], ids=["5to1", "25to5", "mha"])
def test_heads(rung, heads):
    """Which K/V head each query head reads is in V's integers; any head count divides."""
    problem = _problem(rung, seqlen_q=20, seqlen_k=40, heads_q=heads[0], heads_k=heads[1])
    rung.check(problem, index_coded_inputs(problem))


def test_index_coded_columns(rung):
    """Each row picks one column of a several-block sequence, exactly."""
    problem = _problem(rung, "long", batch=2)
    rung.check(problem, index_coded_inputs(problem))


def test_one_hot(rung):
    problem = _problem(rung)
    rung.check(problem, one_hot_inputs(problem))


@pytest.mark.parametrize("magnitude", [1e3, -1e3, 3e4, -3e4])
def test_extreme_scores(rung, magnitude):
    """Rows whose scores are all huge or all very negative: a maximum started at 0 would show.

    At 3e4 a row's maximum in log2 units is rounded by 0.002, which every P of the row shares before
    it is rounded to 16 bits itself: O is 1 within the budget, but no longer bit for bit.
    """
    problem = _problem(rung)
    inputs = extreme_inputs(problem, magnitude=magnitude)
    if abs(magnitude) > 1e3:
        inputs = inputs._replace(expected=None)
    rung.check(problem, inputs)


def test_large_random_scores(rung):
    problem = _problem(rung)
    q, k, v = normal_inputs(problem)[:3]
    rung.check(problem, Inputs(q * 30, k * 30, v))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 2.0])
def test_scale(rung, scale):
    """A negative scale turns the order of the scores round; 0 must not make 0 · −inf of a mask."""
    rung.check(_problem(rung, softmax_scale=scale))


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 15.0},
        {"softcap": 2.0, "softmax_scale": -0.5},
        {"softcap": 5.0, "softmax_scale": 0.0},
    ],
)
def test_softcap(rung, changes):
    rung.check(_problem(rung, **changes))


def test_softcap_extreme_scores(rung):
    """Scores far beyond the cap all become the cap: tanh is exact there, both signs."""
    problem = _problem(rung, softcap=15.0)
    for magnitude in (1e3, -1e3):
        rung.check(problem, extreme_inputs(problem, magnitude=magnitude))


def test_offsets_beyond_32_bits(rung):
    """Rows of K 2²⁵ elements apart: the last ones are more than 2³¹ elements from the first."""
    problem = _problem(rung, seqlen_q=9, seqlen_k=70, heads_q=1)
    inputs = index_coded_inputs(problem)
    far = torch.empty(70 << 25, dtype=inputs.k.dtype).as_strided(
        inputs.k.shape, (70 << 25, 1 << 25, 64, 1)
    )
    far.copy_(inputs.k)
    rung.check(problem, inputs._replace(k=far))


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(rung, completion):
    """Copies and products that complete as late as they may, or at random, change no bit."""
    problem = _problem(rung, "long")
    inputs = normal_inputs(problem)
    out, lse, _ = rung.run(problem, inputs)
    other_out, other_lse, launch = rung.run(problem, inputs, completion=completion)
    assert launch.hazards == []
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)
