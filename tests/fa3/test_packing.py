"""Query heads that share row tiles: masks by query, results by head."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa3_hbm_traffic
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs
from cute_fa.varlen import Packing, VarlenProblem

BASE = AttentionProblem(2, 37, 300, 8, 2, 64, 64, "bfloat16", causal=True)


@pytest.mark.parametrize("group", [8, 16, 64])
def test_groups(fa3, group):
    """Groups of fewer heads than a thread's two rows are apart, as many, and more; 37 queries end
    in the middle of a strip. Two K/V heads, so that each group has neighbours."""
    problem = replace(BASE, batch=1, heads_q=2 * group, seqlen_q=max(200 // group, 5))
    launch = fa3.check(problem, index_coded_inputs(problem), packed_group=group)
    assert launch.grid[0] == 2 * -(-problem.seqlen_q * group // 192)


@pytest.mark.parametrize(
    "mask",
    [
        {"causal": False, "softcap": 15.0},
        {"causal": False, "window_left": 20, "window_right": 9, "softmax_scale": -0.3},
    ],
    ids=["full-softcap", "window"],
)
def test_masks(fa3, mask):
    fa3.check(replace(BASE, **mask), packed_group=4, sms=3)


def test_a_quarter_of_the_tiles(fa3):
    """Four heads of 37 queries are 148 of 192 rows, and one pass over K and V; bytes are what
    ``fa3_hbm_traffic`` says, with heads packed and apart."""
    problem = replace(BASE, batch=1)
    tiles, read = [], []
    for group in (4, 1):
        launch = fa3.check(problem, packed_group=group)
        traffic = fa3_hbm_traffic(problem, fa3.config(problem, packed_group=group))
        assert launch.counters.global_bytes_read == traffic.read
        assert launch.counters.global_bytes_written == traffic.written
        tiles.append(launch.grid[0])
        read.append(traffic.read)
    assert tiles == [2, 8]
    assert read[1] - read[0] == 6 * 300 * 2 * 128


@pytest.mark.parametrize("layout", ["heads_first", "sliced"])
def test_strides(fa3, layout):
    inputs = normal_inputs(BASE, layouts=(layout, layout, layout))
    fa3.check(BASE, inputs, packed_group=4)


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
def test_packed_sequences(fa3, completion):
    """Rows of (query, head) whose queries end with the sequence, not with the tile."""
    packing = Packing.of_lengths(
        (5, 0, 1, 70, 16), (90, 9, 300, 70, 0), seqused_k=(80, 9, 1, 70, 0)
    )
    problem = VarlenProblem.of(BASE, packing)
    fa3.check(
        problem, index_coded_inputs(problem), packed_group=4, sms=2, completion=completion, seed=5
    )
