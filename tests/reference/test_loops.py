"""The papers' algorithms in PyTorch are the dense definition, whatever their tiles."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa.reference import dense, fa1, fa2, fa3, fa4

ALGORITHMS = pytest.mark.parametrize(
    "algorithm", [fa1, fa2, fa3, fa4], ids=["fa1", "fa2", "fa3", "fa4"]
)

# (Sq, Sk, features). Every mask edge meets tiles of 16 × 24 (they divide none of these lengths):
# the diagonal above, on and below the corner, bands narrower and wider than a tile, rows that see
# nothing, and one tile that holds everything. Softcap and scale act before the mask, so one mask
# with each is enough.
CASES = {
    "plain": (50, 70, {}),
    "one_tile": (5, 7, {}),
    "causal": (60, 60, {"causal": True}),
    "causal_more_keys": (30, 75, {"causal": True}),
    "causal_rows_without_keys": (75, 30, {"causal": True}),
    "window_narrow": (60, 60, {"window_size": (3, 2)}),
    "window_wide": (60, 80, {"window_size": (40, 31)}),
    "window_left": (60, 60, {"window_size": (9, None)}),
    "window_right": (70, 50, {"window_size": (None, 5)}),
    "window_causal": (60, 60, {"window_size": (20, -1), "causal": True}),
    "softcap": (40, 50, {"softcap": 1.5, "causal": True}),
    "scale_negative": (40, 50, {"softmax_scale": -0.7, "causal": True}),
    "scale_zero": (40, 50, {"softmax_scale": 0.0}),
    "no_keys": (6, 0, {}),
    "no_queries": (0, 6, {}),
}


def _inputs(seqlen_q, seqlen_k, *, dtype=torch.float64, heads=(4, 2), dims=(16, 24)):
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    shapes = (
        (2, seqlen_q, heads[0], dims[0]),
        (2, seqlen_k, heads[1], dims[0]),
        (2, seqlen_k, heads[1], dims[1]),
    )
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


@ALGORITHMS
@pytest.mark.parametrize("name", CASES)
def test_equals_dense(algorithm, name):
    seqlen_q, seqlen_k, features = CASES[name]
    q, k, v = _inputs(seqlen_q, seqlen_k)
    out, lse = algorithm.forward(q, k, v, tile_m=16, tile_n=24, **features)
    expected, expected_lse = dense.attention(q, k, v, **features)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@ALGORITHMS
@pytest.mark.parametrize("tiles", [(1, 1), (1, 64), (64, 1), (13, 7), (64, 64)])
def test_tiles_do_not_matter(algorithm, tiles):
    q, k, v = _inputs(40, 50)
    features = {"causal": True, "window_size": (21, -1)}
    out, lse = algorithm.forward(q, k, v, tile_m=tiles[0], tile_n=tiles[1], **features)
    expected, expected_lse = dense.attention(q, k, v, **features)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@ALGORITHMS
def test_rows_without_keys_are_zero(algorithm):
    q, k, v = _inputs(75, 30)
    out, lse = algorithm.forward(q, k, v, causal=True, tile_m=16, tile_n=16)
    assert (out[:, :45] == 0).all()
    assert (lse[:, :, :45] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 45:]).all()


@ALGORITHMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_p_only(algorithm, dtype):
    """Against the definition: errors of the size of one rounding of P and one of O, not more."""
    q, k, v = _inputs(40, 50, dtype=dtype)
    out, lse = algorithm.forward(q, k, v, tile_m=16, tile_n=16)
    expected, expected_lse = dense.attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype and lse.dtype == torch.float32
    bound = 2 * torch.finfo(dtype).eps * v.double().abs().max()
    assert (out.double() - expected).abs().max() < bound
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@ALGORITHMS
@pytest.mark.parametrize("rises", [True, False], ids=["rising", "falling"])
def test_scores_that_differ_by_50_from_block_to_block(algorithm, rises):
    """In either direction: what came before a greater maximum is scaled away, not lost; what comes
    after it adds e⁻⁵⁰ of it."""
    q = torch.ones(1, 3, 1, 8, dtype=torch.float64)
    steps = torch.arange(6, dtype=torch.float64) if rises else 5.0 - torch.arange(6)
    v = steps.double().reshape(1, 6, 1, 1).expand(1, 6, 1, 8)
    out, lse = algorithm.forward(q, 50.0 * v, v, softmax_scale=1 / 8, tile_m=2, tile_n=1)
    torch.testing.assert_close(out, torch.full_like(out, 5.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 250.0), rtol=1e-12, atol=0)
