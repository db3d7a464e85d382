"""FA3's timeline, as the simulator's trace and the machine model give it.

What is asserted is the schedule's shape, which the constants of the model hardly change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cute_fa import fa3
from cute_fa.bench.model import model_forward
from cute_fa.problem import AttentionProblem
from cute_fa.sim.timeline import overlap, replay
from tests.timelines import of, steady_lanes, words

SVG = Path(fa3.__file__).with_name("timeline.svg")
PROBLEM = AttentionProblem(1, 128, 1408, 1, 1, 128, 128, "bfloat16")


@pytest.fixture(scope="module")
def forward():
    return model_forward(PROBLEM, "fa3", "sm_90a")


@pytest.fixture(scope="module")
def lanes(forward):
    return steady_lanes(forward)


def test_softmax_runs_beside_the_other_consumers_products(lanes):
    """While one computes exponentials, the tensor core works: on its own O += P V (overlap within
    a consumer), then for the other one (ping-pong)."""
    assert {"load", "consumer0", "consumer1", "tensor core", "copies"} <= set(lanes)
    tensor = lanes["tensor core"]
    for me, other in (("consumer0", "consumer1"), ("consumer1", "consumer0")):
        softmax = of(lanes[me], "softmax")
        assert len(softmax) >= 2
        assert overlap(softmax, of(tensor, "product")) > 0.8
        assert overlap(softmax, of(tensor, "product", me)) > 0.25
        assert overlap(softmax, of(tensor, "product", other)) > 0.25


def test_the_consumers_alternate(lanes):
    issuers = [one.detail for one in of(lanes["tensor core"], "product")]
    turns = [name for i, name in enumerate(issuers) if i == 0 or issuers[i - 1] != name]
    assert set(turns) == {"consumer0", "consumer1"}
    assert len(turns) >= 4


def test_v_of_fp8_is_there_in_time():
    """V has to be turned before it is multiplied. That it is asked for before its block's K keeps
    copies at five eighths of the rate from holding up the products (9 % when it was not)."""
    problem = AttentionProblem(1, 128, 1920, 1, 1, 128, 128, "float8_e4m3fn")
    forward = model_forward(problem, "fa3", "sm_90a")
    slow = replace(forward.timeline.model, copy_bytes=40, copy_latency=800)
    slowed = replay(forward.launch.trace, forward.ctas, slow).cycles
    assert slowed < 1.05 * forward.timeline.cycles


def test_the_picture_in_the_readme_is_of_this_kernel(forward):
    """Drawn by tools/draw_timeline.py: the rows and the note are those of a new drawing."""
    drawn = SVG.read_text()
    assert words(drawn) == words(forward.picture())
    assert "Modelled, not measured" in drawn
