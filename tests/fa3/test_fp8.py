"""FA3 on FP8 inputs, through the public function, against the FP8 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cute_fa
from cute_fa import quant, sim
from cute_fa.ops import last_launches
from cute_fa.quant import BLOCK_ROWS, QuantizedQKV
from cute_fa.reference import dense, fp8

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 17)},
    "left": {"window_size": (70, -1)},
    "softcap": {"softcap": 5.0, "causal": True},
}


def _quantized(
    batch: int = 1,
    seqlen_q: int = 100,
    seqlen_k: int = 210,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (64, 64),
    block_rows: int | None = None,
) -> QuantizedQKV:
    """Standard normal inputs; rows and heads of several sizes, so that descales differ."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, count: int, dim: int) -> torch.Tensor:
        sizes = 1.0 + torch.arange(count)[:, None] + torch.arange(rows)[:, None, None] // BLOCK_ROWS
        return torch.randn(batch, rows, count, dim, generator=generator) * sizes

    q = normal(seqlen_q, heads[0], dims[0])
    k, v = (normal(seqlen_k, heads[1], dim) for dim in dims)
    return quant.quantize_qkv(q, k, v, block_rows=block_rows, is_rotated=False)


def _attention(inputs: QuantizedQKV, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the kernel, which must cause no hazard."""
    q, k, v, *descales = inputs
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out, lse = cute_fa.flash_attn_func(q, k, v, return_lse=True, **named, **options)
    assert all(launch.hazards == [] for launch in last_launches()) and last_launches()
    return out, lse


def _check(inputs: QuantizedQKV, **options: Any) -> None:
    """The kernel against the same arithmetic in PyTorch, where P rounds alike but for the last bits
    of its exponentials."""
    out, lse = _attention(inputs, **options)
    block_rows = None if inputs.q_descale.ndim == 2 else BLOCK_ROWS
    options.pop("pack_gqa", None)
    expected, expected_lse = fp8.forward(*inputs, block_rows=block_rows, **options)
    assert out.dtype == torch.bfloat16
    error, size = (x.double().square().mean().sqrt() for x in (out - expected, expected))
    assert error <= 2.0**-10 * size
    # One P that rounds the other way, or one rounding of the output.
    assert (out - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    """Odd lengths, a group of heads, more queries than keys and fewer."""
    _check(_quantized(), **MASKS[mask])
    _check(_quantized(seqlen_q=200, seqlen_k=131), **MASKS[mask])


@pytest.mark.parametrize("mask", ["full", "causal", "softcap"])
def test_descales_of_blocks(mask):
    _check(_quantized(batch=2, seqlen_q=200, seqlen_k=300, block_rows=BLOCK_ROWS), **MASKS[mask])


@pytest.mark.parametrize(
    "dims", [(16, 16), (48, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str
)
def test_head_dims(dims):
    _check(_quantized(seqlen_k=290, heads=(1, 1), dims=dims), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_without_a_sign(scale):
    _check(_quantized(heads=(1, 1)), causal=True, softmax_scale=scale)


@pytest.mark.parametrize("pack_gqa", [True, False])
def test_heads(pack_gqa):
    inputs = _quantized(seqlen_q=30, heads=(8, 2), block_rows=BLOCK_ROWS)
    _check(inputs, causal=True, pack_gqa=pack_gqa)
    _check(_quantized(seqlen_q=30, heads=(8, 2)), causal=True, pack_gqa=pack_gqa)


def test_no_descale_is_one():
    q, k, v, *_ = _quantized(heads=(2, 2))
    ones = torch.ones(1, 2)
    out, _ = _attention(QuantizedQKV(q, k, v, ones, ones, ones), causal=True, softmax_scale=1e-3)
    plain = cute_fa.flash_attn_func(q, k, v, causal=True, softmax_scale=1e-3)
    assert torch.equal(out, plain)


def _spelled(count: int, dim: int) -> torch.Tensor:
    """(count, D) of ±1, the digits of each number: no row agrees better than with itself."""
    return 1.0 - 2.0 * ((torch.arange(count)[:, None] >> (torch.arange(dim) % 10)) & 1)


@pytest.mark.parametrize("dims", [(64, 64), (128, 96)], ids=str)
def test_each_row_picks_its_key_exactly(dims):
    """Which key, which head and which column are in V's digits, small integers that e4m3 has: a key
    or a column out of its order would show."""
    seqlen_q, seqlen_k, heads = 90, 333, 2
    picked = torch.randperm(seqlen_k, generator=torch.Generator().manual_seed(1))[:seqlen_q]
    k = _spelled(seqlen_k, dims[0])[None, :, None].expand(-1, -1, heads, -1)
    column = torch.arange(dims[1])
    numbers = torch.arange(seqlen_k)[:, None, None] + 7 * torch.arange(heads)[:, None]
    v = (((numbers + column // 3) >> (4 * (column % 3))) & 15)[None].float()
    stored = [x.to(torch.float8_e4m3fn) for x in (k[:, picked], k.contiguous(), v)]
    out = cute_fa.flash_attn_func(*stored, softmax_scale=32.0)
    assert torch.equal(out.float(), v[:, picked])


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(completion):
    """Copies and products that complete as late as they may, or at random, change no bit."""
    inputs = _quantized(seqlen_q=240, seqlen_k=730)
    results = []
    for policy in ("eager", completion):
        with sim.Device("sm_90a", completion=policy, seed=1) as device:
            results.append(_attention(inputs, causal=True))
        assert device.launches and all(launch.hazards == [] for launch in device.launches)
    assert all(map(torch.equal, *results))


def test_close_to_exact_attention_on_the_numbers_stored():
    inputs = _quantized(block_rows=BLOCK_ROWS)
    out, lse = _attention(inputs)
    exact = [
        quant.dequantize(x, descale, block_rows=BLOCK_ROWS).double()
        for x, descale in zip(inputs[:3], inputs[3:], strict=True)
    ]
    golden, golden_lse = dense.attention(*exact)
    # P rounds by 2^-4 at most, independently: the error of a weighted mean of V.
    assert (out - golden).abs().max() < 2.0**-4 * exact[2].abs().max()
    assert torch.allclose(lse.double(), golden_lse, atol=1e-4)
