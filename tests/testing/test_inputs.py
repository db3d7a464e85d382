"""Inputs for tests: their layouts and what their structure promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import attention
from cute_fa.testing import (
    LAYOUTS,
    NAMED_CASES,
    extreme_inputs,
    index_coded_inputs,
    make_inputs,
    normal_inputs,
    one_hot_inputs,
    place,
)
from cute_fa.testing.cases import call_arguments

BASE = AttentionProblem(2, 9, 14, 4, 2, 16, 24, "bfloat16")


def problem(**changes):
    return replace(BASE, **changes)


def exact(inputs, p):
    q, k, v = (x.double() for x in inputs[:3])
    return attention(q, k, v, **call_arguments(p))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_rows_aligned_and_are_what_they_say(layout):
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).half()
    view = place(x, layout)
    assert view.shape == x.shape and view.stride(-1) == 1
    assert view.data_ptr() % 16 == 0
    assert all(stride * 2 % 16 == 0 for stride in view.stride()[:-1])
    expected = {"same_heads": x[:, :, :1].expand_as(x), "same_batch": x[:1].expand_as(x)}
    assert torch.equal(view, expected.get(layout, x))
    assert view.is_contiguous() == (layout == "contiguous")


@pytest.mark.parametrize("layout", ["sliced", "packed"])
def test_gaps_between_elements_are_nan(layout):
    x = torch.ones(2, 5, 3, 16, dtype=torch.float16)
    view = place(x, layout)
    storage = torch.tensor([], dtype=x.dtype).set_(view.untyped_storage())
    assert int(storage.isnan().sum()) == storage.numel() - x.numel() > 0


def test_unknown_layout_is_refused():
    with pytest.raises(InvalidArgumentError, match="diagonal"):
        place(torch.zeros(1, 1, 1, 8), "diagonal")


def test_layouts_do_not_change_values_and_seeds_do():
    p = problem()
    plain = normal_inputs(p, seed=3)
    moved = normal_inputs(p, seed=3, layouts=("sliced", "packed", "heads_first"))
    for one, other in zip(plain[:3], moved[:3], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(plain.q, normal_inputs(p, seed=4).q)
    assert plain.q.dtype == torch.bfloat16 and abs(float(plain.q.float().std()) - 1) < 0.1


def test_one_hot_inputs_show_the_attention_matrix():
    p = problem(head_dim_v=16)
    inputs = one_hot_inputs(p, seed=1)
    out, _ = exact(inputs, p)
    weights = torch.softmax(inputs.q.double() * p.scale, dim=-1)  # 14 columns of 16 unit vectors
    kept = weights[..., :14] / weights[..., :14].sum(-1, keepdim=True)
    torch.testing.assert_close(out[..., :14], kept)
    assert (out[..., 14:] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True},
        {"causal": True, "seqlen_q": 20},
        {"window_left": 2, "window_right": 1},
        {"seqlen_k": 1},
        {"softmax_scale": 1.0, "dtype": "float16"},
    ],
    ids=str,
)
def test_index_coded_inputs_pick_exactly_one_column(changes):
    p = problem(**changes)
    inputs = index_coded_inputs(p, seed=5)
    out, _ = exact(inputs, p)
    assert torch.equal(out.to(inputs.q.dtype), inputs.expected)
    assert torch.equal(out.round(), inputs.expected.double())
    # different columns, heads and batches carry different numbers
    assert len(inputs.v.unique()) > min(inputs.v.numel() // 2, 100)


@pytest.mark.parametrize(
    "changes", [{"softcap": 1.0}, {"softmax_scale": 0.0}, {"softmax_scale": 1e-6}], ids=str
)
def test_index_coded_inputs_say_when_they_cannot(changes):
    with pytest.raises(UnsupportedError):
        index_coded_inputs(problem(**changes))


@pytest.mark.parametrize("magnitude", [1e3, -1e3, 5e4, -5e4, 1e8, -1e8])
@pytest.mark.parametrize("changes", [{}, {"causal": True, "seqlen_q": 20}], ids=str)
def test_extreme_inputs_have_an_output_of_one(magnitude, changes):
    p = problem(**changes)
    inputs = extreme_inputs(p, magnitude=magnitude)
    out, lse = exact(inputs, p)
    torch.testing.assert_close(out, inputs.expected.double(), rtol=1e-12, atol=0)
    seen = lse[lse > -math.inf]
    assert seen.numel() and (seen.sign() == math.copysign(1, magnitude)).all()
    # of negative scores the largest has half the magnitude; bf16 rounds q and k
    largest = magnitude if magnitude > 0 else magnitude / 2
    assert float(seen.max()) == pytest.approx(largest, rel=0.02)
    for x in inputs[:3]:
        assert torch.isfinite(x).all()


def test_named_cases_are_made_as_described():
    for name, case in NAMED_CASES.items():
        inputs = make_inputs(case)
        assert case.name == name and inputs.q.shape[1] == case.problem.seqlen_q
        assert torch.isfinite(inputs.q).all()
