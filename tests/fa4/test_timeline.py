"""FA4's timeline, as the simulator's trace and the machine model give it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from cute_fa import fa4
from cute_fa.bench.counts import count
from cute_fa.bench.model import model_forward
from cute_fa.problem import AttentionProblem
from cute_fa.sim.timeline import overlap
from tests.timelines import of, steady_lanes, words

SVG = Path(fa4.__file__).with_name("timeline.svg")
PROBLEM = AttentionProblem(1, 256, 1408, 1, 1, 128, 128, "bfloat16")


@pytest.fixture(scope="module")
def forward():
    return model_forward(PROBLEM, "fa4", "sm_100a")


@pytest.fixture(scope="module")
def lanes(forward):
    return steady_lanes(forward)


def test_the_tensor_core_works_through_both_softmaxes(lanes):
    """Two Q tiles in flight: products of one fill the time of the other's exponentials."""
    assert {"softmax0", "softmax1", "mma", "load", "tensor core", "copies"} <= set(lanes)
    for name in ("softmax0", "softmax1"):
        softmax = of(lanes[name], "softmax")
        assert len(softmax) >= 3
        assert overlap(softmax, of(lanes["tensor core"], "product")) > 0.4


def test_the_softmaxes_take_turns(lanes):
    """Neither does all of its exponentials while the other does."""
    first, second = (of(lanes[name], "softmax") for name in ("softmax0", "softmax1"))
    assert overlap(first, second) < 0.9
    starts = sorted((one.start, name) for name, row in (("0", first), ("1", second)) for one in row)
    names = [name for _, name in starts]
    assert all(a != b for a, b in pairwise(names))


def test_counts(forward):
    """Exponentials are shared with the FMA pipe, and O is hardly ever rescaled."""
    row = count(forward)
    assert 0.7 < row["exponentials_per_score"] < 1.0
    assert row["rescales_skipped"] > 0.9
    assert row["mma_flops_per_tile"] == 4 * 128**3
    assert row["modelled"]["share_of_tensor_peak"] > 0.5


def test_the_picture_in_the_readme_is_of_this_kernel(forward):
    drawn = SVG.read_text()
    assert words(drawn) == words(forward.picture())
    assert "Modelled, not measured" in drawn
