"""CTAs that take several row tiles, and plans that the tile table does not choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.sim.hazards import RULES
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs
from cute_fa.varlen import Packing, VarlenProblem

# Three tiles of 256 rows, of none to two blocks.
BASE = AttentionProblem(1, 700, 200, 1, 1, 64, 64, "float16", causal=True)


@pytest.mark.parametrize("has_own_o", [True, False])
def test_persistent_ctas(fa4, has_own_o):
    """Tiles of unequal length, some without a key, whose Q nobody multiplies; and the same bits as
    from CTAs of one tile each."""
    plan = {"is_persistent": True, "has_own_o": has_own_o, "stages": 4}
    launch = fa4.check(BASE, index_coded_inputs(BASE), sms=2, completion="random", **plan)
    assert launch.grid == (2, 1, 1)
    inputs = normal_inputs(BASE)
    out, lse, _ = fa4.run(BASE, inputs, sms=1, completion="late", **plan)
    other_out, other_lse, launch = fa4.run(BASE, inputs)
    assert launch.grid == (3, 1, 1)
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)


@pytest.mark.parametrize(
    ("dims", "num_q_tiles", "has_own_o", "softcap"),
    [((192, 128), 2, False, 20.0), ((256, 256), 1, True, 0.0)],
    ids=["d192", "d256"],
)
def test_persistent_ctas_of_wide_heads(fa4, dims, num_q_tiles, has_own_o, softcap):
    """The first leave O in Q's place. The second have one Q tile, whose blocks take the S buffers
    in turn: tiles of three blocks begin with either."""
    problem = AttentionProblem(1, 300, 180, 2, 1, *dims, "bfloat16", softcap=softcap)
    config = fa4.config(problem)
    assert (config.num_q_tiles, config.has_own_o) == (num_q_tiles, has_own_o)
    launch = fa4.check(problem, sms=2, completion="random")
    assert launch.grid == (2, 1, 1)


@pytest.mark.parametrize("completion", ["late", "random"])
@pytest.mark.parametrize(
    "changes",
    [{"num_q_tiles": 1, "tile_n": 192, "stages": 3}, {"tile_n": 64, "polynomial_pairs": 16}],
    ids=["one-q-tile", "narrow-blocks"],
)
def test_other_plans(fa4, changes, completion):
    problem = replace(BASE, seqlen_q=260, seqlen_k=530)
    fa4.check(problem, completion=completion, **changes)


# Two heads that share K and V; packed, two sequences that count for nothing among five.
DENSE = replace(BASE, heads_q=2)
VARLEN = VarlenProblem.of(
    AttentionProblem(1, 1, 1, 2, 1, 64, 64, "float16", causal=True),
    Packing.of_lengths((1, 0, 300, 70, 513), (200, 30, 65, 0, 190), (1, 0, 300, 0, 513)),
)
ALONE = {"is_paired": False, "tile_n": 64}
PAIRED = {"is_paired": True, "num_q_tiles": 1, "tile_n": 64, "stages": 3}
ASKING = {"has_launch_control": True, "is_persistent": False}


@pytest.mark.parametrize("completion", ["eager", "late", "random"])
@pytest.mark.parametrize(
    ("problem", "plan"),
    [(DENSE, {}), (VARLEN, {}), (replace(DENSE, causal=False), PAIRED), (VARLEN, PAIRED)],
    ids=["dense", "varlen", "dense-pairs", "varlen-pairs"],
)
def test_launch_control(fa4, problem, plan, completion):
    """CTAs that ask for their next tile, until they are refused: the same bits as from CTAs of one
    tile each, and as much is computed and written. Granted tiles come in any order, and some
    requests are refused in vain, if the policy is random. Of a pair, one CTA asks for both."""
    inputs = normal_inputs(problem)
    expected, expected_lse, single = fa4.run(problem, inputs, **plan)
    cancelled = set()
    for seed in range(3 if completion == "random" else 1):
        how = {"completion": completion, "seed": seed, "checks": frozenset(RULES)}
        out, lse, launch = fa4.run(problem, inputs, **how, **plan, **ASKING)
        assert launch.hazards == []
        assert (launch.grid, launch.cluster) == (single.grid, single.cluster)
        counters = launch.counters
        assert 0 < counters["clusters_cancelled"] < launch.grid[0] // launch.cluster[0]
        for work in ("mma_flops.f16", "exponentials"):
            assert counters[work] == single.counters[work], work
        # No thread is elected for the stores of O: parts of a diverged warp repeat them.
        written = counters.global_bytes_written - single.counters.global_bytes_written
        assert written == 0 or (written > 0 and completion == "random")
        assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(lse.nan_to_num(7.0), expected_lse.nan_to_num(7.0))
        cancelled.add(counters["clusters_cancelled"])
    assert completion != "random" or len(cancelled) > 1


@pytest.mark.parametrize(
    ("dims", "changes"),
    [
        ((128, 128), {"has_own_o": True, "stages": 3}),
        *(((256, 256), changes) for changes in (ALONE, {"has_own_o": True, "stages": 3})),
        ((192, 128), {}),
    ],
    ids=["own-o", "one-q-tile", "pairs-own-o", "d192"],
)
def test_launch_control_of_other_plans(fa4, dims, changes):
    """With O in its own place and without; equal tiles, and one Q tile, whose CTA has 12 warps."""
    problem = AttentionProblem(1, 530, 180, 3, 1, *dims, "bfloat16", causal=dims[0] != 256)
    how = {"completion": "random", "checks": frozenset(RULES)}
    launch = fa4.check(problem, **how, **ASKING, **changes)
    assert launch.counters["clusters_cancelled"] > 0


def test_one_request_per_tile(fa4):
    """A CTA asks once for every tile that it begins; one warp asks, and every warp reads."""
    launch = fa4.check(DENSE, **ASKING)
    (tiles, _, _), warps = launch.grid, launch.block[0] // 32
    # A query whether, and but in the asking warp, a query which.
    queries = tiles * (2 * warps - 1)
    assert launch.counters["warp_instructions.cluster_launch"] == tiles + queries


def test_launch_control_is_an_option_and_no_second_schedule(fa4):
    assert not fa4.config(DENSE).has_launch_control
    with pytest.raises(InvalidArgumentError, match="two ways to more tiles"):
        fa4.config(DENSE, has_launch_control=True, is_persistent=True)
    config = fa4.config(DENSE, **ASKING)
    assert list(config.roles["scheduler"]) == [15] and "idle" not in config.roles
    assert config.smem_bytes - fa4.config(DENSE, is_persistent=True).smem_bytes == 72
