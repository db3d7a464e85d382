"""The FA1 forward kernel, its PTX run in the simulator, against the fp64 reference.

Outputs and workspace arrive as NaN, strided inputs have NaN in every gap, and the device is strict:
any hazard ends a test.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.fa1.config import pick_fwd
from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa1_hbm_traffic, fa2_hbm_traffic
from cute_fa.target import TARGETS
from cute_fa.testing.inputs import Inputs, extreme_inputs, index_coded_inputs
from tests.rungs.bench import Bench

# Small tiles: many blocks, and thus all edges, at small sizes.
SMALL = {"tile_m": 32, "tile_n": 64, "tile_dv": 32}


def _problem(seqlen_q: int, seqlen_k: int, **features) -> AttentionProblem:
    values = {
        "batch": 1,
        "heads_q": 2,
        "heads_k": 1,
        "head_dim": 32,
        "head_dim_v": 32,
        "dtype": "float16",
        **features,
    }
    return AttentionProblem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **values)


def _check(fa1: Bench, problem: AttentionProblem, inputs: Inputs | None = None, **how) -> int:
    """Checks the result, and that bytes are as counted; how many they are."""
    plan = how.pop("plan", SMALL)
    launch = fa1.check(problem, inputs, **how, **plan)
    traffic = fa1_hbm_traffic(problem, fa1.config(problem, **plan))
    moved = (launch.counters.global_bytes_read, launch.counters.global_bytes_written)
    assert moved == (traffic.read, traffic.written)
    return sum(moved)


# The tiles that pick_fwd chooses, with each way that a head dim can lie in them: a panel of 32, of
# 64, three panels, several chunks of tile_dv, padding of Q/K and V by different amounts. Masks and
# dtypes alternate: they do not know the head dim. Sk is the least that makes two K/V blocks.
HEAD_DIMS = [
    (8, 8, 260, "float16", False),
    (40, 72, 200, "bfloat16", True),
    (64, 64, 260, "bfloat16", False),
    (96, 96, 200, "float16", True),
    (128, 128, 130, "bfloat16", True),
    (192, 128, 70, "float16", False),
    (256, 256, 70, "bfloat16", False),
]


@pytest.mark.parametrize(("head_dim", "head_dim_v", "seqlen_k", "dtype", "causal"), HEAD_DIMS)
def test_head_dims(fa1, head_dim, head_dim_v, seqlen_k, dtype, causal):
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    problem = _problem(40, seqlen_k, heads_q=1, dtype=dtype, causal=causal, **dims)
    _check(fa1, problem, plan={})


# One row, one column, primes over and under the tiles, and lengths of 0 on either side.
LENGTHS = [(1, 1), (1, 200), (200, 1), (131, 67), (67, 131), (64, 128), (5, 0), (0, 5), (0, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(fa1, lengths, causal):
    _check(fa1, _problem(*lengths, causal=causal))


# Rows before the first key (Sq > Sk), K/V blocks that no row sees (Sk > Sq with a left bound),
# bands narrower than, as wide as and wider than a tile, and bounds at the edge of 32 bits.
WINDOWS = [
    ((150, 150), {"window_left": 20}),
    ((90, 300), {"window_left": 20}),
    ((150, 90), {"window_right": 20}),
    ((150, 150), {"window_left": 10, "window_right": 33}),
    ((150, 70), {"window_left": 64, "window_right": 0}),
    ((100, 140), {"window_left": 0, "causal": True}),
    ((70, 90), {"window_left": 2**31 - 1, "window_right": 2**31 - 1}),
]


@pytest.mark.parametrize(("lengths", "window"), WINDOWS, ids=str)
def test_windows(fa1, lengths, window):
    _check(fa1, _problem(*lengths, dtype="bfloat16", **window))


@pytest.mark.parametrize(
    "features",
    [
        {"softcap": 5.0},
        {"softcap": 15.0, "causal": True, "softmax_scale": -0.3},
        {"softmax_scale": 0.0, "causal": True},
        {"softmax_scale": -0.3},
        {"heads_q": 25, "heads_k": 5},
        {"heads_q": 6, "heads_k": 6, "batch": 2},
        {"heads_q": 7, "heads_k": 1, "batch": 2},
    ],
    ids=str,
)
def test_scores_and_heads(fa1, features):
    _check(fa1, _problem(45, 140, **features))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_index_coded_inputs(fa1, causal):
    problem = _problem(70, 190, batch=2, heads_q=4, heads_k=2, causal=causal)
    _check(fa1, problem, index_coded_inputs(problem))


@pytest.mark.parametrize("magnitude", [1e8, -1e8])
def test_extreme_scores(fa1, magnitude):
    problem = _problem(40, 190, causal=True)
    _check(fa1, problem, extreme_inputs(problem, magnitude=magnitude))


@pytest.mark.parametrize("tile_n", [64, 128])
def test_tile_sizes(fa1, tile_n):
    """Any legal tiles: the same attention, and the bytes that the paper counts for them."""
    plan = {"tile_m": 64, "tile_n": tile_n, "tile_dv": 32}
    _check(fa1, _problem(150, 300, causal=True), plan=plan)


def test_one_compile_serves_every_shape():
    """Nothing but dtype, head dims and the kind of mask reaches the config."""
    small, large = _problem(3, 5), _problem(4000, 7000, batch=9, heads_q=32, heads_k=8)
    assert pick_fwd(small.variant, TARGETS["sm_80"]) == pick_fwd(large.variant, TARGETS["sm_80"])


def test_traffic_falls_as_tiles_grow(fa1):
    """Θ(N²d²/M), measured: bytes beyond the one-time part are proportional to the passes, and FA2's
    loop at the same tiles would move little more than half of FA1's."""
    problem = _problem(256, 256, heads_q=1)
    moved = {
        tile_n: _check(fa1, problem, plan={**SMALL, "tile_n": tile_n}) for tile_n in (64, 128, 256)
    }
    assert moved[256] == problem.ideal_hbm_bytes()
    per_pass = moved[128] - moved[256]
    assert moved[64] - moved[256] == 3 * per_pass
    rows = problem.seqlen_q
    assert per_pass == rows * (2 * 32 + 2 * (4 * 32 + 8))  # Q read again; O, m, l out and in
    config = replace(fa1.config(problem, **SMALL), tile_m=64)
    assert fa2_hbm_traffic(problem, config).total < 0.6 * moved[64]
