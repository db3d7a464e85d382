"""Quantised inputs, and any rung's FP8 kernel against the FP8 reference, by the public function."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cute_fa
from cute_fa import quant, sim
from cute_fa.fa4.config import POLYNOMIAL_PAIRS
from cute_fa.ops import last_launches
from cute_fa.ops.checks import Call, Options, check_call
from cute_fa.ops.descales import Descales
from cute_fa.ops.launch import kernel_of
from cute_fa.ops.varlen_checks import Lengths, check_varlen_call
from cute_fa.quant import BLOCK_ROWS, QuantizedQKV
from cute_fa.reference import dense, fa4, fp8
from cute_fa.testing.cases import mask_arguments
from cute_fa.testing.inputs import length_arguments
from cute_fa.varlen import VarlenProblem

# rung → how it computes exponentials, as ``fp8.forward`` takes it
EXP2: dict[str, Callable[[Tensor], Tensor]] = {
    "fa3": torch.exp2,
    "fa4": partial(fa4.exp2_of_block, cubic=fa4.is_cubic(128, POLYNOMIAL_PAIRS["sm_100a"])),
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 17)},
    "left": {"window_size": (70, -1)},
    "softcap": {"softcap": 5.0, "causal": True},
}


def quantized(
    batch: int = 1,
    seqlen_q: int = 100,
    seqlen_k: int = 210,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (64, 64),
    block_rows: int | None = None,
) -> QuantizedQKV:
    """Standard normal inputs; rows and heads of several sizes, so that descales differ."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, count: int, dim: int) -> Tensor:
        sizes = 1.0 + torch.arange(count)[:, None] + torch.arange(rows)[:, None, None] // BLOCK_ROWS
        return torch.randn(batch, rows, count, dim, generator=generator) * sizes

    q = normal(seqlen_q, heads[0], dims[0])
    k, v = (normal(seqlen_k, heads[1], dim) for dim in dims)
    return quant.quantize_qkv(q, k, v, block_rows=block_rows, is_rotated=False)


def attention(inputs: QuantizedQKV, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) by the kernel, which must cause no hazard; with lengths, of packed sequences."""
    q, k, v, *descales = inputs
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    is_packed = "cu_seqlens_q" in options
    function = cute_fa.flash_attn_varlen_func if is_packed else cute_fa.flash_attn_func
    out, lse = function(q, k, v, return_lse=True, **named, **options)
    assert all(launch.hazards == [] for launch in last_launches()) and last_launches()
    return out, lse


def check(
    inputs: QuantizedQKV,
    *,
    generation: str,
    pack_gqa: bool | None = None,
    **mask: Any,
) -> None:
    """The kernel against the same arithmetic in PyTorch, where P rounds alike but for the last bits
    of its exponentials."""
    got = attention(inputs, generation=generation, pack_gqa=pack_gqa, **mask)
    options = Options(generation=generation, pack_gqa=pack_gqa, **mask)
    call = check_call(*inputs[:3], options, descales=Descales(*inputs[3:]))
    _assert_agree(got, fp8.forward(*inputs, **_arithmetic(call), **mask))


def check_packed(
    problem: VarlenProblem,
    inputs: QuantizedQKV,
    *,
    generation: str,
    pack_gqa: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``check``, of packed sequences; (out, lse)."""
    mask, lengths = mask_arguments(problem), length_arguments(problem)
    how: dict[str, Any] = {"generation": generation, "pack_gqa": pack_gqa, **mask}
    got = attention(inputs, **lengths, **how)
    descales = Descales(*inputs[3:])
    call = check_varlen_call(*inputs[:3], Lengths(**lengths), Options(**how), descales=descales)
    packing = problem.require_packing()
    _assert_agree(got, fp8.varlen_forward(*inputs, packing=packing, **_arithmetic(call), **mask))
    return got


def _arithmetic(call: Call) -> dict[str, Any]:
    """What the reference has to know of the kernel that serves a call."""
    return {
        "exp2": EXP2[call.generation],
        "tile_n": kernel_of(call).config.tile_n,
        "block_rows": BLOCK_ROWS if call.has_block_descales else None,
    }


def _assert_agree(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    (out, lse), (expected, expected_lse) = got, wanted
    assert out.dtype == torch.bfloat16
    error, size = (x.double().square().mean().sqrt() for x in (out - expected, expected))
    assert error <= 2.0**-10 * size
    # One P that rounds the other way, or one rounding of the output.
    assert (out - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def check_completion(
    inputs: QuantizedQKV, *, generation: str, arch: str, completion: str, **mask: Any
) -> None:
    """Copies and products that complete as late as they may, or at random, change no bit."""
    results = []
    for policy in ("eager", completion):
        with sim.Device(arch, completion=policy, seed=1) as device:
            results.append(attention(inputs, generation=generation, **mask))
        assert device.launches and all(launch.hazards == [] for launch in device.launches)
    assert all(map(torch.equal, *results))


def check_missing_descales(generation: str) -> None:
    """None stands for 1."""
    q, k, v, *_ = quantized(heads=(2, 2))
    options = {"generation": generation, "causal": True, "softmax_scale": 1e-3}
    ones = torch.ones(1, 2)
    out, _ = attention(QuantizedQKV(q, k, v, ones, ones, ones), **options)
    assert torch.equal(out, cute_fa.flash_attn_func(q, k, v, **options))


def _spelled(count: int, dim: int) -> Tensor:
    """(count, D) of ±1, the digits of each number: no row agrees better than with itself."""
    return 1.0 - 2.0 * ((torch.arange(count)[:, None] >> (torch.arange(dim) % 10)) & 1)


def check_picks(dims: tuple[int, int], generation: str) -> None:
    """Each row picks its key exactly. Which key, which head and which column are in V's digits,
    small integers that e4m3 has: a key or a column out of its order would show."""
    seqlen_q, seqlen_k, heads = 90, 333, 2
    picked = torch.randperm(seqlen_k, generator=torch.Generator().manual_seed(1))[:seqlen_q]
    k = _spelled(seqlen_k, dims[0])[None, :, None].expand(-1, -1, heads, -1)
    column = torch.arange(dims[1])
    numbers = torch.arange(seqlen_k)[:, None, None] + 7 * torch.arange(heads)[:, None]
    v = (((numbers + column // 3) >> (4 * (column % 3))) & 15)[None].float()
    stored = [x.to(torch.float8_e4m3fn) for x in (k[:, picked], k.contiguous(), v)]
    out = cute_fa.flash_attn_func(*stored, softmax_scale=32.0, generation=generation)
    assert torch.equal(out.float(), v[:, picked])


def check_close_to_exact(generation: str) -> None:
    """To exact attention on the numbers that are stored."""
    inputs = quantized(block_rows=BLOCK_ROWS)
    out, lse = attention(inputs, generation=generation)
    exact = [
        quant.dequantize(x, descale, block_rows=BLOCK_ROWS).double()
        for x, descale in zip(inputs[:3], inputs[3:], strict=True)
    ]
    golden, golden_lse = dense.attention(*exact)
    # P rounds by 2^-4 at most, independently: the error of a weighted mean of V.
    assert (out - golden).abs().max() < 2.0**-4 * exact[2].abs().max()
    assert torch.allclose(lse.double(), golden_lse, atol=1e-4)
