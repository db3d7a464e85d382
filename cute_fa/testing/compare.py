"""The error budget that every kernel of this project is held to.

Golden is the dense fp64 reference on the same (already rounded) inputs. The yardstick is the error
that the same computation makes in eager PyTorch at the input precision; of FP8 inputs, that the
FP8 reference makes. A kernel passes if its error is at most twice that, plus one rounding of the
output, both as elementwise maximum and as RMS, and both absolutely and relative to each row's own
size: under a causal mask the first rows are large and would hide what happens to the last ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem, out_dtype
from cute_fa.quant import BLOCK_ROWS, dequantize
from cute_fa.reference import fp8
from cute_fa.reference.dense import attention, attention_low_precision
from cute_fa.testing.cases import call_arguments
from cute_fa.varlen import VarlenProblem

Descales = tuple[Tensor, Tensor, Tensor]

BUDGET = 2.0
# The LSE is fp32, made of exponentials and a logarithm that hardware gets right to about 2**-22 and
# of one rescaling per K/V tile; relative to max(1, |LSE|).
LSE_ROUNDING = 2.0**-18
# softcap·tanh(·) turns one fp32 rounding of the tanh into softcap times this on a score.
SOFTCAP_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Measure:
    """One error figure beside the yardstick's and the budget's."""

    name: str
    error: float
    reference: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its budget."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"{self.name:<12} {self.error:.3e}  torch {self.reference:.3e}  "
            f"allowed {self.allowed:.3e}  {verdict}"
        )


@dataclass(frozen=True)
class ErrorReport:
    """What a result's errors are, and whether they are within the budget.

    Attributes:
        max_err, rms_err: of out against the fp64 reference.
        ref_max_err, ref_rms_err: the same of eager PyTorch at the input precision.
        lse_err: largest error of the LSE relative to max(1, |LSE|); 0.0 if none was given.
        measures: every figure that was judged.
        problems: failures that no number describes: shapes, NaN, a wrong set of -inf.
        worst_index: (b, i, h, d) of the largest error of out, (row, h, d) of packed sequences,
            None if out is empty.
        worst_got, worst_expected: the values there.
        bound_ratio: largest error in units of what rounding P and O once can explain, element by
            element; a figure for information, about 1 at most where S is kept in fp32.
        repro: one line that shows the failure again, if the caller gave one.
    """

    max_err: float
    rms_err: float
    ref_max_err: float
    ref_rms_err: float
    lse_err: float
    measures: tuple[Measure, ...]
    problems: tuple[str, ...] = ()
    worst_index: tuple[int, ...] | None = None
    worst_got: float = math.nan
    worst_expected: float = math.nan
    bound_ratio: float = 0.0
    repro: str = field(default="", compare=False)

    @property
    def ok(self) -> bool:
        """Whether every error is within its budget."""
        return not self.problems and all(measure.ok for measure in self.measures)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = ["attention is within its error budget" if self.ok else "attention is WRONG"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  {measure}" for measure in self.measures]
        if self.worst_index is not None:
            lines.append(
                f"  worst at {_axes(len(self.worst_index), 'b', 'i', 'h', 'd')} = "
                f"{self.worst_index}: "
                f"got {self.worst_got!r}, expected {self.worst_expected!r}"
            )
        if self.repro and not self.ok:
            lines.append(f"  again: {self.repro}")
        return "\n".join(lines)


def check_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem | VarlenProblem,
    *,
    descales: Descales | None = None,
    exp2_error: float = 0.0,
    repro: str = "",
) -> ErrorReport:
    """Measure an attention forward against its budget, on the device that ``out`` is on.

    Args:
        out: (B, Sq, Hq, Dv); or (Tq, Hq, Dv) of packed sequences, where rows that do not count
            must be 0.
        lse: (B, Hq, Sq) or (Hq, Tq), natural logarithm; or None to leave it unchecked.
        q, k, v: the inputs that were used.
        problem: masking, softcap and scale; its shapes and dtype must be those of q, k, v.
        descales: of q, k and v in FP8, fp32 (B, Hk) or (B, Hk, blocks); None for 1.
        exp2_error: relative error of a kernel's exponentials where it is more than a few fp32
            roundings: the LSE may be off by as much. O gets no more for it.
        repro: what the report prints on failure.

    Raises:
        InvalidArgumentError: the problem is not the tensors', or does not know its lengths.
    """
    _require_same_problem(q, k, v, problem)
    out = out.detach()
    q, k, v = (x.detach().to(out.device) for x in (q, k, v))
    problems = _shape_problems(out, lse, q, v)
    if problems:
        inf = math.inf
        return ErrorReport(inf, inf, inf, inf, inf, (), problems, repro=repro)

    if isinstance(problem, VarlenProblem):
        wanted, softcap = _packed_expectation(q, k, v, problem, descales), problem.padded.softcap
    else:
        wanted, softcap = _expectation(q, k, v, problem, descales), problem.softcap
    gold, size = wanted.gold, wanted.size
    error = _error(out, gold)
    # Where eager PyTorch overflows (scores beyond fp16) it is no yardstick: its error counts as 0.
    reference = _error(wanted.torch_out, gold).nan_to_num(nan=0.0, posinf=0.0)
    row = size.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    unit = torch.finfo(out.dtype).eps / 2
    measures = [
        _measure("max", error.flatten(), reference.flatten(), unit * gold.abs(), _max),
        _measure("rms", error.flatten(), reference.flatten(), unit * gold.abs(), _rms),
        _measure("max / row", error / row, reference / row, unit * gold.abs() / row, _max),
        _measure("rms / row", error / row, reference / row, unit * gold.abs() / row, _rms),
    ]
    lse_err = 0.0
    if lse is not None:
        lse = lse.detach().to(out.device)
        problems += _lse_problems(lse, wanted.gold_lse)
        more = exp2_error + softcap * SOFTCAP_ROUNDING
        measures.append(_lse_measure(lse, wanted.torch_lse, wanted.gold_lse, more))
        lse_err = measures[-1].error
    worst, got, expected = _worst(error, out, gold)
    return ErrorReport(
        max_err=measures[0].error,
        rms_err=measures[1].error,
        ref_max_err=measures[0].reference,
        ref_rms_err=measures[1].reference,
        lse_err=lse_err,
        measures=tuple(measures),
        problems=tuple(problems),
        worst_index=worst,
        worst_got=got,
        worst_expected=expected,
        bound_ratio=_max(error / wanted.bound),
        repro=repro,
    )


def assert_attention_close(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem | VarlenProblem,
    **options: Any,
) -> ErrorReport:
    """``check_attention`` that raises AssertionError with the whole report if it is not ok.

    Args:
        options: further arguments of ``check_attention``: descales of FP8 inputs, and others.
    """
    report = check_attention(out, lse, q, k, v, problem, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def assert_bitwise_equal(got: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Raise AssertionError with the first differing index unless the bits agree (NaN included)."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {tuple(got.shape)} {got.dtype} is not "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(bits) != expected.contiguous().view(bits)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {got.numel()} elements differ, the first at {first}: "
            f"got {got[first].item()!r}, expected {expected[first].item()!r}"
        )


@dataclass(frozen=True)
class _Expectation:
    """What a result is held against.

    Attributes:
        gold, gold_lse: of the fp64 reference.
        torch_out, torch_lse: of eager PyTorch at the input precision.
        size: Σ P |V|, shaped as gold.
        bound: what rounding alone can amount to, element by element.
    """

    gold: Tensor
    gold_lse: Tensor
    torch_out: Tensor
    torch_lse: Tensor
    size: Tensor
    bound: Tensor


def _expectation(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, descales: Descales | None
) -> _Expectation:
    options = call_arguments(problem)
    if q.dtype.itemsize == 1:
        descales = descales or _ones(k)
        rows = _block_rows(descales)
        of_q, of_k, of_v = (x.to(q.device) for x in descales)
        yardstick = fp8.forward(q, k, v, of_q, of_k, of_v, block_rows=rows, **options)
        mQ = dequantize(q, of_q, block_rows=rows).double()
        mK = dequantize(k, of_k, block_rows=rows).double()
        mV = dequantize(v, of_v, block_rows=rows).double()
    else:
        yardstick = attention_low_precision(q, k, v, **options)
        mQ, mK, mV = q.double(), k.double(), v.double()
    size = attention(mQ, mK, mV.abs(), **options)[0]
    bound = _rounding_bound(mQ, mK, mV, problem, size, torch.finfo(q.dtype))
    return _Expectation(*attention(mQ, mK, mV, **options), *yardstick, size, bound)


def _ones(k: Tensor) -> Descales:
    one = torch.ones(k.shape[0], k.shape[2])
    return one, one, one


def _block_rows(descales: Descales) -> int | None:
    return BLOCK_ROWS if descales[0].ndim == 3 else None


def _packed_expectation(
    q: Tensor, k: Tensor, v: Tensor, problem: VarlenProblem, descales: Descales | None
) -> _Expectation:
    """Each sequence's, packed; where rows do not count, exactly 0 and -inf."""
    packing = problem.require_packing()
    out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64)
    smallest = torch.full_like(out, torch.finfo(torch.float64).tiny)
    packed = _Expectation(out, lse, out.to(_out_dtype(q)), lse.float(), out.clone(), smallest)
    sequences = zip(packing.rows_q, packing.rows_k, problem.sequences(), strict=True)
    for number, (rows_q, rows_k, sequence) in enumerate(sequences):
        of_q, of_k = slice(rows_q.start, rows_q.stop), slice(rows_k.start, rows_k.stop)
        one = slice(number, number + 1)
        of_one = descales and (descales[0][one], descales[1][one], descales[2][one])
        own = _expectation(q[None, of_q], k[None, of_k], v[None, of_k], sequence, of_one)
        for name in ("gold", "torch_out", "size", "bound"):
            getattr(packed, name)[of_q] = getattr(own, name)[0]
        for name in ("gold_lse", "torch_lse"):
            getattr(packed, name)[:, of_q] = getattr(own, name)[0]
    return packed


def _axes(rank: int, *names: str) -> str:
    """The names of a tensor's dimensions; packed sequences have no batch, and rows of all."""
    if rank == len(names):
        return f"({', '.join(names)})"
    return f"({', '.join('row' if name == 'i' else name for name in names[1:])})"


def _require_same_problem(
    q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem | VarlenProblem
) -> None:
    if isinstance(problem, VarlenProblem):
        p = problem.padded
        outer_q: tuple[int, ...] = (problem.total_q,)
        outer_k: tuple[int, ...] = (problem.total_k,)
    else:
        p = problem
        outer_q, outer_k = (p.batch, p.seqlen_q), (p.batch, p.seqlen_k)
    for name, x, shape in (
        ("q", q, (*outer_q, p.heads_q, p.head_dim)),
        ("k", k, (*outer_k, p.heads_k, p.head_dim)),
        ("v", v, (*outer_k, p.heads_k, p.head_dim_v)),
    ):
        if tuple(x.shape) != shape or str(x.dtype) != f"torch.{p.dtype}":
            raise InvalidArgumentError(
                f"{name} is not the problem's",
                got=f"{tuple(x.shape)} {x.dtype}",
                expected=f"{shape} torch.{p.dtype}",
            )


def _shape_problems(out: Tensor, lse: Tensor | None, q: Tensor, v: Tensor) -> tuple[str, ...]:
    *batch, rows, heads_q, _ = q.shape
    problems = []
    if tuple(out.shape) != (*batch, rows, heads_q, v.shape[-1]) or out.dtype != _out_dtype(q):
        problems.append(f"out is {tuple(out.shape)} {out.dtype}")
    if lse is not None and (
        tuple(lse.shape) != (*batch, heads_q, rows) or lse.dtype != torch.float32
    ):
        problems.append(f"lse is {tuple(lse.shape)} {lse.dtype}")
    return tuple(problems)


def _out_dtype(q: Tensor) -> torch.dtype:
    return getattr(torch, out_dtype(str(q.dtype).removeprefix("torch.")))


def _error(x: Tensor, gold: Tensor) -> Tensor:
    """|x - gold|, where a NaN or infinity that gold does not have counts as infinite."""
    x = x.double()
    error = (x - gold).abs().nan_to_num(nan=math.inf)
    agree = (x == gold) | (x.isnan() & gold.isnan())
    return error.masked_fill(agree, 0.0)


def _max(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _measure(name: str, error: Tensor, reference: Tensor, rounding: Tensor, norm) -> Measure:
    of_reference = norm(reference)
    finite_rounding = rounding.nan_to_num(nan=0.0, posinf=0.0)
    allowed = BUDGET * of_reference + norm(finite_rounding)
    return Measure(name, norm(error), of_reference, allowed)


def _lse_problems(lse: Tensor, gold_lse: Tensor) -> tuple[str, ...]:
    got, expected = lse == -math.inf, gold_lse == -math.inf
    if torch.equal(got, expected):
        return ()
    index = tuple((got != expected).nonzero()[0].tolist())
    return (
        f"lse is -inf in other rows than expected, first at {_axes(len(index), 'b', 'h', 'i')} = "
        f"{index}: got {lse[index].item()!r}, expected {gold_lse[index].item()!r}",
    )


def _lse_measure(lse: Tensor, torch_lse: Tensor, gold_lse: Tensor, more: float) -> Measure:
    size = gold_lse.abs().nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).clamp_min(1.0)
    reference = _max((_error(torch_lse, gold_lse) / size).nan_to_num(posinf=0.0))
    return Measure(
        "lse",
        _max(_error(lse, gold_lse) / size),
        reference,
        BUDGET * reference + LSE_ROUNDING + more,
    )


def _rounding_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    size: Tensor,
    precision: torch.finfo,
) -> Tensor:
    """(B, Sq, Hq, Dv): what one rounding each of P and O, and fp32 scores, can amount to.

    |ΔO| ≤ Σ_j P (2u + ΔS) |V| with u half a spacing at 1 and ΔS a few fp32 roundings of Σ|q||k|;
    half a smallest subnormal per element of P, and of O, on top.
    """
    unit = precision.eps / 2
    group = problem.heads_q // problem.heads_k
    k_heads = k.abs().repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bihj", q.abs(), k_heads) * abs(problem.scale)
    largest = scores.amax(dim=-1, keepdim=True) if problem.seqlen_k else scores.sum(-1, True)
    smallest = precision.smallest_normal * precision.eps
    v_max = _max(v.abs())
    flush = 0.5 * smallest * (problem.seqlen_k * v_max + 1.0)
    return size * (2.5 * unit + 16 * 2.0**-24 * (1.0 + largest)) + flush


def _worst(error: Tensor, out: Tensor, gold: Tensor) -> tuple[tuple[int, ...] | None, float, float]:
    if not error.numel():
        return None, math.nan, math.nan
    index = torch.unravel_index(error.argmax(), error.shape)
    return tuple(int(i) for i in index), float(out[index]), float(gold[index])
