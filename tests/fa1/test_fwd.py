"""The FA1 forward kernel, its PTX run in the simulator, against the fp64 reference.

Outputs and workspace arrive as NaN, strided inputs have NaN in every gap, and the device is strict:
any hazard ends a test.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from cute_fa import sim
from cute_fa.fa1.config import Fa1FwdConfig, pick_fwd
from cute_fa.fa1.fwd import Fa1Fwd, fake_arguments
from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa1_hbm_traffic, fa2_hbm_traffic
from cute_fa.target import TARGETS, get_target
from cute_fa.testing.compare import assert_attention_close, assert_bitwise_equal
from cute_fa.testing.inputs import (
    Inputs,
    extreme_inputs,
    index_coded_inputs,
    normal_inputs,
    one_hot_inputs,
)

TFFI = "--enable-tvm-ffi"
# Small tiles: many blocks, and thus all edges, at small sizes.
SMALL = (32, 64)


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


def _config(problem: AttentionProblem, arch: str, tiles: tuple[int, int] | None) -> Fa1FwdConfig:
    config = pick_fwd(problem.variant, get_target(arch))
    return config if tiles is None else config.with_tiles(*tiles)


@cache
def _program(config: Fa1FwdConfig, arch: str, completion: str):
    """(device, compiled kernel); one compile serves every shape, so a worker makes each once."""
    if completion == "eager":
        device = sim.Device(arch, workers=1)
        return device, device.compile(Fa1Fwd(config), *fake_arguments(config), options=TFFI)
    _, program = _program(config, arch, "eager")
    device = sim.Device(arch, workers=1, completion=completion)
    return device, device.bind(program.compiled, program.ptx)


def _run(
    problem: AttentionProblem,
    inputs: Inputs,
    *,
    tiles: tuple[int, int] | None = SMALL,
    arch: str = "sm_80",
    completion: str = "eager",
):
    """(out, lse, launch) of one call."""
    config = _config(problem, arch, tiles)
    device, run = _program(config, arch, completion)
    q, k, v = inputs[:3]
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    out = torch.full((*rows, problem.head_dim_v), math.nan, dtype=q.dtype)
    lse = torch.full((rows[0], rows[2], rows[1]), math.nan)
    workspace = [torch.full(w.shape, math.nan) for w in config.workspace(*rows)]
    device.launches.clear()
    run(
        *(q, k, v, out, lse, *workspace),
        *(problem.scale, problem.softcap),
        *(-1 if bound is None else bound for bound in (problem.window_left, problem.window_right)),
    )
    (launch,) = device.launches
    assert launch.hazards == []
    assert launch.smem_bytes == config.smem_bytes
    return out, lse, launch


def _check(problem: AttentionProblem, inputs: Inputs | None = None, **how) -> None:
    """The result is within its error budget and exact where that is known; bytes are as counted."""
    inputs = inputs or normal_inputs(problem)
    out, lse, launch = _run(problem, inputs, **how)
    assert_attention_close(out, lse, *inputs[:3], problem)
    if inputs.expected is not None:
        assert_bitwise_equal(out, inputs.expected, "out")
    config = _config(problem, how.get("arch", "sm_80"), how.get("tiles", SMALL))
    traffic = fa1_hbm_traffic(problem, config)
    moved = (launch.counters.global_bytes_read, launch.counters.global_bytes_written)
    assert moved == (traffic.read, traffic.written)


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
def test_head_dims(head_dim, head_dim_v, seqlen_k, dtype, causal):
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    problem = _problem(40, seqlen_k, heads_q=1, dtype=dtype, causal=causal, **dims)
    _check(problem, tiles=None)


# One row, one column, primes over and under the tiles, and lengths of 0 on either side.
LENGTHS = [(1, 1), (1, 200), (200, 1), (131, 67), (67, 131), (64, 128), (5, 0), (0, 5), (0, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_lengths(lengths, causal):
    _check(_problem(*lengths, causal=causal))


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
def test_windows(lengths, window):
    _check(_problem(*lengths, dtype="bfloat16", **window))


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
def test_scores_and_heads(features):
    _check(_problem(45, 140, **features))


@pytest.mark.parametrize(
    "layouts",
    [
        ("sliced", "packed", "heads_first"),
        ("sequence_first", "sliced", "packed"),
        ("same_batch", "same_heads", "same_batch"),
    ],
    ids="-".join,
)
def test_layouts(layouts):
    problem = _problem(70, 130, batch=2, heads_q=4, heads_k=2)
    _check(problem, normal_inputs(problem, layouts=layouts))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("make", [index_coded_inputs, one_hot_inputs], ids=["index", "one_hot"])
def test_structured_inputs(make, causal):
    problem = _problem(70, 190, batch=2, heads_q=4, heads_k=2, causal=causal)
    _check(problem, make(problem))


@pytest.mark.parametrize("magnitude", [1e8, -1e8, 1e3, -1e3])
def test_extreme_scores(magnitude):
    problem = _problem(40, 190, causal=True)
    _check(problem, extreme_inputs(problem, magnitude=magnitude))


@pytest.mark.parametrize("tiles", [(64, 64), (64, 128)], ids=str)
def test_tile_sizes(tiles):
    """Any legal tiles: the same attention, and the bytes that the paper counts for them."""
    _check(_problem(150, 300, causal=True), tiles=tiles)


def test_late_completion():
    """cp.async that lands as late as its wait allows changes no bit."""
    problem = _problem(70, 190, causal=True)
    inputs = normal_inputs(problem)
    eager, eager_lse, _ = _run(problem, inputs)
    late, late_lse, _ = _run(problem, inputs, completion="late")
    assert_bitwise_equal(late, eager, "out")
    assert_bitwise_equal(late_lse, eager_lse, "lse")


def test_random_order_of_warps():
    problem = _problem(70, 190, causal=True)
    inputs = normal_inputs(problem)
    eager, eager_lse, _ = _run(problem, inputs)
    mixed, mixed_lse, _ = _run(problem, inputs, completion="random")
    assert_bitwise_equal(mixed, eager, "out")
    assert_bitwise_equal(mixed_lse, eager_lse, "lse")


def test_one_compile_serves_every_shape():
    """Nothing but dtype, head dims and the kind of mask reaches the config."""
    small, large = _problem(3, 5), _problem(4000, 7000, batch=9, heads_q=32, heads_k=8)
    assert pick_fwd(small.variant, TARGETS["sm_80"]) == pick_fwd(large.variant, TARGETS["sm_80"])


def test_traffic_falls_as_tiles_grow():
    """Θ(N²d²/M), measured: bytes beyond the one-time part are proportional to the passes, and FA2's
    loop at the same tiles would move little more than half of FA1's."""
    problem = _problem(256, 256, heads_q=1)
    moved = {}
    for tile_n in (64, 128, 256):
        _check(problem, tiles=(32, tile_n))
        counters = _run(problem, normal_inputs(problem), tiles=(32, tile_n))[2].counters
        moved[tile_n] = counters.global_bytes_read + counters.global_bytes_written
    assert moved[256] == problem.ideal_hbm_bytes()
    per_pass = moved[128] - moved[256]
    assert moved[64] - moved[256] == 3 * per_pass
    rows = problem.seqlen_q
    assert per_pass == rows * (2 * 32 + 2 * (4 * 32 + 8))  # Q read again; O, m, l out and in
    config = replace(_config(problem, "sm_80", SMALL), tile_m=64)
    assert fa2_hbm_traffic(problem, config).total < 0.6 * moved[64]
