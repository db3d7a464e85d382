"""flash_attn_varlen_func on CPU tensors: the compiled PTX in the simulator, and in torch's graphs.

The kernels' own tests (tests/rungs/test_varlen.py) have the lengths, masks and layouts; here it is
what the public function adds to a launch.
"""

from __future__ import annotations

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_fa
from cute_fa import flash_attn_func, flash_attn_varlen_func, sim
from cute_fa.errors import CuteFAError, UnsupportedError
from cute_fa.ops import last_launches, launch, sources
from cute_fa.ops.checks import Call
from cute_fa.ops.varlen_checks import Lengths
from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target
from cute_fa.testing import (
    assert_attention_close,
    assert_bitwise_equal,
    length_arguments,
    make_inputs,
    normal_inputs,
    random_problems,
)
from cute_fa.testing.cases import call_arguments
from cute_fa.varlen import Packing, VarlenProblem
from tests.ops.gpu_stand_in import gpu_stands_in

BASE = AttentionProblem(1, 1, 1, 4, 2, 64, 64, "bfloat16", causal=True)
PACKED = VarlenProblem.of(
    BASE, Packing.of_lengths((5, 0, 70, 33), (9, 20, 0, 130), (4, 0, 70, 30), (9, 0, 0, 129))
)


def run(problem, inputs, **options):
    """(out, lse) of the problem, with no hazard reported."""
    out, lse = flash_attn_varlen_func(
        *inputs[:3], return_lse=True, **{**call_arguments(problem), **options}
    )
    assert [launch.hazards for launch in last_launches()] == [[]]
    return out, lse


@pytest.mark.parametrize("generation", ["fa1", "fa2"])
def test_rows_that_do_not_count_give_zero(generation):
    inputs = normal_inputs(PACKED)
    out, lse = run(PACKED, inputs, generation=generation)
    report = assert_attention_close(out, lse, *inputs[:3], PACKED)
    assert report.bound_ratio <= 1.0
    packing = PACKED.packing
    for rows, stop in zip(packing.rows_q, packing.cu_seqlens_q[1:], strict=True):
        assert (out[rows.stop : stop] == 0).all()
        assert (lse[:, rows.stop : stop] == -math.inf).all()
    # The third sequence has no keys.
    assert (out[5:75] == 0).all() and (lse[:, 5:75] == -math.inf).all()


def test_one_sequence_is_the_dense_call():
    dense = AttentionProblem(1, 70, 90, 4, 2, 64, 64, "bfloat16", causal=True)
    q, k, v, _ = normal_inputs(dense)
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    packed = VarlenProblem.of(dense, Packing.of_lengths((70,), (90,)))
    got, got_lse = run(packed, (q[0], k[0], v[0]))
    assert_bitwise_equal(got, out[0])
    assert_bitwise_equal(got_lse, lse[0])


def test_lengths_may_begin_anywhere():
    """A view into a larger tensor of lengths is aligned to 4 bytes only."""
    inputs = normal_inputs(PACKED)
    expected, _ = run(PACKED, inputs)
    views = {
        name: torch.cat([x.new_full((1,), 99), x])[1:]
        for name, x in length_arguments(PACKED).items()
        if isinstance(x, torch.Tensor)
    }
    assert all(x.data_ptr() % 8 for x in views.values())
    assert_bitwise_equal(run(PACKED, inputs, **views)[0], expected)


def test_a_longest_length_beyond_need_changes_nothing():
    inputs = normal_inputs(PACKED)
    expected, expected_lse = run(PACKED, inputs)
    grid = last_launches()[0].grid
    out, lse = run(PACKED, inputs, max_seqlen_q=10**9, max_seqlen_k=10**9)
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(lse, expected_lse)
    # A sequence is no longer than all of them.
    assert grid[0] <= last_launches()[0].grid[0] <= -(-PACKED.total_q // 64)


def test_empty_calls_are_answered_without_a_kernel(monkeypatch):
    monkeypatch.setattr(sources, "kernel", None)
    for packing in (
        Packing((0,), (0,)),
        Packing.of_lengths((0, 0), (5, 3)),
        Packing.of_lengths((5, 3), (0, 0)),
        Packing.of_lengths((5, 3), (2, 4), seqused_k=(0, 0)),
    ):
        problem = VarlenProblem.of(BASE, packing)
        out, lse = flash_attn_varlen_func(
            *normal_inputs(problem)[:3], return_lse=True, **call_arguments(problem)
        )
        rows = packing.cu_seqlens_q[-1]
        assert out.shape == (rows, 4, 64) and (out == 0).all() and out.dtype == torch.bfloat16
        assert lse.shape == (4, rows) and (lse == -math.inf).all()


def test_it_runs_on_the_entered_device():
    with sim.Device("sm_89", completion="late", seed=1) as device:
        out = flash_attn_varlen_func(*normal_inputs(PACKED)[:3], **call_arguments(PACKED))
    assert len(device.launches) == 1 and not out.isnan().any()


# Five problems from seed 31, drawn over head dims, masks, GQA, dtypes and layouts, on the newest
# rung that serves sm_80; tests/rungs/test_varlen.py has others for each rung.
@pytest.mark.parametrize("case", random_problems(5, 31, varlen=True, max_seqlen=140), ids=str)
def test_random_problem(case):
    q, k, v, _ = make_inputs(case)
    out, lse = flash_attn_varlen_func(q, k, v, return_lse=True, **case.arguments)
    assert_attention_close(out, lse, q, k, v, case.problem, repro=case.repro)
    assert [launch.hazards for launch in last_launches()] == [[]] * bool(last_launches())


def test_the_docstring_is_true():
    found = doctest.DocTestFinder().find(
        cute_fa.flash_attn_varlen_func, "flash_attn_varlen_func", globs={}
    )
    assert doctest.DocTestRunner().run(found[0]).failed == 0


# --- what a GPU is given


@pytest.mark.parametrize("has_used", [False, True])
def test_the_host_function_gets_the_abi_in_order(monkeypatch, has_used):
    """Without lengths on the host, outputs that the kernel may leave alone are filled before."""
    called = []

    def host(backend):
        assert backend == "cuda"

        def run(*arguments):
            called.append((*arguments, arguments[3].clone(), arguments[4].clone()))

        return run

    def workspace(batch, seqlen_q, heads_q):
        return (SimpleNamespace(shape=(heads_q, seqlen_q), dtype="float32"),)

    kernel = SimpleNamespace(host=host, config=SimpleNamespace(workspace=workspace))
    monkeypatch.setattr(sources, "kernel", lambda *_: kernel)
    gpu_stands_in(monkeypatch, SimpleNamespace(current=None))
    padded = AttentionProblem(2, 50, 9, 4, 2, 64, 32, "float16", window_left=3, softmax_scale=0.5)
    problem = VarlenProblem(padded, 12, 15, has_seqused_q=has_used)
    call = Call(problem, "fa1", get_target("sm_80"), "cuda", True)
    q, k, v = (torch.zeros(n, h, d).half() for n, h, d in ((12, 4, 64), (15, 2, 64), (15, 2, 32)))
    borders = torch.zeros(3, dtype=torch.int32)
    used = torch.zeros(2, dtype=torch.int32) if has_used else None
    lengths = Lengths(borders, borders + 1, 50, 9, used, None)
    out, lse = launch.forward(q, k, v, call, lengths.tensors)
    (arguments,) = called
    assert all(got is sent for got, sent in zip(arguments, (q, k, v, out, lse), strict=False))
    assert arguments[5].shape == (4, 12)
    assert arguments[6:10] == (0.5, 0.0, 3, 59)
    assert arguments[10] is borders and arguments[11] is lengths.cu_seqlens_k
    # No more CTAs than there are rows.
    assert arguments[12] is used and arguments[13] is None and arguments[14] == 12
    if has_used:
        assert (arguments[15] == 0).all() and (arguments[16] == -math.inf).all()


# --- the operator


def operator_arguments(problem):
    lengths = length_arguments(problem)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q")
    q, k, v, _ = normal_inputs(problem)
    used = lengths["seqused_k"]
    return q, k, v, *(lengths[name] for name in names), used


def test_the_operator_is_the_function():
    q, k, v, *lengths = operator_arguments(PACKED)
    expected = run(PACKED, (q, k, v))
    seen = []
    real = torch.ops.cute_fa.varlen_fwd

    class Ops:
        def varlen_fwd(self, *arguments):
            seen.append(arguments)
            return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cute_fa.ops.varlen.is_for_dispatcher", lambda *_: True)
        patch.setattr(torch.ops, "cute_fa", Ops())
        out, lse = run(PACKED, (q, k, v))
    assert len(seen) == 1 and len(seen[0]) == 3 + len(lengths) + len(seen[0][9:])
    assert_bitwise_equal(out, expected[0])
    assert_bitwise_equal(lse, expected[1])
    result = torch.library.opcheck(real.default, seen[0])
    assert set(result.values()) == {"SUCCESS"}, result


def test_meta_and_fake_tensors_give_shapes_without_compiling(monkeypatch):
    monkeypatch.setattr(sources, "kernel", None)
    tensors = dict(zip("qkv", normal_inputs(PACKED)[:3], strict=True))
    tensors |= {n: x for n, x in length_arguments(PACKED).items() if isinstance(x, torch.Tensor)}
    longest = {"max_seqlen_q": 70, "max_seqlen_k": 130}
    on_meta = {name: x.to("meta") for name, x in tensors.items()}
    out, lse = flash_attn_varlen_func(**on_meta, **longest, return_lse=True)
    assert out.is_meta and out.shape == (108, 4, 64) and out.dtype == torch.bfloat16
    assert lse.is_meta and lse.shape == (4, 108) and lse.dtype == torch.float32
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
        out = flash_attn_varlen_func(**fake, **longest)
    assert out.shape == (108, 4, 64) and out.is_contiguous()
    with pytest.raises(CuteFAError, match="seqused_k is of another batch"):
        flash_attn_varlen_func(
            **{**on_meta, "seqused_k": on_meta["seqused_k"][:2]}, **longest, return_lse=True
        )


def test_torch_compile_takes_it_whole_and_for_every_length(graphs):
    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def layer(q, k, v, borders, longest):
        out, lse = flash_attn_varlen_func(
            *(q * 2, k, v),
            cu_seqlens_q=borders,
            cu_seqlens_k=borders,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            return_lse=True,
        )
        return out + 1, lse

    for lengths in ((5, 0, 40), (30, 7, 64)):
        problem = VarlenProblem.of(BASE, Packing.of_lengths(lengths, lengths))
        q, k, v, _ = normal_inputs(problem)
        borders = length_arguments(problem)["cu_seqlens_q"]
        out, lse = layer(q, k, v, borders, max(lengths))
        expected, expected_lse = run(problem, (q * 2, k, v))
        assert_bitwise_equal(out, expected + 1)
        assert_bitwise_equal(lse, expected_lse)
    assert len(graphs) == 1


def test_a_gradient_through_the_operator_is_refused():
    q, k, v, *lengths = operator_arguments(PACKED)
    arguments = (*lengths, None, True, -1, -1, 0.0, "auto", "auto", None)
    schema = torch.ops.cute_fa.varlen_fwd.default._schema
    more = [None] * (len(schema.arguments) - 3 - len(arguments))
    out, _ = torch.ops.cute_fa.varlen_fwd(q.requires_grad_(), k, v, *arguments, *more)
    with pytest.raises(UnsupportedError, match="no backward"):
        out.sum().backward()
