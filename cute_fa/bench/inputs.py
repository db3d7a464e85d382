"""Inputs of a shape on a device: standard normal values, the same for every competitor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cute_fa.bench.shapes import Shape
from cute_fa.varlen import VarlenProblem

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class BenchInputs:
    """q (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv); packed: (T, H, D) and, int32 (B + 1,),
    where each sequence begins."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None


def make(shape: Shape, device: torch.device | str, seed: int = 0) -> BenchInputs:
    """Standard normal inputs of a shape; packed sequences have one length for q and k."""
    p = shape.padded
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPES[p.dtype]
    cu_seqlens = None
    rows_q: tuple[int, ...] = (p.batch, p.seqlen_q)
    rows_k: tuple[int, ...] = (p.batch, p.seqlen_k)
    if isinstance(shape.problem, VarlenProblem):
        rows_q, rows_k = (shape.problem.total_q,), (shape.problem.total_k,)
        packing = shape.problem.packing
        assert packing is not None, "a shape to time knows its lengths"
        cu_seqlens = torch.tensor(packing.cu_seqlens_q, dtype=torch.int32, device=device)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return values.to(dtype)

    return BenchInputs(
        normal(*rows_q, p.heads_q, p.head_dim),
        normal(*rows_k, p.heads_k, p.head_dim),
        normal(*rows_k, p.heads_k, p.head_dim_v),
        cu_seqlens,
    )
