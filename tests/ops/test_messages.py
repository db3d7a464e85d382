"""Wrong calls of the public functions say what, got, expected and how to mend it, and compile
nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cute_fa
from cute_fa import AttentionProblem, flash_attn_func, flash_attn_varlen_func
from cute_fa.build import compile, registry
from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.ops import sources
from cute_fa.problem import KernelVariant
from cute_fa.quant import quantize_qkv
from cute_fa.target import get_target


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def dense(*q_k_v: Any, **options: Any) -> Callable[[], Any]:
    """A call on these tensors in place of the first of three that fit."""
    fit = (zeros(1, 8, 4, 64), zeros(1, 8, 2, 64), zeros(1, 8, 2, 64))
    return lambda: flash_attn_func(*q_k_v, *fit[len(q_k_v) :], **options)


def packed(**changes: Any) -> Callable[[], Any]:
    borders = torch.tensor([0, 3, 8], dtype=torch.int32)
    lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
    values = {**lengths, "max_seqlen_q": 5, "max_seqlen_k": 5, **changes}
    q = values.pop("q", zeros(8, 2, 64))
    return lambda: flash_attn_varlen_func(q, zeros(8, 2, 64), zeros(8, 2, 64), **values)


def fp8(**descales: Any) -> Callable[[], Any]:
    q, k, v = zeros(3, 1, 8, 2, 64).to(torch.float8_e4m3fn)
    return lambda: flash_attn_func(q, k, v, **descales)


def kernel(generation: str = "fa2", direction: str = "fwd", **changes: Any) -> Callable[[], Any]:
    values = {"arch": "sm_80", "dtype": "float16", "head_dim": 64, **changes}
    return lambda: compile(generation, direction, **values)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


CALLS: dict[str, Callable[[], Any]] = {
    "q is None": dense(None),
    "q is a list": dense([[0.0]]),
    "q is numpy's": dense(np.zeros((1, 8, 4, 64))),
    "q of fp64": dense(zeros(1, 8, 4, 64).double()),
    "q of bools": dense(zeros(1, 8, 4, 64).bool()),
    "two dimensions": dense(zeros(4, 64)),
    "three dimensions": dense(zeros(8, 4, 64)),
    "five dimensions": dense(zeros(1, 8, 3, 4, 64)),
    "another batch": dense(zeros(2, 8, 4, 64)),
    "three K/V heads": dense(zeros(1, 8, 4, 64), zeros(1, 8, 3, 64), zeros(1, 8, 3, 64)),
    "no K/V heads": dense(zeros(1, 8, 4, 64), zeros(1, 8, 0, 64), zeros(1, 8, 0, 64)),
    "D 0": dense(zeros(1, 8, 4, 0), zeros(1, 8, 2, 0)),
    "Dv 0": dense(zeros(1, 8, 4, 64), zeros(1, 8, 2, 64), zeros(1, 8, 2, 0)),
    "D 60": dense(zeros(1, 8, 4, 60), zeros(1, 8, 2, 60)),
    "D 264": dense(zeros(1, 8, 4, 264), zeros(1, 8, 2, 264)),
    "D of k": dense(zeros(1, 8, 4, 128)),
    "Sk of v": dense(zeros(1, 8, 4, 64), zeros(1, 9, 2, 64)),
    "k elsewhere": dense(zeros(1, 8, 4, 64), zeros(1, 8, 2, 64).to("meta")),
    "a negated view": dense(torch._neg_view(zeros(1, 8, 4, 64))),
    "a gradient": dense(zeros(1, 8, 4, 64).requires_grad_()),
    "strided elements": dense(zeros(1, 8, 4, 128)[..., ::2]),
    "an odd address": dense(zeros(8 * 4 * 64 + 4)[4:].view(1, 8, 4, 64)),
    "generation fa5": dense(generation="fa5"),
    "generation FA3": dense(generation="FA3"),
    "generation None": dense(generation=None),
    "generation on another architecture": dense(generation="fa3", arch="sm_80"),
    "arch sm_70": dense(arch="sm_70"),
    "arch (9, 0)": dense(arch=(9, 0)),
    "arch sm_80a": dense(arch="sm_80a"),
    "backend gpu": dense(backend="gpu"),
    "backend cuda of CPU tensors": dense(backend="cuda"),
    "a negative bound": dense(window_size=(-3, 0)),
    "one bound": dense(window_size=5),
    "three bounds": dense(window_size=(1, 2, 3)),
    "half a bound": dense(window_size=(1.5, 0)),
    "a negative softcap": dense(softcap=-1.0),
    "softcap NaN": dense(softcap=float("nan")),
    "softcap None": dense(softcap=None),
    "a scale in a string": dense(softmax_scale="1"),
    "a scale in a tensor": dense(softmax_scale=torch.tensor(1.0)),
    "an infinite scale": dense(softmax_scale=float("inf")),
    "causal None": dense(causal=None),
    "return_lse None": dense(return_lse=None),
    "deterministic 1": dense(deterministic=1),
    "pack_gqa yes": dense(pack_gqa="yes"),
    "pack_gqa of FA1": dense(pack_gqa=True, generation="fa1"),
    "pack_gqa of FA2": dense(pack_gqa=True, generation="fa2"),
    "a bundle's path": dense(kernels="folder"),
    "descales of bf16": dense(q_descale=torch.ones(1, 2)),
    "a descale that is a number": fp8(q_descale=1.0),
    "a descale of fp64": fp8(q_descale=torch.ones(1, 2).double()),
    "a descale of one dimension": fp8(q_descale=torch.ones(2)),
    "a descale of 0": fp8(q_descale=torch.zeros(1, 2)),
    "blocks for q alone": fp8(q_descale=torch.ones(1, 2, 1)),
    "a descale elsewhere": fp8(k_descale=torch.ones(1, 2, device="meta")),
    "borders in a list": packed(cu_seqlens_q=[0, 3, 8]),
    "no borders": packed(cu_seqlens_k=None),
    "borders of int64": packed(cu_seqlens_q=torch.tensor([0, 3, 8])),
    "borders in a matrix": packed(cu_seqlens_q=ints(0, 3, 8)[None]),
    "strided borders": packed(cu_seqlens_q=torch.zeros(6, dtype=torch.int32)[::2]),
    "borders that begin with 1": packed(cu_seqlens_q=ints(1, 4, 8)),
    "borders that fall": packed(cu_seqlens_q=ints(0, 9, 8)),
    "no number": packed(cu_seqlens_q=ints()),
    "borders of one sequence": packed(cu_seqlens_q=ints(0, 8)),
    "borders beyond k": packed(cu_seqlens_k=ints(0, 3, 11), max_seqlen_k=8),
    "borders short of q": packed(cu_seqlens_q=ints(0, 3, 7)),
    "a longest that is not": packed(max_seqlen_q=4),
    "a negative longest": packed(max_seqlen_q=-4),
    "a longest of 5.0": packed(max_seqlen_q=5.0),
    "a longest in a tensor": packed(max_seqlen_k=torch.tensor(5)),
    "no longest": packed(max_seqlen_k=None),
    "used rows in a list": packed(seqused_q=[1, 2]),
    "more used than there are": packed(seqused_q=ints(4, 2)),
    "used rows of one sequence": packed(seqused_k=ints(2)),
    "dense q as packed": packed(q=zeros(1, 8, 2, 64)),
    "a bundle without a name": lambda: cute_fa.load_bundle(None),  # type: ignore[arg-type]
    "integers to quantise": lambda: quantize_qkv(*torch.ones(3, 1, 8, 2, 64).int()),
    "a list to quantise": lambda: quantize_qkv([1.0], *zeros(2, 1, 8, 2, 64)),  # type: ignore
    "two dimensions to quantise": lambda: quantize_qkv(*zeros(3, 8, 64)),
    "batches to quantise": lambda: quantize_qkv(
        *(zeros(1, 8, 2, 64), zeros(2, 8, 2, 64), zeros(2, 8, 2, 64))
    ),
    "blocks of no rows": lambda: quantize_qkv(*zeros(3, 1, 8, 2, 64), block_rows=0),
    "a kernel of fa7": kernel("fa7"),
    "a backward": kernel("fa2", "bwd"),
    "a kernel sideways": kernel("fa2", "sideways"),
    "a kernel of fp32": kernel(dtype="float32"),
    "a kernel of D -8": kernel(head_dim=-8),
    "an unknown field": kernel(bogus=1),
    "a field that follows": kernel(is_causal=True),
    "more shared memory than there is": kernel(smem_limit_bytes=10**6),
    "a tile that is a word": kernel(tile_m="x"),
    "packed_group 0": kernel("fa3", arch="sm_90a", packed_group=0),
    "packed_group 0 of FA4": kernel("fa4", arch="sm_100a", packed_group=0),
    "use_cache a": kernel(use_cache="a"),
    "used rows without packing": kernel(seqused_q=True),
    "block descales of fp16": kernel(block_descales=True),
    "three query heads": lambda: AttentionProblem(1, 8, 8, 3, 2, 64, 64, "float16"),
    "a negative batch": lambda: AttentionProblem(-1, 8, 8, 2, 2, 64, 64, "float16"),
    "torch's dtype in a problem": lambda: AttentionProblem(
        *(1, 8, 8, 2, 2, 64, 64, torch.float16)  # type: ignore[arg-type]
    ),
    "a problem that is none": lambda: cute_fa.can_run(None, "sm_80"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_got_expected_and_how_to_mend(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(sources.Compiler, "kernel", refuse)
    monkeypatch.setattr(import_module("cute_fa.build.compile"), "compile_request", refuse)
    with pytest.raises(CuteFAError) as raised:
        call()
    error = raised.value
    assert error.what and error.got is not None, str(error)
    assert error.alternatives or (error.expected is not None and error.fix), str(error)
    assert "packed_group" not in str(error) or "packed_group" in error.what, "an internal word"


@pytest.mark.parametrize(("generation", "arch"), [("fa2", "sm_80"), ("fa3", "sm_90a")])
def test_only_what_can_be_set_is_offered(generation: str, arch: str) -> None:
    entry, target = registry.find(generation), get_target(arch)
    variant = KernelVariant("float16", 64, 64)
    with pytest.raises(InvalidArgumentError) as raised:
        entry.config(variant, target, {"bogus": 1})
    offered = str(raised.value.expected).split(", ")
    assert "tile_n" in offered and "rung" not in offered and "is_causal" not in offered
    own = entry.config(variant, target, {})
    for name in offered:
        value = getattr(own, name)
        other = not value if isinstance(value, bool) else 2 * value
        try:
            assert getattr(entry.config(variant, target, {name: other}), name) == other
        except InvalidArgumentError as error:
            assert "follows from" not in str(error)
