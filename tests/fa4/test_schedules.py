"""CTAs that take several row tiles, and plans that the tile table does not choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import index_coded_inputs, normal_inputs

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
