"""The operator ``cute_fa::fwd``: shapes without memory, torch.compile, torch's own opcheck."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cute_fa import flash_attn_func
from cute_fa.errors import CuteFAError, UnsupportedError
from cute_fa.ops import sources
from cute_fa.problem import AttentionProblem
from cute_fa.testing import assert_bitwise_equal, normal_inputs


def tensors(seqlen=40, **kind):
    p = AttentionProblem(2, seqlen, seqlen + 9, 4, 2, 64, 64, "bfloat16")
    return tuple(x.to(**kind) if kind else x for x in normal_inputs(p, seed=1)[:3])


ARGUMENTS = (None, True, -1, -1, 0.0, "auto", "auto", None, None)


def test_meta_and_fake_tensors_give_shapes_without_compiling(monkeypatch):
    monkeypatch.setattr(sources, "kernel", None)
    out, lse = flash_attn_func(*tensors(device="meta"), return_lse=True)
    assert out.is_meta and out.shape == (2, 40, 4, 64) and out.dtype == torch.bfloat16
    assert lse.is_meta and lse.shape == (2, 4, 40) and lse.dtype == torch.float32
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.transpose(1, 2)).transpose(1, 2) for x in tensors())
        out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert out.shape == (2, 40, 4, 64) and out.is_contiguous() and lse.shape == (2, 4, 40)
    with pytest.raises(CuteFAError, match="batch sizes"):
        flash_attn_func(*(x.to("meta")[:n] for n, x in zip((1, 2, 2), tensors(), strict=True)))


def test_make_fx_on_plain_tensors_keeps_the_operator():
    """Its mode looks at operators, while the tensors are as always."""
    q, k, v = tensors()

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True)

    graph = make_fx(attend, tracing_mode="real")(q, k, v)
    assert torch.ops.cute_fa.fwd.default in [node.target for node in graph.graph.nodes]
    other = [torch.randn_like(x) for x in (q, k, v)]
    assert_bitwise_equal(graph(*other), attend(*other))


class Wrapped(torch.Tensor):
    """Holds a tensor; without memory of its own."""

    called: ClassVar[list] = []

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function)
        return function(*(x.held if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def test_subclasses_are_asked():
    q, k, v = tensors()
    out = flash_attn_func(Wrapped(q), Wrapped(k), Wrapped(v), causal=True)
    assert torch.ops.cute_fa.fwd.default in Wrapped.called
    assert_bitwise_equal(out, flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize(
    "change", [{"causal": 1}, {"generation": "fa5"}, {"pack_gqa": 1}, {"return_lse": 0}], ids=str
)
def test_wrong_arguments_are_refused_for_any_tensor(change):
    with pytest.raises(CuteFAError):
        flash_attn_func(*tensors(device="meta"), **change)
    with FakeTensorMode() as mode, pytest.raises(CuteFAError):
        flash_attn_func(*map(mode.from_tensor, tensors()), **change)
    with FakeTensorMode() as mode, pytest.raises(CuteFAError, match="v is not a tensor"):
        flash_attn_func(*map(mode.from_tensor, tensors()[:2]), [0.0])


def test_the_operator_is_the_function():
    q, k, v = tensors()
    out, lse = torch.ops.cute_fa.fwd(q, k, v, *ARGUMENTS)
    expected, expected_lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(lse, expected_lse)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "empty"])
def test_opcheck(layout):
    q, k, v = tensors()
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "empty":
        q = q[:, :0]
    result = torch.library.opcheck(torch.ops.cute_fa.fwd.default, (q, k, v, *ARGUMENTS))
    assert set(result.values()) == {"SUCCESS"}, result


def test_torch_compile_takes_it_whole_and_for_every_length(graphs):
    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def layer(q, k, v):
        out, lse = flash_attn_func(q * 2, k, v, causal=True, window_size=(20, -1), return_lse=True)
        return out + 1, lse

    for seqlen in (40, 57):
        q, k, v = tensors(seqlen)
        out, lse = layer(q, k, v)
        expected, expected_lse = flash_attn_func(
            q * 2, k, v, causal=True, window_size=(20, -1), return_lse=True
        )
        assert_bitwise_equal(out, expected + 1)
        assert_bitwise_equal(lse, expected_lse)
    assert len(graphs) == 1


def test_errors_come_through_a_compiled_graph():
    compiled = torch.compile(flash_attn_func, backend="eager")
    q, k, v = tensors()
    with pytest.raises(Exception, match="generation"):
        compiled(q, k, v, generation="fa7")


def test_a_gradient_through_the_operator_is_refused():
    q, k, v = tensors()
    out, _ = torch.ops.cute_fa.fwd(q.requires_grad_(), k, v, *ARGUMENTS)
    with pytest.raises(UnsupportedError, match="no backward"):
        out.sum().backward()
