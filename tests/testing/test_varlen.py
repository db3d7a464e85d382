"""What the test helpers make of packed sequences: inputs, random problems, the error budget."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import varlen_attention
from cute_fa.testing import (
    Case,
    assert_attention_close,
    check_attention,
    extreme_inputs,
    index_coded_inputs,
    length_arguments,
    make_inputs,
    normal_inputs,
    one_hot_inputs,
    random_problems,
)
from cute_fa.testing.cases import mask_arguments
from cute_fa.varlen import Packing, VarlenProblem

BASE = AttentionProblem(1, 1, 1, 4, 2, 32, 16, "float16", causal=True)
PACKING = Packing.of_lengths((5, 0, 9), (7, 3, 6), (4, 0, 9), (7, 3, 2))
PROBLEM = VarlenProblem.of(BASE, PACKING)
MAKERS = {
    "normal": normal_inputs,
    "index": index_coded_inputs,
    "one hot": one_hot_inputs,
    "extreme": lambda problem: extreme_inputs(problem, magnitude=2e3),
}


def exact(q, k, v, problem):
    return varlen_attention(
        *(x.double() for x in (q, k, v)), packing=problem.packing, **mask_arguments(problem)
    )


@pytest.mark.parametrize("what", MAKERS)
def test_rows_that_do_not_count_are_nan(what):
    q, k, v, expected = MAKERS[what](PROBLEM)
    assert (q.shape, k.shape, v.shape) == ((14, 4, 32), (16, 2, 32), (16, 2, 16))
    counts_q, counts_k = torch.zeros(14, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    counts_q[[0, 1, 2, 3, *range(5, 14)]] = True
    counts_k[[*range(12)]] = True
    assert q[~counts_q].isnan().all() and k[~counts_k].isnan().all() and v[~counts_k].isnan().all()
    assert not q[counts_q].isnan().any() and not v[counts_k].isnan().any()
    if expected is not None:
        out, _ = exact(q, k, v, PROBLEM)
        assert torch.equal(out.to(expected.dtype), expected)
        assert (expected[4] == 0).all()


def test_index_codes_tell_sequences_apart():
    """The same column of two sequences holds other integers, so that a neighbour's row shows."""
    v = index_coded_inputs(VarlenProblem.of(BASE, Packing.of_lengths((3, 3), (3, 3)))).v
    assert not torch.equal(v[:3], v[3:])


@pytest.mark.parametrize("layout", ["heads_first", "sliced", "packed", "sequence_first"])
def test_layouts_keep_values(layout):
    plain = normal_inputs(PROBLEM, seed=3)
    placed = normal_inputs(PROBLEM, seed=3, layouts=(layout,) * 3)
    for one, other in zip(plain[:3], placed[:3], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert other.stride(-1) == 1 and other.data_ptr() % 16 == 0
    if layout != "sequence_first":  # which is how a single batch lies anyway
        assert not placed.q.is_contiguous()


def test_lengths_are_what_the_function_takes():
    lengths = length_arguments(PROBLEM)
    assert lengths["max_seqlen_q"] == 9 and lengths["max_seqlen_k"] == 7
    for name, numbers in (
        ("cu_seqlens_q", [0, 5, 5, 14]),
        ("cu_seqlens_k", [0, 7, 10, 16]),
        ("seqused_q", [4, 0, 9]),
        ("seqused_k", [7, 3, 2]),
    ):
        assert lengths[name].tolist() == numbers and lengths[name].dtype == torch.int32
    assert length_arguments(VarlenProblem.of(BASE, Packing((0,), (0,))))["seqused_q"] is None


def test_a_right_result_passes_and_reports_rows():
    q, k, v, _ = normal_inputs(PROBLEM)
    out, lse = exact(q, k, v, PROBLEM)
    report = assert_attention_close(out.half(), lse.float(), q, k, v, PROBLEM)
    assert report.bound_ratio <= 1.0 and len(report.worst_index) == 3
    assert "(row, h, d)" in str(report)


@pytest.mark.parametrize(
    ("index", "value"),
    [((0, 0, 0), 9.0), ((13, 3, 15), math.nan), ((4, 1, 2), 1e-3), ((4, 1, 2), math.nan)],
    ids=["first row", "last row", "row that does not count", "the same, NaN"],
)
def test_a_wrong_element_fails(index, value):
    q, k, v, _ = normal_inputs(PROBLEM)
    out, lse = exact(q, k, v, PROBLEM)
    out = out.half()
    out[index] = value
    assert not check_attention(out, lse.float(), q, k, v, PROBLEM)


def test_a_wrong_lse_fails():
    q, k, v, _ = normal_inputs(PROBLEM)
    out, lse = exact(q, k, v, PROBLEM)
    for index, value in (((0, 4), 0.0), ((2, 13), -math.inf), ((1, 0), 30.0)):
        wrong = lse.float()
        wrong[index] = value
        report = check_attention(out.half(), wrong, q, k, v, PROBLEM)
        assert not report.ok
    swapped = check_attention(out.half(), lse.float().T.contiguous(), q, k, v, PROBLEM)
    assert "lse is (14, 4)" in swapped.problems[0]


def test_another_problem_is_refused():
    q, k, v, _ = normal_inputs(PROBLEM)
    with pytest.raises(InvalidArgumentError, match="k is not the problem's"):
        check_attention(q, None, q, k[1:], v, PROBLEM)
    unknown = VarlenProblem(PROBLEM.padded, 14, 16)
    with pytest.raises(InvalidArgumentError, match="not known on the host"):
        check_attention(q[..., :16], None, q, k, v, unknown)


def test_random_packed_problems_are_varied_and_reproducible():
    cases = random_problems(150, 4, varlen=True)
    assert cases == random_problems(150, 4, varlen=True)
    assert cases[:9] == random_problems(9, 4, varlen=True)
    packings = [case.problem.packing for case in cases]
    for what, present in {
        "one sequence": [p.batch == 1 for p in packings],
        "no queries": [any(not len(rows) for rows in p.rows_q) for p in packings],
        "no keys": [any(not len(rows) for rows in p.rows_k) for p in packings],
        "seqused_q": [p.seqused_q is not None for p in packings],
        "seqused_k": [p.seqused_k is not None for p in packings],
        "self-attention": [p.cu_seqlens_q == p.cu_seqlens_k for p in packings],
        "causal": [case.problem.padded.causal for case in cases],
        "GQA": [case.problem.padded.heads_q > case.problem.padded.heads_k for case in cases],
    }.items():
        assert any(present) and not all(present), what
    assert max(p.batch for p in packings) == 5
    assert max(case.problem.padded.seqlen_q for case in cases) <= 150


def test_a_packed_case_can_be_rebuilt_from_its_repro_line():
    for case in random_problems(5, 2, varlen=True):
        names = {
            "Case": Case,
            "AttentionProblem": AttentionProblem,
            "Packing": Packing,
            "VarlenProblem": VarlenProblem,
        }
        assert eval(repr(case), names) == case
        assert repr(case) in case.repro and "flash_attn_varlen_func" in case.repro
        compile(case.repro, "repro", "exec")
        assert make_inputs(case).q.shape[0] == case.problem.total_q
