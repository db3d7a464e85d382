"""The dense reference against PyTorch's own attention, finite differences and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from cute_fa.reference.dense import (
    DenseAttention,
    attention,
    attention_backward,
    attention_low_precision,
    visible_mask,
)

SHAPES = [
    # B, Sq, Sk, Hq, Hk, D, Dv
    (2, 5, 5, 3, 3, 8, 8),
    (1, 7, 13, 4, 2, 16, 8),
    (1, 13, 7, 4, 1, 8, 24),
    (2, 1, 9, 2, 2, 8, 8),
    (1, 6, 1, 2, 1, 8, 8),
]
# Finite differences cost a forward per input element.
TINY_SHAPES = [(1, 3, 5, 4, 2, 2, 3), (1, 5, 3, 2, 1, 3, 2), (2, 1, 1, 1, 1, 2, 2)]
MASKS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (0, None)},
    {"window_size": (-1, 3)},
    {"causal": True, "window_size": (3, 5)},
]


def make_inputs(shape, dtype=torch.float64, seed=0):
    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(batch, seqlen_q, heads_q, head_dim),
        normal(batch, seqlen_k, heads_k, head_dim),
        normal(batch, seqlen_k, heads_k, head_dim_v),
    )


def brute_force_mask(seqlen_q, seqlen_k, causal=False, window_size=(-1, -1)):
    left, right = (math.inf if b in (None, -1) else b for b in window_size)
    right = min(right, 0) if causal else right
    return torch.tensor(
        [
            [-left <= j - (i + seqlen_k - seqlen_q) <= right for j in range(seqlen_k)]
            for i in range(seqlen_q)
        ]
    )


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_sdpa_in_fp64(shape, mask):
    q, k, v = make_inputs(shape)
    visible = brute_force_mask(shape[1], shape[2], **mask)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
            scale=0.3,
            enable_gqa=True,
        ).transpose(1, 2)
    out, lse = attention(q, k, v, softmax_scale=0.3, **mask)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(lse == -math.inf, ~visible.any(dim=1).expand_as(lse))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_equals_flex_attention(shape, mask, softcap):
    q, k, v = make_inputs(shape, torch.float32)
    visible = brute_force_mask(shape[1], shape[2], **mask)

    def score_mod(score, b, h, i, j):
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        return torch.where(visible[i, j], score, -math.inf)

    expected, aux = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=score_mod,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    out, lse = attention(q, k, v, softcap=softcap, **mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, aux.lse, rtol=1e-5, atol=1e-6)


def test_visible_mask_equals_brute_force():
    for seqlen_q in (0, 1, 4, 7):
        for seqlen_k in (0, 1, 5, 8):
            for mask in MASKS:
                got = visible_mask(seqlen_q, seqlen_k, **mask)
                expected = brute_force_mask(seqlen_q, seqlen_k, **mask)
                assert torch.equal(got, expected.reshape(seqlen_q, seqlen_k))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mask", MASKS[:3], ids=str)
@pytest.mark.parametrize("shape", TINY_SHAPES, ids=str)
def test_gradcheck_in_fp64(shape, mask, softcap):
    q, k, v = (x.requires_grad_() for x in make_inputs(shape))
    visible_rows = brute_force_mask(shape[1], shape[2], **mask).any(dim=1)

    def outputs(q, k, v):
        out, lse = DenseAttention.apply(
            q, k, v, None, mask.get("causal", False), mask.get("window_size", (-1, -1)), softcap
        )
        # -inf rows have no finite difference; their gradient is checked to be zero below.
        return out, lse[..., visible_rows]

    assert torch.autograd.gradcheck(outputs, (q, k, v), atol=1e-6, rtol=1e-4, fast_mode=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_equals_autograd_through_the_forward(shape):
    features = {"window_size": (4, 1), "softcap": 2.0, "softmax_scale": 0.7}
    q, k, v = (x.requires_grad_() for x in make_inputs(shape))
    out, _ = attention(q, k, v, **features)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    visible_rows = brute_force_mask(shape[1], shape[2], window_size=(4, 1)).any(dim=1)
    assert visible_rows.any()
    expected = torch.autograd.grad((out[:, visible_rows] * dout[:, visible_rows]).sum(), (q, k, v))
    got = attention_backward(dout, q, k, v, **features)
    for name, one, other in zip("qkv", got, expected, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(), rtol=1e-9, atol=1e-11, msg=f"d{name}")


def test_rows_that_see_nothing_are_zero_and_take_no_gradient():
    q, k, v = make_inputs((1, 9, 4, 2, 1, 8, 16))
    out, lse = attention(q, k, v, causal=True)
    empty = 9 - 4  # the first rows' diagonals lie before column 0
    assert (out[:, :empty] == 0).all() and (lse[..., :empty] == -math.inf).all()
    assert torch.isfinite(lse[..., empty:]).all() and (out[:, empty:] != 0).all()
    dq, dk, dv = attention_backward(
        torch.ones_like(out), q, k, v, causal=True, dlse=torch.ones_like(lse)
    )
    assert (dq[:, :empty] == 0).all()
    for gradient in (dq, dk, dv):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_invisible_columns_never_leak(poison, softcap):
    features = {"causal": True, "softcap": softcap}
    q, k, v = make_inputs((1, 6, 6, 2, 1, 8, 8))
    clean_out, clean_lse = attention(q, k, v, **features)
    k[:, 4:], v[:, 4:] = poison, poison
    out, lse = attention(q, k, v, **features)
    torch.testing.assert_close(out[:, :4], clean_out[:, :4], rtol=0, atol=1e-14)
    torch.testing.assert_close(lse[..., :4], clean_lse[..., :4], rtol=0, atol=1e-14)
    dout = torch.ones_like(out)
    dq, _, _ = attention_backward(dout, q, k, v, **features)
    assert torch.isfinite(dq[:, :4]).all()


def test_visible_poison_does_reach_the_output():
    q, k, v = make_inputs((1, 6, 6, 2, 1, 8, 8))
    v[:, 4, :, 3] = math.nan
    v[:, 5, :, 2] = math.inf
    out, _ = attention(q, k, v, causal=True)
    assert torch.isfinite(out[:, :4]).all()
    assert out[:, 4:, :, 3].isnan().all()
    assert (out[:, 5, :, 2] == math.inf).all()
    assert torch.isfinite(out[:, 4:, :, :2]).all()


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(sizes):
    batch, seqlen_q, seqlen_k = sizes
    q, k, v = make_inputs((batch, seqlen_q, seqlen_k, 4, 2, 8, 16))
    for function in (attention, attention_low_precision):
        out, lse = function(q, k, v, causal=True)
        assert out.shape == (batch, seqlen_q, 4, 16) and (out == 0).all()
        assert lse.shape == (batch, 4, seqlen_q) and (lse == -math.inf).all()
    gradients = attention_backward(torch.ones_like(out), q, k, v, causal=True)
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32_and_rounded_once(dtype):
    q, k, v = make_inputs((1, 33, 47, 2, 1, 32, 32), dtype)
    gold, gold_lse = attention(q.double(), k.double(), v.double(), causal=True)
    out, lse = attention(q, k, v, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    spacing = torch.finfo(dtype).eps * gold.abs()
    # one rounding is half a spacing; the fp32 computation before it adds a little
    assert ((out.double() - gold).abs() <= 0.51 * spacing + 1e-7).all()
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-5)
    rough, rough_lse = attention_low_precision(q, k, v, causal=True)
    assert rough.dtype == dtype and rough_lse.dtype == torch.float32
    assert (rough.double() - gold).abs().max() > (out.double() - gold).abs().max()


def test_lse_is_the_natural_logarithm_of_the_row_sum():
    q = torch.zeros(1, 2, 1, 8)
    k = torch.randn(1, 5, 1, 8, generator=torch.Generator().manual_seed(0))
    _, lse = attention(q, k, k)
    torch.testing.assert_close(lse, torch.full((1, 1, 2), math.log(5)))


def test_every_argument_changes_the_result():
    q, k, v = make_inputs((1, 8, 8, 1, 1, 8, 8))
    plain, _ = attention(q, k, v)
    for change in (
        {"softmax_scale": 1.0},
        {"softmax_scale": 0.0},
        {"causal": True},
        {"window_size": (1, -1)},
        {"window_size": (-1, 1)},
        {"softcap": 0.5},
    ):
        assert not torch.allclose(attention(q, k, v, **change)[0], plain), change


def test_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in make_inputs((1, 2, 2, 1, 1, 8, 8)))
    out, _ = DenseAttention.apply(q, k, v, None, False, (-1, -1), 0.0)
    (dq,) = torch.autograd.grad((out * out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
