"""Inputs for attention tests: what they hold and how they lie in memory.

Random normal values show rounding. Structured ones show permutation: swapped rows or columns can
leave every norm as it was. Layouts show address arithmetic: whatever lies between the elements of
a view is NaN, so that one element read from there spoils the result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cute_fa import quant
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import AttentionProblem, out_dtype
from cute_fa.varlen import VarlenProblem

Problem = AttentionProblem | VarlenProblem

if TYPE_CHECKING:
    from cute_fa.testing.cases import Case

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}

LAYOUTS = (
    "contiguous",
    "heads_first",
    "sequence_first",
    "sliced",
    "packed",
    "same_heads",
    "same_batch",
)

# Integers up to 256 are exact in both half formats, up to 16 in e4m3; 0 would show the weights of
# other columns.
CODES = {"float16": 251, "bfloat16": 251, "float8_e4m3fn": 16}
# The largest power of two that all formats of that size have.
MAX_FACTOR = {"float16": 2.0**15, "bfloat16": 2.0**15, "float8_e4m3fn": 2.0**8}


class Inputs(NamedTuple):
    """q (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) and, where it is known without any
    computation, the exact output (B, Sq, Hq, Dv) in the output's dtype.

    Of packed sequences q (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv), output (Tq, Hq, Dv), with NaN
    in all rows that do not count.
    """

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
        chunk = 16 // x.element_size()
        storage = x.new_full((batch + 1, seqlen + 3, heads + 2, dim + chunk), math.nan)
        view = storage[:batch, 2 : seqlen + 2, 1 : heads + 1, chunk:]
    elif layout == "packed":
        storage = x.new_full((batch, seqlen, 3, heads, dim), math.nan)
        view = storage[:, :, 1]
    else:
        raise InvalidArgumentError("unknown layout", got=repr(layout), expected=" | ".join(LAYOUTS))
    view.copy_(x)
    return view


def length_arguments(problem: VarlenProblem) -> dict[str, Any]:
    """The lengths of packed sequences as ``flash_attn_varlen_func`` takes them, on the CPU.

    Raises:
        InvalidArgumentError: the problem does not know them.
    """
    packing = problem.require_packing()

    def int32(numbers: tuple[int, ...] | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=torch.int32)

    return {
        "cu_seqlens_q": int32(packing.cu_seqlens_q),
        "cu_seqlens_k": int32(packing.cu_seqlens_k),
        "max_seqlen_q": problem.padded.seqlen_q,
        "max_seqlen_k": problem.padded.seqlen_k,
        "seqused_q": int32(packing.seqused_q),
        "seqused_k": int32(packing.seqused_k),
    }


def normal_inputs(
    problem: Problem, *, seed: int = 0, layouts: tuple[str, str, str] | None = None
) -> Inputs:
    """Standard normal q, k, v, the same for every layout that keeps values.

    Args:
        layouts: of q, k and v, from ``LAYOUTS``.
    """
    if isinstance(problem, VarlenProblem):
        q, k, v, _ = _pack(problem, lambda n, p: normal_inputs(p, seed=seed + n))
        tensors = [x[None] for x in (q, k, v)]
    else:
        generator = torch.Generator().manual_seed(seed)
        tensors = [
            torch.randn(shape, generator=generator, dtype=torch.float32).to(_dtype(problem))
            for shape in _shapes(problem)
        ]
    placed = [
        place(x, layout) for x, layout in zip(tensors, layouts or ("contiguous",) * 3, strict=True)
    ]
    return Inputs(*(x[0] if isinstance(problem, VarlenProblem) else x for x in placed))


def _pack(problem: VarlenProblem, make: Callable[[int, AttentionProblem], Inputs]) -> Inputs:
    """What ``make(number, sequence)`` gives for each sequence, packed; NaN where nothing counts."""
    packing, dtype, p = problem.require_packing(), _dtype(problem.padded), problem.padded
    of_out = _out_dtype(p)
    q = torch.full((problem.total_q, p.heads_q, p.head_dim), math.nan, dtype=dtype)
    k = torch.full((problem.total_k, p.heads_k, p.head_dim), math.nan, dtype=dtype)
    v = torch.full((problem.total_k, p.heads_k, p.head_dim_v), math.nan, dtype=dtype)
    expected = torch.zeros((problem.total_q, p.heads_q, p.head_dim_v), dtype=of_out)
    is_known = True
    sequences = zip(packing.rows_q, packing.rows_k, problem.sequences(), strict=True)
    for number, (rows_q, rows_k, sequence) in enumerate(sequences):
        own = make(number, sequence)
        of_q, of_k = slice(rows_q.start, rows_q.stop), slice(rows_k.start, rows_k.stop)
        q[of_q], k[of_k], v[of_k] = own.q[0], own.k[0], own.v[0]
        if own.expected is None:
            is_known = False
        else:
            expected[of_q] = own.expected[0]
    return Inputs(q, k, v, expected if is_known else None)


def one_hot_inputs(problem: Problem, *, seed: int = 0) -> Inputs:
    """Normal q with K and V of unit rows: the output is the attention matrix itself.

    K[j] is unit vector j mod D and V[j] is unit vector j mod Dv, so that scores are q's own
    elements and O[i, d] is the weight of the columns j ≡ d (mod Dv).
    """
    if isinstance(problem, VarlenProblem):
        return _pack(problem, lambda n, p: one_hot_inputs(p, seed=seed + n))
    q = normal_inputs(problem, seed=seed).q
    _, k_shape, v_shape = _shapes(problem)
    return Inputs(q, _unit_rows(k_shape, q.dtype), _unit_rows(v_shape, q.dtype))


def quantized_inputs(
    problem: Problem, *, seed: int = 0, by_block: bool = False
) -> quant.QuantizedQKV:
    """Normal values in FP8 with their descales; heads and blocks of rows are of several sizes, so
    that no descale can stand in for another.

    Args:
        by_block: a descale for every ``quant.BLOCK_ROWS`` rows, not one for all of a head's.
    """
    how: dict[str, Any] = {
        "block_rows": quant.BLOCK_ROWS if by_block else None,
        "is_rotated": False,
    }
    if isinstance(problem, VarlenProblem):
        wide = replace(problem, padded=replace(problem.padded, dtype="bfloat16"))
        q, k, v, _ = normal_inputs(wide, seed=seed)
        q, k, v = (_uneven(x[None])[0] for x in (q, k, v))
        return quant.quantize_varlen_qkv(q, k, v, **length_arguments(problem), **how)
    q, k, v, _ = normal_inputs(replace(problem, dtype="bfloat16"), seed=seed)
    return quant.quantize_qkv(_uneven(q), _uneven(k), _uneven(v), **how)


def _uneven(x: Tensor) -> Tensor:
    """x (B, S, H, D) times 1 … 5, by block of rows and by head."""
    blocks = torch.arange(x.shape[1])[:, None] // quant.BLOCK_ROWS
    sizes = 1.0 + (blocks + torch.arange(x.shape[2])) % 5
    return x.float() * sizes[..., None]


def index_coded_inputs(problem: Problem, *, seed: int = 0) -> Inputs:
    """Each query row picks exactly one column, and V's values tell which, of which head and batch.

    K[j] spells j in ±1, Q[i] spells the chosen column with a factor that puts every other score
    at least 40 below the chosen one; V holds distinct small integers. The output is V's row,
    exactly; a row that sees nothing gives 0. One element out of place is one wrong integer.

    Raises:
        UnsupportedError: softcap flattens the scores, or Sk > 2**D or scale ≤ 0.
    """
    if isinstance(problem, VarlenProblem):
        return _pack(problem, lambda n, p: _index_coded(p, seed + n, first_batch=n))
    return _index_coded(problem, seed, first_batch=0)


def _index_coded(problem: AttentionProblem, seed: int, first_batch: int) -> Inputs:
    """``index_coded_inputs`` with V's batches numbered from ``first_batch`` on."""
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
    largest = MAX_FACTOR[problem.dtype]
    if factor > largest:
        raise UnsupportedError(
            f"scores cannot be made to pick one column: q would leave {problem.dtype}'s range",
            got=f"a factor of {factor:.3g} at scale {problem.scale}",
            expected=f"up to {largest:.0f}",
        )
    codes = CODES[problem.dtype]
    index = torch.cartesian_prod(*(torch.arange(size) for size in v_shape)).view(*v_shape, 4)
    index[..., 0] += first_batch
    v = (index * torch.tensor([13, 7, 11, 3])).sum(dim=-1) % codes + 1  # (B, Sk, Hk, Dv)

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
    expected = expected.to(_out_dtype(problem))
    return Inputs(q.to(dtype), k.to(dtype).contiguous(), v.to(dtype), expected)


def extreme_inputs(problem: Problem, *, magnitude: float) -> Inputs:
    """Scores from magnitude / 2 to magnitude, of magnitude's sign, before softcap; V = 1.

    From a magnitude of some 1000 on, the output is 1, exactly, in every row that sees a column: a
    row maximum that starts at 0, or an exponent that over- or underflows, shows.

    Args:
        magnitude: of the scores after scaling, up to 1e8 or so in fp16.
    """
    if isinstance(problem, VarlenProblem):
        return _pack(problem, lambda n, p: extreme_inputs(p, magnitude=magnitude))
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
    v = torch.ones(v_shape).to(dtype)
    expected = sees[None, :, None, None].expand(*q_shape[:3], problem.head_dim_v)
    return Inputs(q.to(dtype), k.to(dtype).contiguous(), v, expected.to(_out_dtype(problem)))


def make_inputs(case: Case) -> Inputs:
    """The inputs that a case describes."""
    return normal_inputs(case.problem, seed=case.seed, layouts=case.layouts)


def _dtype(problem: AttentionProblem) -> torch.dtype:
    if problem.dtype not in TORCH_DTYPES:
        raise UnsupportedError(
            "no inputs are made in this dtype", got=problem.dtype, expected=", ".join(TORCH_DTYPES)
        )
    return TORCH_DTYPES[problem.dtype]


def _out_dtype(problem: AttentionProblem) -> torch.dtype:
    return TORCH_DTYPES[out_dtype(problem.dtype)]


def _shapes(p: AttentionProblem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return (
        (p.batch, p.seqlen_q, p.heads_q, p.head_dim),
        (p.batch, p.seqlen_k, p.heads_k, p.head_dim),
        (p.batch, p.seqlen_k, p.heads_k, p.head_dim_v),
    )


def _unit_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    seqlen, dim = shape[1], shape[3]
    rows = torch.eye(dim)[torch.arange(seqlen) % dim].to(dtype)  # (S, D)
    return rows[None, :, None].expand(shape).contiguous()
