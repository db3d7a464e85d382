"""Inputs for attention tests: what they hold and how they lie in memory.

Random normal values show rounding. Structured ones show permutation: swapped rows or columns can
leave every norm as it was. Layouts show address arithmetic: whatever lies between the elements of
a view is NaN, so that one element read from there spoils the result.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import AttentionProblem

if TYPE_CHECKING:
    from cute_fa.testing.cases import Case

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

LAYOUTS = (
    "contiguous",
    "heads_first",
    "sequence_first",
    "sliced",
    "packed",
    "same_heads",
    "same_batch",
)

# Integers up to 256 are exact in both half formats; 0 would show the weights of other columns.
CODES = 251


class Inputs(NamedTuple):
    """q (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) and, where it is known without any
    computation, the exact output (B, Sq, Hq, Dv)."""

    q: Tensor
    k: Tensor
    v: Tensor
    expected: Tensor | None = None


def place(x: Tensor, layout: str) -> Tensor:
    """A view with x's shape that lies in memory as ``layout`` says, NaN in every gap.

    "contiguous"; "heads_first" (B, H, S, D) and "sequence_first" (S, B, H, D) storage; "sliced",
    an inner part of a larger tensor in every dimension; "packed", one of three tensors that share
    their rows as q, k, v of one projection do; "same_heads" and "same_batch", the first head or
    batch repeated by a stride of 0, which changes the values. Rows stay 16-byte aligned.

    Args:
        x: (B, S, H, D), D a multiple of 8.
    """
    batch, seqlen, heads, dim = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sequence_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "same_heads":
        return x[:, :, :1].contiguous().expand(x.shape)
    if layout == "same_batch":
        return x[:1].contiguous().expand(x.shape)
    if layout == "sliced":
        storage = x.new_full((batch + 1, seqlen + 3, heads + 2, dim + 8), math.nan)
        view = storage[:batch, 2 : seqlen + 2, 1 : heads + 1, 8:]
    elif layout == "packed":
        storage = x.new_full((batch, seqlen, 3, heads, dim), math.nan)
        view = storage[:, :, 1]
    else:
        raise InvalidArgumentError("unknown layout", got=repr(layout), expected=" | ".join(LAYOUTS))
    view.copy_(x)
    return view


def normal_inputs(
    problem: AttentionProblem, *, seed: int = 0, layouts: tuple[str, str, str] | None = None
) -> Inputs:
    """Standard normal q, k, v, the same for every layout that keeps values.

    Args:
        layouts: of q, k and v, from ``LAYOUTS``.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = _dtype(problem)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for shape in _shapes(problem)
    ]
    q, k, v = (
        place(x, layout) for x, layout in zip(tensors, layouts or ("contiguous",) * 3, strict=True)
    )
    return Inputs(q, k, v)


def one_hot_inputs(problem: AttentionProblem, *, seed: int = 0) -> Inputs:
    """Normal q with K and V of unit rows: the output is the attention matrix itself.

    K[j] is unit vector j mod D and V[j] is unit vector j mod Dv, so that scores are q's own
    elements and O[i, d] is the weight of the columns j ≡ d (mod Dv).
    """
    q = normal_inputs(problem, seed=seed).q
    _, k_shape, v_shape = _shapes(problem)
    return Inputs(q, _unit_rows(k_shape, q.dtype), _unit_rows(v_shape, q.dtype))


def index_coded_inputs(problem: AttentionProblem, *, seed: int = 0) -> Inputs:
    """Each query row picks exactly one column, and V's values tell which, of which head and batch.

    K[j] spells j in ±1, Q[i] spells the chosen column with a factor that puts every other score
    at least 40 below the chosen one; V holds distinct small integers. The output is V's row,
    exactly; a row that sees nothing gives 0. One element out of place is one wrong integer.

    Raises:
        UnsupportedError: softcap flattens the scores, or Sk > 2**D or scale ≤ 0.
    """
    if problem.softcap or problem.seqlen_k > 2**problem.head_dim or problem.scale <= 0:
        raise UnsupportedError(
            "scores cannot be made to pick one column",
            got=f"softcap {problem.softcap}, Sk {problem.seqlen_k}, D {problem.head_dim}, "
            f"scale {problem.scale}",
            expected="softcap 0, Sk ≤ 2**D, scale > 0",
        )
    rng = random.Random(seed)
    dtype = _dtype(problem)
    q_shape, k_shape, v_shape = _shapes(problem)
    batch, seqlen_q, heads_q, head_dim = q_shape
    bits = torch.arange(head_dim) % max(1, (problem.seqlen_k - 1).bit_length())  # (D,)
    spelled = ((torch.arange(problem.seqlen_k)[:, None] >> bits) & 1) * 2.0 - 1.0  # (Sk, D)
    # Codes differ in at least one bit, which is spelled D // bits times or more.
    copies = head_dim // (int(bits.max()) + 1)
    factor = 2.0 ** math.ceil(math.log2(40.0 / (2.0 * problem.scale * copies)))
    if factor > 2.0**15:
        raise UnsupportedError(
            "scores cannot be made to pick one column: q would leave fp16's range",
            got=f"a factor of {factor:.3g} at scale {problem.scale}",
            expected="up to 2**15",
        )
    index = torch.cartesian_prod(*(torch.arange(size) for size in v_shape)).view(*v_shape, 4)
    v = (index * torch.tensor([13, 7, 11, 3])).sum(dim=-1) % CODES + 1  # (B, Sk, Hk, Dv)

    q = torch.zeros(q_shape)
    expected = torch.zeros(*q_shape[:3], problem.head_dim_v)
    group = heads_q // problem.heads_k
    for b in range(batch):
        for i in range(seqlen_q):
            lo, hi = problem.visible_columns(i)
            for h in range(heads_q):
                if lo < hi:
                    column = rng.randrange(lo, hi)
                    q[b, i, h] = factor * spelled[column]
                    expected[b, i, h] = v[b, column, h // group]
    k = spelled[None, :, None].expand(k_shape)
    return Inputs(q.to(dtype), k.to(dtype).contiguous(), v.to(dtype), expected.to(dtype))


def extreme_inputs(problem: AttentionProblem, *, magnitude: float) -> Inputs:
    """Scores from magnitude / 2 to magnitude, of magnitude's sign, before softcap; V = 1.

    From a magnitude of some 1000 on, the output is 1, exactly, in every row that sees a column: a
    row maximum that starts at 0, or an exponent that over- or underflows, shows.

    Args:
        magnitude: of the scores after scaling, up to 1e8 or so in fp16.
    """
    if problem.scale == 0.0:
        raise UnsupportedError(
            "a scale of 0 makes every score 0", got="softmax_scale 0", expected="another scale"
        )
    dtype = _dtype(problem)
    q_shape, k_shape, v_shape = _shapes(problem)
    size = math.sqrt(abs(magnitude) / (abs(problem.scale) * problem.head_dim))
    sign = math.copysign(1.0, magnitude) * math.copysign(1.0, problem.scale)
    steps = 0.5 + 0.5 * (torch.arange(problem.seqlen_k) % 5) / 4  # (Sk,)
    q = torch.full(q_shape, sign * size)
    k = (size * steps)[None, :, None, None].expand(k_shape)
    sees = torch.tensor([lo < hi for lo, hi in map(problem.visible_columns, range(q_shape[1]))])
    expected = sees.to(dtype)[None, :, None, None].expand(*q_shape[:3], problem.head_dim_v)
    return Inputs(q.to(dtype), k.to(dtype).contiguous(), torch.ones(v_shape, dtype=dtype), expected)


def make_inputs(case: Case) -> Inputs:
    """The inputs that a case describes."""
    return normal_inputs(case.problem, seed=case.seed, layouts=case.layouts)


def _dtype(problem: AttentionProblem) -> torch.dtype:
    if problem.dtype not in TORCH_DTYPES:
        raise UnsupportedError(
            "no inputs are made in this dtype", got=problem.dtype, expected=", ".join(TORCH_DTYPES)
        )
    return TORCH_DTYPES[problem.dtype]


def _shapes(p: AttentionProblem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return (
        (p.batch, p.seqlen_q, p.heads_q, p.head_dim),
        (p.batch, p.seqlen_k, p.heads_k, p.head_dim),
        (p.batch, p.seqlen_k, p.heads_k, p.head_dim_v),
    )


def _unit_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seqlen, dim = shape[1], shape[3]
    rows = torch.eye(dim, dtype=dtype)[torch.arange(seqlen) % dim]  # (S, D)
    return rows[None, :, None].expand(shape).contiguous()
