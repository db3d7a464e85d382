"""What was decided for a call is used for the next one like it, and for no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cute_fa
from cute_fa import sim
from cute_fa.errors import CuteFAError, InvalidTypeError, UnsupportedError
from cute_fa.ops import plans
from cute_fa.ops.plans import Plan


class Launch:
    """A host function that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def qkv(batch: int = 1, dim_v: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.zeros(2, batch, 24, 2, 64, dtype=torch.bfloat16)
    return q, k, torch.zeros(batch, 24, 2, dim_v, dtype=torch.bfloat16)


def plan_for(tensors: tuple[Tensor, ...], launch: Any, *workspace: tuple[int, ...]) -> Plan:
    q, _, v = tensors
    batch, seqlen, heads, _ = q.shape
    outputs = (
        plans.pattern((batch, seqlen, heads, v.shape[-1]), q.dtype, q.device),
        *(
            plans.pattern(shape, torch.float32, q.device)
            for shape in ((batch, heads, seqlen), *workspace)
        ),
    )
    return Plan(launch, q.device, outputs, (0.125, 0.0, 48, 0))


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def known() -> tuple[tuple[Tensor, ...], Launch]:
    """Tensors of which a causal call is known."""
    tensors, launch = qkv(), Launch()
    plans.remember(plans.key_for(*tensors, causal=True), plan_for(tensors, launch))
    return tensors, launch


def test_a_known_call_is_launched_at_once(known: tuple[tuple[Tensor, ...], Launch]) -> None:
    tensors, launch = known
    out, lse = cute_fa.flash_attn_func(*tensors, causal=True, return_lse=True)
    [arguments] = launch.calls
    assert arguments[:3] == tensors and arguments[3] is out and arguments[4] is lse
    assert arguments[5:] == (0.125, 0.0, 48, 0)
    assert out.shape == (1, 24, 2, 64) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert lse.shape == (1, 2, 24) and lse.dtype == torch.float32
    other = tuple(torch.zeros_like(x) for x in tensors)
    assert cute_fa.flash_attn_func(*other, causal=True) is launch.calls[1][3]


def test_results_of_another_shape_and_a_workspace() -> None:
    tensors, launch = qkv(dim_v=32), Launch()
    plan = plan_for(tensors, launch, (1, 24, 2, 32), (1, 2, 24))
    assert all(x.untyped_storage().nbytes() <= 4 for x in plan.outputs)
    out, _ = plan.run(*tensors)
    assert out.shape == (1, 24, 2, 32)
    made = launch.calls[0][3:7]
    assert [x.shape for x in made] == [x.shape for x in plan.outputs]
    assert all(
        x.is_contiguous() and x.numel() == x.untyped_storage().nbytes() // x.itemsize for x in made
    )
    assert launch.calls[0][7:] == plan.scalars


CHANGES: list[dict[str, Any]] = [
    {"causal": False},
    {"softcap": 1.0},
    {"softmax_scale": 0.5},
    {"window_size": (3, -1)},
    {"generation": "fa2"},
    {"arch": "sm_80"},
    {"pack_gqa": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_other_options_are_another_call(
    known: tuple[tuple[Tensor, ...], Launch], change: dict[str, Any]
) -> None:
    tensors, launch = known
    cute_fa.flash_attn_func(*tensors, **{"causal": True, "arch": "sm_80", **change})
    assert launch.calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:, :23], k, v),
        lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]),
        lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q, k, torch.zeros(1, 24, 2, 128, dtype=v.dtype)[..., :64]),
    ],
)
def test_other_tensors_are_another_call(
    known: tuple[tuple[Tensor, ...], Launch], change: Any
) -> None:
    tensors, launch = known
    changed = change(*tensors)
    key = plans.key_for(*changed, causal=True)
    assert plans.find(key, *changed) is None
    assert launch.calls == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"causal": 1}, InvalidTypeError),
        ({"causal": True, "softcap": False}, InvalidTypeError),
        ({"causal": True, "window_size": (-1, True)}, InvalidTypeError),
        ({"causal": True, "pack_gqa": 1}, InvalidTypeError),
        ({"causal": True, "deterministic": "yes"}, InvalidTypeError),
        ({"causal": True, "return_lse": 1}, InvalidTypeError),
        ({"causal": True, "backend": "cuda"}, CuteFAError),
    ],
)
def test_bad_arguments_are_refused_as_before(
    known: tuple[tuple[Tensor, ...], Launch], change: dict[str, Any], error: type[Exception]
) -> None:
    """Also such as are equal to what the known call had: True is 1, and False is 0.0."""
    tensors, launch = known
    windowed = plans.key_for(*tensors, causal=True, window_size=(-1, 1))
    plans.remember(windowed, plan_for(tensors, launch))
    with pytest.raises(error):
        cute_fa.flash_attn_func(*tensors, **change)
    assert launch.calls == []


def test_what_may_differ_is_looked_at(known: tuple[tuple[Tensor, ...], Launch]) -> None:
    (q, k, v), launch = known
    storage = torch.zeros(q.numel() + 8, dtype=q.dtype)
    shifted = storage[4:-4].view(q.shape)
    assert plans.find(plans.key_for(shifted, k, v, causal=True), shifted, k, v) is None
    negated = torch._neg_view(q)
    assert plans.find(plans.key_for(negated, k, v, causal=True), negated, k, v) is None
    with_gradient = q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward"):
        cute_fa.flash_attn_func(with_gradient, k, v, causal=True)
    with torch.no_grad():
        cute_fa.flash_attn_func(with_gradient, k, v, causal=True)
    assert len(launch.calls) == 1
    with sim.Device("sm_80"):
        assert plans.find(plans.key_for(q, k, v, causal=True), q, k, v) is None
    with torch.device("cpu"):  # a function mode
        assert plans.find(plans.key_for(q, k, v, causal=True), q, k, v) is None


def test_what_cannot_be_a_key_is_checked(known: tuple[tuple[Tensor, ...], Launch]) -> None:
    (q, k, v), launch = known
    nested = torch.nested.nested_tensor([q[0], q[0][:3]])
    for odd in (q.tolist(), torch.nn.Parameter(q, False), nested):
        assert plans.key_for(odd, k, v, causal=True) is None
    sparse = q.to_sparse()
    assert plans.find(plans.key_for(sparse, k, v, causal=True), sparse, k, v) is None
    assert plans.key_for(q, k, v, window_size=[-1, -1]) is None
    plans.remember(None, plan_for((q, k, v), launch))
    assert plans.find(None, q, k, v) is None
    unhashable = plans.key_for(q, k, v, arch=["sm_80"])
    plans.remember(unhashable, plan_for((q, k, v), launch))
    assert plans.find(unhashable, q, k, v) is None


def test_a_traced_call_is_one_node(known: tuple[tuple[Tensor, ...], Launch]) -> None:
    tensors, launch = known
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *arguments: (torch.zeros(1),)

    torch.compile(lambda q, k, v: cute_fa.flash_attn_func(q, k, v, causal=True), backend=keep)(
        *tensors
    )
    [graph] = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called[0] is torch.ops.cute_fa.fwd
    assert launch.calls == []


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    tensors = qkv()
    for number in range(8):
        key = plans.key_for(*tensors, softmax_scale=float(number))
        plans.remember(key, plan_for(tensors, Launch()))
        assert len(plans._plans) <= 3
    assert plans.find(plans.key_for(*tensors, softmax_scale=7.0), *tensors) is not None


def test_a_call_on_the_simulator_is_not_remembered() -> None:
    cute_fa.flash_attn_func(*qkv(), causal=True, arch="sm_80")
    assert plans._plans == {}
