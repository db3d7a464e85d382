"""Launching without a kernel: what the host function is called with, on which device, how often."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cute_fa.errors import LaunchError, MissingToolError
from cute_fa.ops import launch, plans, sources
from cute_fa.ops.checks import Call
from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target
from tests.ops.gpu_stand_in import gpu_stands_in, key_for


def make_call(backend="cuda", **changes):
    problem = replace(AttentionProblem(2, 5, 7, 4, 2, 16, 24, "bfloat16"), **changes)
    has_work = bool(problem.batch and problem.seqlen_q and problem.seqlen_k)
    call = Call(problem, "fa1", get_target("sm_80"), backend, has_work)
    p = problem
    q = torch.zeros(p.batch, p.seqlen_q, p.heads_q, p.head_dim, dtype=torch.bfloat16)
    k = torch.zeros(p.batch, p.seqlen_k, p.heads_k, p.head_dim, dtype=torch.bfloat16)
    v = torch.zeros(p.batch, p.seqlen_k, p.heads_k, p.head_dim_v, dtype=torch.bfloat16)
    return q, k, v, call


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for a compiled kernel that records how it is called."""
    record = SimpleNamespace(calls=[], backends=[], devices=[], current=None, asked=[])

    def host(backend):
        record.backends.append(backend)

        def run(*arguments):
            record.calls.append(arguments)
            record.devices.append(record.current)
            arguments[3].fill_(1.0)
            arguments[4].fill_(2.0)

        return run

    def workspace(batch, seqlen_q, heads_q):
        return (SimpleNamespace(name="row_max", shape=(batch, heads_q, seqlen_q), dtype="float32"),)

    fake = SimpleNamespace(
        arch="sm_80", ptx="", config=SimpleNamespace(workspace=workspace), host=host
    )

    def compiled(*key):
        assert key[-1] is None, "the compiler is asked"
        record.asked.append(key[:-1])
        return fake

    gpu_stands_in(monkeypatch, record)
    monkeypatch.setattr(sources, "kernel", compiled)
    return record


def test_the_host_function_gets_the_abi_in_order_on_the_tensors_device(kernel):
    q, k, v, call = make_call(
        softmax_scale=0.5, softcap=3.0, window_left=2, window_right=10**12, causal=False
    )
    out, lse = launch.forward(q, k, v, call)
    assert kernel.asked == [("fa1", "sm_80", call.problem.variant)]
    assert kernel.backends == ["cuda"] and kernel.devices == [q.device]
    (arguments,) = kernel.calls
    assert arguments[0] is q and arguments[1] is k and arguments[2] is v
    assert arguments[3] is out and arguments[4] is lse
    assert arguments[5].shape == (2, 4, 5) and arguments[5].dtype == torch.float32
    # a bound beyond every column is clamped to Sq + Sk
    assert arguments[6:] == (0.5, 3.0, 2, 12)
    assert [type(x) for x in arguments[6:]] == [float, float, int, int]
    assert out.shape == (2, 5, 4, 24) and out.dtype == q.dtype and out.is_contiguous()
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32 and lse.is_contiguous()
    assert (out == 1).all() and (lse == 2).all()
    assert launch.last_launches() == ()


def test_unbounded_and_causal_windows(kernel):
    q, k, v, call = make_call(causal=True)
    launch.forward(q, k, v, call)
    assert kernel.calls[0][6:] == (0.25, 0.0, 12, 0)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}], ids=str)
def test_empty_problems_are_answered_without_a_kernel(kernel, changes):
    q, k, v, call = make_call(**changes)
    out, lse = launch.forward(q, k, v, call)
    assert kernel.asked == [] and kernel.calls == []
    assert out.shape == (*q.shape[:3], 24) and (out == 0).all()
    assert lse.shape == (q.shape[0], 4, q.shape[1]) and (lse == -math.inf).all()


def test_outputs_are_contiguous_whatever_the_strides_of_q(kernel):
    q, k, v, call = make_call()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = launch.forward(q, k, v, call)
    assert out.is_contiguous() and not q.is_contiguous()


def test_dimensions_of_one_element_get_legal_strides(kernel):
    q, k, v, call = make_call(batch=1, seqlen_q=1, heads_q=2, heads_k=1)
    odd = q.as_strided(q.shape, (3, 5, 16, 1))
    launch.forward(odd, k, v, call)
    passed = kernel.calls[0][0]
    assert passed.stride() == (8, 8, 16, 1) and passed.data_ptr() == q.data_ptr()
    assert passed.shape == q.shape
    launch.forward(q, k, v, call)
    assert kernel.calls[1][0] is q


def test_simulated_memory_starts_as_nan(kernel, monkeypatch):
    seen = []

    def run_sim(kernel, device, arguments):
        seen.append((device, [x.isnan().all() for x in arguments[3:6]]))

    monkeypatch.setattr(launch, "run_sim", run_sim)
    q, k, v, call = make_call(backend="sim")
    device = object()
    out, _ = launch.forward(q, k, v, call, device=device)
    assert seen[0][0] is device and all(seen[0][1])
    assert out.isnan().all() and kernel.backends == []


def test_variants_are_compiled_once_with_their_features(monkeypatch):
    from cute_fa import build

    asked = []

    def compile(generation, direction, **arguments):
        asked.append((generation, direction, arguments))
        return object()

    monkeypatch.setattr(build, "compile", compile)
    sources.kernel.cache_clear()
    try:
        plain = make_call()[-1].problem.variant
        windowed = make_call(window_left=5, window_right=0, softcap=2.0)[-1].problem.variant
        one = sources.kernel("fa2", "sm_80", plain, None)
        longer = make_call(seqlen_q=99)[-1].problem.variant
        assert sources.kernel("fa2", "sm_80", longer, None) is one
        assert sources.kernel("fa2", "sm_89", plain, None) is not one
        assert sources.kernel("fa2", "sm_80", windowed, None) is not one
    finally:
        sources.kernel.cache_clear()
    assert [(g, d, a["arch"]) for g, d, a in asked] == [
        ("fa2", "fwd", "sm_80"),
        ("fa2", "fwd", "sm_89"),
        ("fa2", "fwd", "sm_80"),
    ]
    windows = [(a["causal"], a["window_size"], a["softcap"]) for _, _, a in asked]
    assert windows == [(False, (None, None), 0.0)] * 2 + [(False, (0, 1), 1.0)]


def test_what_is_compiled_is_the_variant_asked_for():
    """The stand-in values for bounds and softcap give the same variant back."""
    from cute_fa.build.compile import make_request

    for changes in (
        {},
        {"causal": True},
        {"causal": True, "window_left": 3},
        {"window_right": 2, "softcap": 9.0},
    ):
        variant = make_call(**changes)[-1].problem.variant
        request = make_request(
            "fa1",
            "fwd",
            arch="sm_80",
            dtype=variant.dtype,
            head_dim=variant.head_dim,
            head_dim_v=variant.head_dim_v,
            **sources.variant_features(variant),
        )
        assert request.variant == variant


def test_a_call_on_a_gpu_is_remembered(kernel):
    """What ``flash_attn_func`` needs to launch the next call like it without the checks."""
    q, k, v, call = make_call(window_left=5, softcap=2.0)
    plans.forget()
    try:
        key = key_for(q, k, v)
        launch.forward(q, k, v, call, key=key)
        again = plans.find(key, q, k, v).run(q, k, v)
        first, second = kernel.calls
        assert first[:3] == second[:3] and first[6:] == second[6:]
        for x, y in zip(first[3:6], second[3:6], strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert again[0] is second[3] and again[1] is second[4]
        assert kernel.devices == [q.device] * 2
        plans.forget()
        launch.forward(q, k, v, replace(call, has_work=False), key=key)
        assert plans.find(key, q, k, v) is None
        odd = q[:1].as_strided((1, *q.shape[1:]), (3, *q.stride()[1:]))
        launch.forward(odd, k, v, call, key=key)
        assert plans.find(key, q, k, v) is None
    finally:
        plans.forget()


def test_what_is_refused_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA Error Code: 719")

    def plan(launch: Any) -> plans.Plan:
        return plans.Plan(launch, (plans.contiguous((1,), torch.float32),) * 2, ())

    tensors = torch.zeros(3, 1, 8, 1, 64).half()
    with pytest.raises(LaunchError, match="CUDA Error Code: 719") as caught:
        plan(refuse).run(*tensors)
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: f"unspecified failure ({code})")
    with pytest.raises(LaunchError, match=r"719, unspecified failure \(719\)"):
        plan(refuse).run(*tensors)

    def hands_out_no_fp8(*_: Any) -> None:
        raise RuntimeError("float8 types are not supported by dlpack")

    with pytest.raises(MissingToolError, match="torch-c-dlpack-ext"):
        plan(hands_out_no_fp8).run(*tensors)

    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$") as other:
        plan(fail).run(*tensors)
    assert not isinstance(other.value, LaunchError)
