"""Is what is timed right? Parts of the result, against the fp64 reference.

The whole of a large problem would take more memory than a GPU has. The first and the last query
rows of some heads are problems of their own: the last rows of a bottom-right aligned mask see what
they saw, and the first rows see the first keys only, or under no mask all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cute_fa.bench.inputs import BenchInputs
from cute_fa.bench.shapes import Shape
from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import attention
from cute_fa.testing.compare import check_attention
from cute_fa.varlen import VarlenProblem

ROWS = 128
FP8_RMS = 0.10
"""Largest RMS error of an fp8 attention, relative to the output's RMS: e4m3 keeps 3 bits, so that
each of V, P, Q and K brings about 2**-4 / sqrt(3) of its size."""


@dataclass(frozen=True)
class Verdict:
    """Whether the rows that were looked at are right; the largest error and the budget's."""

    ok: bool
    error: float
    allowed: float
    why: str = ""


@dataclass(frozen=True)
class Part:
    """One head of one sequence: its tensors in fp-whatever, and the problem that they are."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    problem: AttentionProblem


def verify(out: Tensor, inputs: BenchInputs, shape: Shape) -> Verdict:
    """Check parts of an attention: the first and last rows of the first and last head.

    Args:
        out: (B, Sq, Hq, Dv), or packed (Tq, Hq, Dv).
    """
    p = shape.padded
    expected = (*inputs.q.shape[:-1], p.head_dim_v)
    if tuple(out.shape) != expected:
        return Verdict(False, math.inf, 0.0, f"shape {tuple(out.shape)}, expected {expected}")
    verdicts = [_verify_part(part) for part in parts(out, inputs, shape)]
    return min(verdicts, key=lambda verdict: (verdict.ok, -verdict.error))


def parts(out: Tensor, inputs: BenchInputs, shape: Shape) -> Iterator[Part]:
    """The rows that are looked at, as problems of batch 1 with one head."""
    for sequence, rows_q, rows_k in _sequences(shape):
        for head in sorted({0, sequence.heads_q - 1}):
            head_k = head // (sequence.heads_q // sequence.heads_k)
            x, q = (t[rows_q][:, head] for t in _flat(out, inputs.q))
            k, v = (t[rows_k][:, head_k] for t in _flat(inputs.k, inputs.v))
            yield _part(x[-ROWS:], q[-ROWS:], k, v, sequence)
            square = sequence.causal and sequence.seqlen_q == sequence.seqlen_k
            if square:
                yield _part(x[:ROWS], q[:ROWS], k[:ROWS], v[:ROWS], sequence)
            elif sequence.window == (None, None):
                yield _part(x[:ROWS], q[:ROWS], k, v, sequence)


def _sequences(shape: Shape) -> Iterator[tuple[AttentionProblem, slice, slice]]:
    """First and last sequence: the problem, and where its rows lie in the flattened tensors."""
    problem = shape.problem
    if isinstance(problem, VarlenProblem):
        packing = problem.packing
        assert packing is not None, "a shape to time knows its lengths"
        found = list(zip(problem.sequences(), packing.rows_q, packing.rows_k, strict=True))
        chosen = [found[0], found[-1]]
    else:
        chosen = []
        for index in sorted({0, problem.batch - 1}):
            q0, k0 = index * problem.seqlen_q, index * problem.seqlen_k
            rows = range(q0, q0 + problem.seqlen_q), range(k0, k0 + problem.seqlen_k)
            chosen.append((replace(problem, batch=1), *rows))
    for sequence, rows_q, rows_k in chosen:
        yield sequence, slice(rows_q.start, rows_q.stop), slice(rows_k.start, rows_k.stop)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.flatten(0, 1) if x.ndim == 4 else x for x in tensors)


def _part(out: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: AttentionProblem) -> Part:
    problem = replace(sequence, seqlen_q=q.shape[0], seqlen_k=k.shape[0], heads_q=1, heads_k=1)
    out, q, k, v = (x[None, :, None] for x in (out, q, k, v))
    return Part(out, q, k, v, problem)


def _verify_part(part: Part) -> Verdict:
    p = part.problem
    if p.dtype == "float8_e4m3fn":
        return _verify_fp8(part)
    report = check_attention(part.out, None, part.q, part.k, part.v, p)
    allowed = max((measure.allowed for measure in report.measures), default=0.0)
    return Verdict(report.ok, report.max_err, allowed, "" if report.ok else str(report))


def _verify_fp8(part: Part) -> Verdict:
    gold, _ = attention(
        part.q.double(),
        part.k.double(),
        part.v.double(),
        softmax_scale=part.problem.softmax_scale,
        causal=part.problem.causal,
        window_size=(part.problem.window_left, part.problem.window_right),
        softcap=part.problem.softcap,
    )
    error = _rms(part.out.double() - gold) / max(_rms(gold), torch.finfo(torch.float64).tiny)
    ok = error <= FP8_RMS
    return Verdict(ok, error, FP8_RMS, "" if ok else f"relative RMS error {error:.3g}")


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
