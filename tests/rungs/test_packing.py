"""Query heads that share row tiles, on every rung that packs them: masks by query, O by head."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.build.registry import KERNELS
from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs
from cute_fa.varlen import Packing, VarlenProblem
from tests.rungs.bench import Bench

BASE = AttentionProblem(2, 37, 300, 8, 2, 64, 64, "bfloat16", causal=True)
RUNGS = [entry.generation for entry in KERNELS if "packed GQA" in entry.features]


@pytest.fixture(params=RUNGS)
def rung(request) -> Bench:
    return request.getfixturevalue(request.param)


# All that a box of Q holds, and fewer. FA3: as many heads as rows of a thread lie apart, and more.
GROUPS = {"fa3": [8, 16, 64], "fa4": [8, 128]}


@pytest.mark.parametrize(
    ("name", "group"), [(name, group) for name, groups in GROUPS.items() for group in groups]
)
def test_groups(request, name, group):
    """The last query ends within a tile; two K/V heads, so that each group has neighbours."""
    rung = request.getfixturevalue(name)
    problem = replace(BASE, batch=1, heads_q=2 * group, seqlen_q=max(200 // group, 5))
    launch = rung.check(problem, index_coded_inputs(problem), packed_group=group)
    tile_m = rung.config(problem, packed_group=group).tile_m
    assert launch.grid[0] == 2 * -(-problem.seqlen_q * group // tile_m)


@pytest.mark.parametrize(
    "mask",
    [
        {"causal": False, "softcap": 15.0},
        {"causal": False, "window_left": 20, "window_right": 9, "softmax_scale": -0.3},
    ],
    ids=["full-softcap", "window"],
)
def test_masks(rung, mask):
    rung.check(replace(BASE, **mask), packed_group=4, sms=3)


@pytest.mark.parametrize("layout", ["heads_first", "sliced"])
def test_strides(rung, layout):
    inputs = normal_inputs(BASE, layouts=(layout, layout, layout))
    rung.check(BASE, inputs, packed_group=4)


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_packed_sequences(rung, completion):
    """Rows of (query, head) whose queries end with the sequence, not with the tile."""
    packing = Packing.of_lengths(
        (5, 0, 1, 70, 16), (90, 9, 300, 70, 0), seqused_k=(80, 9, 1, 70, 0)
    )
    problem = VarlenProblem.of(BASE, packing)
    rung.check(
        problem, index_coded_inputs(problem), packed_group=4, sms=2, completion=completion, seed=5
    )
