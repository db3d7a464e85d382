"""flash_attn_func on CPU tensors: the compiled PTX in the simulator, against the reference.

Few variants are compiled (two seconds each); sizes, bounds, scales, strides and heads are run-time
arguments of the same kernels.
"""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import torch

import cute_fa
from cute_fa import flash_attn_func, sim
from cute_fa.errors import CuteFAError, InvalidArgumentError, UnsupportedError
from cute_fa.ops import last_launches, sources
from cute_fa.problem import AttentionProblem
from cute_fa.testing import (
    Case,
    assert_attention_close,
    assert_bitwise_equal,
    extreme_inputs,
    index_coded_inputs,
    normal_inputs,
    one_hot_inputs,
)
from cute_fa.testing.cases import call_arguments

BOTH = pytest.mark.parametrize("generation", ["fa2", "fa1"])


BASE = AttentionProblem(1, 70, 90, 2, 1, 64, 64, "bfloat16")


def problem(**changes):
    return replace(BASE, **changes)


def run(p, inputs, **options):
    """(out, lse) of the problem, with no hazard reported."""
    out, lse = flash_attn_func(*inputs[:3], return_lse=True, **{**call_arguments(p), **options})
    assert all(launch.hazards == [] for launch in last_launches())
    return out, lse


@BOTH
@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 1, "seqlen_k": 1},
        {"seqlen_q": 1, "seqlen_k": 131},
        {"seqlen_q": 131, "seqlen_k": 1},
        {"seqlen_q": 65, "seqlen_k": 64},
        {"heads_q": 25, "heads_k": 5, "seqlen_q": 17, "seqlen_k": 33},
        {"batch": 3, "heads_q": 3, "heads_k": 3, "seqlen_q": 30, "seqlen_k": 30},
        {"softmax_scale": 1.0},
        {"softmax_scale": -0.2},
        {"softmax_scale": 0.0},
    ],
    ids=str,
)
def test_one_kernel_serves_every_size_and_scale(changes, generation):
    p = problem(**changes)
    inputs = normal_inputs(p, seed=1)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p)


@BOTH
@pytest.mark.parametrize("sizes", [(70, 70), (40, 133), (133, 40), (1, 70), (130, 1)], ids=str)
def test_causal_is_aligned_bottom_right(sizes, generation):
    p = problem(causal=True, seqlen_q=sizes[0], seqlen_k=sizes[1])
    inputs = normal_inputs(p, seed=2)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p)
    empty = max(0, sizes[0] - sizes[1])
    assert (out[:, :empty] == 0).all() and (lse[..., :empty] == -math.inf).all()


@BOTH
@pytest.mark.parametrize(
    "window", [(0, 1), (5, 3), (1, 64), (63, 2), (200, 200), (2**40, 1)], ids=str
)
def test_windows(window, generation):
    p = problem(window_left=window[0], window_right=window[1], seqlen_q=110, seqlen_k=95)
    inputs = normal_inputs(p, seed=3)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p)


@BOTH
@pytest.mark.parametrize(
    "layouts",
    [
        ("heads_first", "sequence_first", "packed"),
        ("packed", "sliced", "sliced"),
        ("sliced", "same_heads", "same_batch"),
        ("same_batch", "heads_first", "same_heads"),
    ],
    ids=str,
)
def test_strided_views_are_read_in_place(layouts, generation):
    p = problem(batch=2, heads_q=4, heads_k=2, seqlen_q=37, seqlen_k=41)
    case = Case("strides", p, seed=4, layouts=layouts)
    inputs = normal_inputs(p, seed=case.seed, layouts=layouts)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p, repro=case.repro)
    contiguous = [x.contiguous() for x in inputs[:3]]
    again, lse_again = run(p, contiguous, generation=generation)
    assert_bitwise_equal(out, again, "out")
    assert_bitwise_equal(lse, lse_again, "lse")


@BOTH
def test_one_row_views_with_odd_strides(generation):
    p = problem(seqlen_q=1, seqlen_k=1, heads_q=1)
    q, k, v, _ = normal_inputs(p)
    odd = [torch.cat([x, x[..., :3]], dim=-1)[..., :64] for x in (q, k, v)]
    assert odd[0].stride(1) % 8
    out, _ = run(p, odd, generation=generation)
    assert torch.equal(out, v)


@BOTH
@pytest.mark.parametrize("changes", [{}, {"causal": True, "seqlen_q": 100}], ids=str)
def test_every_element_is_in_its_place(changes, generation):
    p = problem(batch=2, heads_q=4, heads_k=2, **changes)
    inputs = index_coded_inputs(p, seed=5)
    out, _ = run(p, inputs, generation=generation)
    assert_bitwise_equal(out, inputs.expected, "out")


@BOTH
def test_the_attention_matrix_itself(generation):
    p = problem()
    inputs = one_hot_inputs(p, seed=6)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p)


@BOTH
@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e7, -1e7])
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_logits(magnitude, causal, generation):
    p = problem(causal=causal, seqlen_q=100)
    inputs = extreme_inputs(p, magnitude=magnitude)
    out, lse = run(p, inputs, generation=generation)
    assert_attention_close(out, lse, *inputs[:3], p)
    # At 1e7 an fp32 score is known to half a unit, so the largest P is 1 to a factor of √2 and its
    # rounding to bf16 no longer cancels against the row sum.
    if abs(magnitude) < 1e5:
        assert_bitwise_equal(out, inputs.expected.contiguous(), "out")


EMPTY = [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0}]


@BOTH
@pytest.mark.parametrize("changes", EMPTY, ids=str)
def test_empty_tensors_return_empties_without_compiling(changes, generation, monkeypatch):
    monkeypatch.setattr(sources, "kernel", None)
    p = problem(**changes)
    inputs = normal_inputs(p)
    out, lse = run(p, inputs, generation=generation, causal=True)
    assert out.shape == (p.batch, p.seqlen_q, 2, 64) and (out == 0).all()
    assert lse.shape == (p.batch, 2, p.seqlen_q) and (lse == -math.inf).all()
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert last_launches() == ()


def test_no_heads():
    q, k = torch.zeros(2, 5, 0, 64).half(), torch.zeros(2, 7, 0, 64).half()
    out, lse = flash_attn_func(q, k, k, return_lse=True)
    assert out.shape == (2, 5, 0, 64) and lse.shape == (2, 0, 5)


@BOTH
def test_every_argument_changes_the_result_or_is_refused(generation):
    """No argument is taken and ignored."""
    p = problem(seqlen_q=40, seqlen_k=40)
    q, k, v, _ = normal_inputs(p, seed=7)
    plain = flash_attn_func(q, k, v, generation=generation)
    for change in (
        {"softmax_scale": 0.5},
        {"softmax_scale": 0.0},
        {"causal": True},
        {"window_size": (3, -1)},
        {"window_size": (None, 3)},
        {"window_size": (-1, 0)},
        {"softcap": 0.5},
    ):
        out = flash_attn_func(q, k, v, generation=generation, **change)
        assert not torch.equal(out, plain), change
    for bound in (2, 9):
        assert not torch.equal(
            flash_attn_func(q, k, v, generation=generation, window_size=(3, None)),
            flash_attn_func(q, k, v, generation=generation, window_size=(bound, None)),
        )
    for refused in (
        {"softcap": -1.0},
        {"window_size": (-3, 0)},
        {"deterministic": "yes"},
        {"return_lse": 1},
        {"backend": "cuda"},
        {"arch": "sm_42"},
        {"generation": "fa9"},
    ):
        with pytest.raises(CuteFAError):
            flash_attn_func(q, k, v, **{"generation": generation, **refused})
    with pytest.raises(TypeError, match="dropout_p"):
        flash_attn_func(q, k, v, dropout_p=0.1)
    with pytest.raises(TypeError, match="positional"):
        flash_attn_func(q, k, v, 0.1)


@BOTH
def test_deterministic_is_what_the_forward_always_is(generation):
    p = problem(seqlen_q=100)
    q, k, v, _ = normal_inputs(p, seed=8)
    results = []
    for completion, seed in (("eager", 0), ("late", 0), ("random", 1), ("random", 2)):
        with sim.Device("sm_80", completion=completion, seed=seed):
            results.append(
                flash_attn_func(
                    q, k, v, generation=generation, deterministic=seed == 1, return_lse=True
                )
            )
    for out, lse in results[1:]:
        assert_bitwise_equal(out, results[0][0], "out")
        assert_bitwise_equal(lse, results[0][1], "lse")


def test_return_lse_only_adds_it():
    q, k, v, _ = normal_inputs(problem())
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    both = flash_attn_func(q, k, v, return_lse=True)
    assert_bitwise_equal(both[0], out)


def test_inputs_may_share_memory_and_are_left_alone():
    p = problem(heads_k=2, seqlen_k=70)
    q, _, _, _ = normal_inputs(p)
    before = q.clone()
    out, lse = run(p, (q, q, q))
    assert_bitwise_equal(q, before)
    assert out.data_ptr() != q.data_ptr()
    assert_attention_close(out, lse, q, q, q, p)


def test_a_call_inside_a_device_block_runs_and_records_there():
    q, k, v, _ = normal_inputs(problem())
    with sim.Device("sm_80", completion="late") as dev:
        inside = flash_attn_func(q, k, v)
        again = flash_attn_func(q, k, v, arch="ampere")
    assert len(dev.launches) == 2 and tuple(dev.launches[-1:]) == last_launches()
    record = dev.launches[0]
    assert record.hazards == [] and record.grid == (1, 2, 1)
    outside = flash_attn_func(q, k, v)
    assert len(dev.launches) == 2 and last_launches()[0] is not dev.launches[-1]
    assert_bitwise_equal(inside, again)
    assert_bitwise_equal(inside, outside)
    with sim.Device("sm_80"), pytest.raises(InvalidArgumentError, match=r"sim\.Device\('sm_86'\)"):
        flash_attn_func(q, k, v, arch="sm_86")


def test_tensors_that_pass_for_cuda_tensors_run_on_the_entered_device():
    q, k, v, _ = normal_inputs(problem())
    outside = flash_attn_func(q, k, v)
    with sim.Device("sm_80") as dev:
        inside = flash_attn_func(q.cuda(), k.cuda(), v.to("cuda"))
        assert inside.is_cuda and len(dev.launches) == 1
    assert not inside.is_cuda
    assert_bitwise_equal(inside, outside)


def test_launches_are_forgotten_by_the_next_call():
    q, k, v, _ = normal_inputs(problem())
    flash_attn_func(q, k, v)
    assert len(last_launches()) == 1
    flash_attn_func(q[:0], k[:0], v[:0])
    assert last_launches() == ()


@BOTH
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_other_architectures(arch, generation):
    p = problem()
    inputs = normal_inputs(p, seed=9)
    out, lse = run(p, inputs, generation=generation, arch=arch)
    assert_attention_close(out, lse, *inputs[:3], p)


def test_auto_is_fa2_on_sm_80():
    q, k, v, _ = normal_inputs(problem())
    assert_bitwise_equal(
        flash_attn_func(q, k, v), flash_attn_func(q, k, v, generation="fa2", arch="sm_80")
    )
    assert not torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v, generation="fa1"))


def test_gradients_are_refused_until_there_is_a_backward():
    q, k, v, _ = normal_inputs(problem())
    q.requires_grad_()
    with pytest.raises(UnsupportedError, match="no_grad"):
        flash_attn_func(q, k, v)
    with torch.no_grad():
        out = flash_attn_func(q, k, v)
    assert not out.requires_grad


def test_the_docstring_example_runs():
    assert cute_fa.flash_attn_func is flash_attn_func
    (example,) = doctest.DocTestFinder().find(flash_attn_func, "flash_attn_func", globs={})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted == 4 and result.failed == 0


def test_a_repro_line_runs_and_reports(capsys):
    case = Case("again", problem())
    exec(case.repro_with(generation="fa2"), {})
    assert "within its error budget" in capsys.readouterr().out
