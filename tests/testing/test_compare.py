"""The error budget: what is right passes, and every kind of wrong result does not."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.quant import BLOCK_ROWS
from cute_fa.reference import fp8
from cute_fa.reference.dense import attention, attention_low_precision
from cute_fa.testing import (
    NAMED_CASES,
    assert_attention_close,
    assert_bitwise_equal,
    check_attention,
    extreme_inputs,
    make_inputs,
    normal_inputs,
    quantized_inputs,
    random_problems,
)
from cute_fa.varlen import Packing, VarlenProblem

CASE = NAMED_CASES["causal"]


def right_result(case):
    q, k, v, _ = make_inputs(case)
    out, lse = attention(q, k, v, **case.arguments)
    return out, lse, q, k, v


@pytest.mark.parametrize("case", NAMED_CASES.values(), ids=str)
def test_one_rounding_of_the_exact_result_passes(case):
    report = assert_attention_close(*right_result(case), case.problem)
    assert report.ok and report.bound_ratio <= 1.0
    assert report.max_err <= report.ref_max_err + 2.0**-8 * 4


@pytest.mark.parametrize("case", random_problems(20, 5, max_seqlen=80), ids=str)
def test_eager_torch_passes_its_own_yardstick(case):
    q, k, v, _ = make_inputs(case)
    out, lse = attention_low_precision(q, k, v, **case.arguments)
    report = check_attention(out, lse, q, k, v, case.problem)
    assert report.ok, report
    assert report.max_err == report.ref_max_err and report.rms_err == report.ref_rms_err


def wrong_results(out, lse):
    shuffled = out.clone()
    shuffled[:, 50], shuffled[:, 51] = out[:, 51], out[:, 50]
    nan = out.clone()
    nan[0, 3, 1, 5] = math.nan
    last_rows = out.clone()
    last_rows[:, -1] *= 1.05
    empty_row = lse.clone()
    empty_row[0, 0, 7] = -math.inf
    yield "rows swapped", shuffled, lse
    yield "one NaN", nan, lse
    yield "a late, small row off by 5 %", last_rows, lse
    yield "columns swapped", out.flip(-1), lse
    yield "heads swapped", out.flip(2), lse
    yield "zeros", torch.zeros_like(out), lse
    yield "lse -inf in a row that sees", out, empty_row
    yield "lse in base 2", out, lse / math.log(2)
    yield "lse off by a thousandth", out, lse + 1e-3
    yield "lse NaN", out, torch.full_like(lse, math.nan)
    yield "wrong dtype", out.float(), lse
    yield "wrong shape", out[:, :-1], lse
    yield "lse transposed", out, lse.transpose(1, 2)


def test_every_wrong_result_is_caught_and_reported():
    out, lse, q, k, v = right_result(CASE)
    for what, wrong_out, wrong_lse in wrong_results(out, lse):
        report = check_attention(wrong_out, wrong_lse, q, k, v, CASE.problem, repro=CASE.repro)
        assert not report.ok and not report, what
        text = str(report)
        assert "WRONG" in text and "again: from cute_fa" in text, what
        with pytest.raises(AssertionError, match="WRONG"):
            assert_attention_close(wrong_out, wrong_lse, q, k, v, CASE.problem)


def test_the_worst_element_is_named():
    out, lse, q, k, v = right_result(CASE)
    out[0, 17, 1, 33] += 3.0
    report = check_attention(out, lse, q, k, v, CASE.problem)
    assert report.worst_index == (0, 17, 1, 33)
    assert report.worst_got == float(out[0, 17, 1, 33])
    assert report.max_err == pytest.approx(3.0, abs=0.02)


def test_a_mask_shifted_by_one_is_caught():
    q, k, v, _ = make_inputs(CASE)
    out, lse = attention(q, k, v, window_size=(-1, 1))
    assert not check_attention(out, lse, q, k, v, CASE.problem).ok


def test_rows_that_see_nothing_must_be_zero_and_minus_infinity():
    case = NAMED_CASES["causal, rows that see nothing"]
    out, lse, q, k, v = right_result(case)
    assert (lse[..., 0] == -math.inf).all()
    for wrong_out, wrong_lse in (
        (out.index_fill(1, torch.tensor([0]), 1e-3), lse),
        (out, lse.index_fill(2, torch.tensor([0]), math.inf)),
        (out, lse.index_fill(2, torch.tensor([0]), 0.0)),
    ):
        assert not check_attention(wrong_out, wrong_lse, q, k, v, case.problem).ok


def test_where_torch_overflows_it_is_no_excuse():
    case = NAMED_CASES["half precision"]
    q, k, v, expected = extreme_inputs(case.problem, magnitude=1e6)
    rough, _ = attention_low_precision(q, k, v, **case.arguments)
    assert rough.isnan().any()
    out, lse = attention(q, k, v, **case.arguments)
    assert torch.equal(out, expected)
    assert check_attention(out, lse, q, k, v, case.problem).ok
    assert not check_attention(rough, None, q, k, v, case.problem).ok
    assert not check_attention(out * 1.01, lse, q, k, v, case.problem).ok


def test_lse_is_optional_and_then_unjudged():
    out, _, q, k, v = right_result(CASE)
    report = check_attention(out, None, q, k, v, CASE.problem)
    assert report.ok and "lse" not in str(report)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty_results(sizes):
    batch, seqlen_q, seqlen_k = sizes
    problem = AttentionProblem(batch, seqlen_q, seqlen_k, 2, 1, 16, 16, "float16")
    q, k, v, _ = normal_inputs(problem)
    out, lse = attention(q, k, v)
    assert check_attention(out, lse, q, k, v, problem).ok
    if out.numel():
        assert not check_attention(out + 1, lse, q, k, v, problem).ok


def test_another_problem_than_the_tensors_is_refused():
    out, lse, q, k, v = right_result(CASE)
    with pytest.raises(InvalidArgumentError, match="k is not"):
        check_attention(out, lse, q, k[:, 1:], v, CASE.problem)


def test_bitwise_equality_names_the_first_difference():
    x = torch.tensor([[1.0, math.nan], [0.0, 4.0]])
    assert_bitwise_equal(x, x.clone())
    other = x.clone()
    other[1, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 elements differ, the first at \(1, 0\)"):
        assert_bitwise_equal(other, x)
    with pytest.raises(AssertionError, match="float16"):
        assert_bitwise_equal(x.half(), x)


@pytest.mark.parametrize("by_block", [False, True], ids=["per head", "per block"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_fp8_with_descales(by_block: bool, is_packed: bool) -> None:
    """The FP8 reference is within its own budget; with another head's or block's descale it is
    not."""
    dense = AttentionProblem(1, 70, 150, 2, 1, 32, 32, "float8_e4m3fn", causal=True)
    problem = dense
    if is_packed:
        problem = VarlenProblem.of(dense, Packing.of_lengths((40, 0, 30), (140, 7, 10)))
    q, k, v, *descales = quantized_inputs(problem, seed=3, by_block=by_block)
    how = {"block_rows": BLOCK_ROWS if by_block else None, "causal": True}
    if is_packed:
        packing = problem.require_packing()
        out, lse = fp8.varlen_forward(q, k, v, *descales, packing=packing, **how)
    else:
        out, lse = fp8.forward(q, k, v, *descales, **how)
    assert assert_attention_close(out, lse, q, k, v, problem, descales=tuple(descales)).ok
    other = [x.clone() for x in descales]
    other[1].view(-1)[0] *= 1.25
    assert not check_attention(out, lse, q, k, v, problem, descales=tuple(other)).ok
    assert not check_attention(out, lse, q, k, v, problem).ok
