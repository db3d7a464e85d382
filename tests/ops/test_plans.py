"""What was decided for a call is used for the next one like it, and for no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import cute_fa
from cute_fa import sim
from cute_fa.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from cute_fa.ops import guards, plans, sources
from cute_fa.ops.plans import Plan
from tests.ops.gpu_stand_in import Gpu, key_for


def qkv(batch: int = 1, dim_v: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.zeros(2, batch, 24, 2, 64, dtype=torch.bfloat16)
    return q, k, torch.zeros(batch, 24, 2, dim_v, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch, "sm_90a")


@pytest.fixture(params=[1, 2], ids=["by key", "by guard"])
def known(request: pytest.FixtureRequest, gpu: Gpu) -> tuple[tuple[Tensor, ...], Gpu]:
    """Tensors of which a causal call is known; from the second on, torch's guards know it."""
    tensors = qkv()
    for _ in range(request.param):
        cute_fa.flash_attn_func(*tensors, causal=True)
    assert gpu.checked == 1 and len(plans._recent) == request.param - 1
    del gpu.launches[1:]
    return tensors, gpu


def test_a_known_call_is_launched_at_once(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    tensors, gpu = known
    plans.latest.launches = ("an earlier call's",)
    out = cute_fa.flash_attn_func(*tensors, causal=True)
    first, second = gpu.launches
    assert gpu.checked == 1 and len(gpu.kernels) == 1
    assert second[:3] == tensors and second[3] is out and second[3] is not first[3]
    assert second[5:] == first[5:] == (0.125, 0.0, 48, 0)
    assert out.shape == (1, 24, 2, 64) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert second[4].shape == (1, 2, 24) and second[4].dtype == torch.float32
    assert cute_fa.ops.last_launches() == ()
    other = tuple(torch.zeros_like(x) for x in tensors)
    assert cute_fa.flash_attn_func(*other, causal=True) is gpu.launches[2][3]
    assert gpu.checked == 1


def test_both_results(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    tensors, gpu = known
    for _ in range(2):
        out, lse = cute_fa.flash_attn_func(*tensors, causal=True, return_lse=True)
        assert gpu.launches[-1][3] is out and gpu.launches[-1][4] is lse
    assert gpu.checked == 2


def varlen(**changes: Any) -> dict[str, Any]:
    """Arguments of a call on two packed sequences."""
    q, k, v = (x[0] for x in qkv())
    borders = torch.tensor([0, 10, 24], dtype=torch.int32)
    values = {"q": q, "k": k, "v": v, "cu_seqlens_q": borders, "cu_seqlens_k": borders.clone()}
    return {**values, "max_seqlen_q": 14, "max_seqlen_k": 14, "causal": True, **changes}


def test_packed_sequences(gpu: Gpu) -> None:
    used = torch.tensor([3, 14], dtype=torch.int32)
    for changes in ({}, {"seqused_k": used}, {"seqused_q": used, "seqused_k": used}):
        gpu.checked = 0
        arguments = varlen(**changes)
        for _ in range(3):
            out, lse = cute_fa.flash_attn_varlen_func(**arguments, return_lse=True)
            *_, cu_q, cu_k, used_q, used_k, rows = gpu.launches[-1]
            assert cu_q is arguments["cu_seqlens_q"] and cu_k is arguments["cu_seqlens_k"]
            assert used_q is changes.get("seqused_q") and used_k is changes.get("seqused_k")
            assert rows == 14 and gpu.launches[-1][3] is out and gpu.launches[-1][4] is lse
            if used_q is not None:
                assert (out == 0).all() and (lse == -torch.inf).all()
        assert gpu.checked == 1, changes


@pytest.mark.parametrize(
    "change",
    [
        {"max_seqlen_q": 15},
        {"max_seqlen_k": 20},
        {"seqused_k": torch.tensor([3, 4], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 1, 2, 3, 24], dtype=torch.int32)[[0, 2, 4]]},
        {"causal": False},
    ],
    ids=str,
)
def test_other_lengths_are_another_call(gpu: Gpu, change: dict[str, Any]) -> None:
    """Numbers on the host, and which lengths are given; not what is in the tensors."""
    cute_fa.flash_attn_varlen_func(**varlen())
    cute_fa.flash_attn_varlen_func(**varlen(**change))
    same_kind = set(change) == {"cu_seqlens_q"}
    assert gpu.checked == (1 if same_kind else 2)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_seqlen_q": True}, InvalidTypeError),
        ({"max_seqlen_q": 14.0}, InvalidTypeError),
        ({"cu_seqlens_q": torch.tensor([0, 10, 24])}, InvalidTypeError),
        ({"cu_seqlens_q": [0, 10, 24]}, InvalidTypeError),
        ({"cu_seqlens_k": torch.zeros(6, dtype=torch.int32)[::2]}, InvalidArgumentError),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, InvalidArgumentError),
        ({"seqused_q": torch.zeros(3, dtype=torch.int32)}, InvalidArgumentError),
    ],
    ids=str,
)
def test_bad_lengths_are_refused_as_before(
    gpu: Gpu, change: dict[str, Any], error: type[Exception]
) -> None:
    cute_fa.flash_attn_varlen_func(**varlen())
    with pytest.raises(error):
        cute_fa.flash_attn_varlen_func(**varlen(**change))
    assert len(gpu.launches) == 1


@pytest.mark.parametrize("by_block", [False, True])
def test_fp8_with_and_without_descales(gpu: Gpu, by_block: bool) -> None:
    tensors = tuple(x.to(torch.float8_e4m3fn) for x in qkv())
    shape = (1, 2, 1) if by_block else (1, 2)
    names = ("q_descale", "k_descale", "v_descale")
    scales = {name: torch.full(shape, 2.0) for name in names}
    for _ in range(3):
        out = cute_fa.flash_attn_func(*tensors)
        plain = gpu.launches[-1]
        assert out.dtype == torch.bfloat16
        assert all((x == 1.0).all() and x.shape == (1, 2) for x in plain[-3:])
        cute_fa.flash_attn_func(*tensors, **scales)
        given = gpu.launches[-1]
        for name, x in zip(names, given[-3:], strict=True):
            assert x is scales[name]
    assert gpu.checked == 2 and len(gpu.launches) == 6
    with pytest.raises(InvalidTypeError):
        cute_fa.flash_attn_func(*tensors, **{**scales, "v_descale": scales["v_descale"].double()})
    with pytest.raises(InvalidArgumentError):
        cute_fa.flash_attn_func(*tensors, **{**scales, "v_descale": torch.ones(1, 3)})


def test_what_is_made_while_a_graph_is_captured_is_not_kept(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has run by then: what stands for descales that are left out is not 1 yet."""
    is_capturing = True
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    fp8 = tuple(x.to(torch.float8_e4m3fn) for x in qkv())
    for tensors in (fp8, qkv()):
        gpu.checked, is_capturing = 0, True
        for _ in range(2):
            cute_fa.flash_attn_func(*tensors)
        is_capturing = False
        for _ in range(2):
            cute_fa.flash_attn_func(*tensors)
        is_capturing = True
        cute_fa.flash_attn_func(*tensors)  # what was made before is used there
        assert gpu.checked == 3


def test_descales_have_no_gradient_either(gpu: Gpu) -> None:
    tensors = tuple(x.to(torch.float8_e4m3fn) for x in qkv())
    plain, learnt = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    with torch.no_grad():
        cute_fa.flash_attn_func(*tensors, q_descale=learnt)
    cute_fa.flash_attn_func(*tensors, q_descale=plain)
    assert gpu.checked == 1
    with pytest.raises(UnsupportedError, match="q_descale requires a gradient"):
        cute_fa.flash_attn_func(*tensors, q_descale=learnt)
    packed = {**varlen(), **{name: x[0] for name, x in zip("qkv", tensors, strict=True)}}
    with pytest.raises(UnsupportedError, match="v_descale requires a gradient"):
        cute_fa.flash_attn_varlen_func(**packed, v_descale=learnt.expand(2, 2))
    with pytest.raises(UnsupportedError, match="k_descale requires a gradient"):
        cute_fa.flash_attn_func(*(x.to("meta") for x in tensors), k_descale=learnt.to("meta"))
    assert len(gpu.launches) == 2


CHANGES: list[dict[str, Any]] = [
    {"causal": False},
    {"softcap": 1.0},
    {"softmax_scale": 0.5},
    {"window_size": (3, -1)},
    {"generation": "fa2"},
    {"arch": "sm_90a"},
    {"pack_gqa": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_other_options_are_another_call(
    known: tuple[tuple[Tensor, ...], Gpu], change: dict[str, Any]
) -> None:
    tensors, gpu = known
    cute_fa.flash_attn_func(*tensors, **{"causal": True, **change})
    assert gpu.checked == 2


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
def test_other_tensors_are_another_call(known: tuple[tuple[Tensor, ...], Gpu], change: Any) -> None:
    tensors, gpu = known
    changed = change(*tensors)
    for _ in range(2):
        cute_fa.flash_attn_func(*changed, causal=True)
        assert gpu.launches[-1][:3] == changed
    assert gpu.checked == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"causal": 1}, InvalidTypeError),
        ({"causal": True, "softcap": False}, InvalidTypeError),
        ({"causal": True, "window_size": (-1, True)}, InvalidTypeError),
        ({"causal": True, "softmax_scale": np.array(0.5)}, InvalidTypeError),
        ({"causal": True, "window_size": (-1,)}, InvalidTypeError),
        ({"causal": True, "pack_gqa": 1}, InvalidTypeError),
        ({"causal": True, "deterministic": "yes"}, InvalidTypeError),
        ({"causal": True, "deterministic": 0}, InvalidTypeError),
        ({"causal": True, "return_lse": 0}, InvalidTypeError),
        ({"causal": True, "generation": "fa5"}, InvalidArgumentError),
        ({"causal": True, "kernels": "bundle"}, InvalidTypeError),
        ({"causal": True, "q_descale": torch.ones(1, 2)}, InvalidArgumentError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_as_before(
    known: tuple[tuple[Tensor, ...], Gpu], change: dict[str, Any], error: type[Exception]
) -> None:
    """Also such as are equal to what a known call had: True is 1, and False is 0.0."""
    tensors, gpu = known
    cute_fa.flash_attn_func(*tensors, causal=True, window_size=(-1, 1))
    cute_fa.flash_attn_func(*tensors, causal=True, pack_gqa=True)
    cute_fa.flash_attn_func(*tensors, causal=True, softmax_scale=np.float64(0.5))
    launches = len(gpu.launches)
    with pytest.raises(error):
        cute_fa.flash_attn_func(*tensors, **change)
    assert len(gpu.launches) == launches


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward_ad loads some
def test_what_may_differ_is_looked_at(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    (q, k, v), gpu = known
    storage = torch.zeros(q.numel() + 8, dtype=q.dtype)
    with pytest.raises(InvalidArgumentError, match="16-byte border"):
        cute_fa.flash_attn_func(storage[4:-4].view(q.shape), k, v, causal=True)
    with pytest.raises(InvalidArgumentError, match="negated"):
        cute_fa.flash_attn_func(torch._neg_view(q), k, v, causal=True)
    with_gradient = q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward"):
        cute_fa.flash_attn_func(with_gradient, k, v, causal=True)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="q has a tangent"):
        cute_fa.flash_attn_func(forward_ad.make_dual(q, q), k, v, causal=True)
    checked = gpu.checked
    with torch.no_grad():
        cute_fa.flash_attn_func(with_gradient, k, v, causal=True)
    assert len(gpu.launches) == 2 and gpu.checked == checked
    key = key_for(q, k, v, causal=True)
    assert plans.find(key, q, k, v) is not None
    with sim.Device("sm_80"):
        assert plans.find(key, q, k, v) is None
    with NothingElse():
        assert plans.find(key, q, k, v) is None


def test_another_device_is_another_call() -> None:
    tensors = qkv()
    elsewhere = tuple(x.to("meta") for x in tensors)
    assert key_for(*tensors) == key_for(*qkv())
    for index in range(3):
        mixed = (*tensors[:index], elsewhere[index], *tensors[index + 1 :])
        assert key_for(*mixed) != key_for(*tensors)
    lengths = torch.zeros(3, dtype=torch.int32)
    assert key_for(*tensors, lengths.to("meta")) != key_for(*tensors, lengths)


def test_lengths_may_not_be_negated(gpu: Gpu) -> None:
    arguments = varlen()
    cute_fa.flash_attn_varlen_func(**arguments)
    with pytest.raises(InvalidArgumentError, match="negated"):
        cute_fa.flash_attn_varlen_func(
            **{**arguments, "cu_seqlens_k": torch._neg_view(arguments["cu_seqlens_k"])}
        )


def test_other_kernels_are_asked_for(known: tuple[tuple[Tensor, ...], Gpu], tmp_path: Any) -> None:
    """Whoever registers a source of kernels changes what a call means."""
    tensors, gpu = known
    name = str(tmp_path)
    sources.register(name, sources.source(None))
    try:
        cute_fa.flash_attn_func(*tensors, causal=True)
        assert gpu.checked == 2
    finally:
        del sources._sources[name]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_a_key_is_checked(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    (q, k, v), _ = known
    nested = torch.nested.nested_tensor([q[0], q[0][:3]])
    for odd in (q.tolist(), torch.nn.Parameter(q, False), nested):
        assert key_for(odd, k, v, causal=True) is None
    assert key_for(q, k, v, torch.nn.Parameter(q, False)) is None
    assert key_for(q, k, v, softmax_scale=torch.tensor(0.5)) is None  # another number tomorrow
    with pytest.raises(InvalidTypeError, match="dense"):
        cute_fa.flash_attn_func(q.to_sparse(), k, v, causal=True)
    plan = Plan(lambda *_: None, (), ())
    for unusable in (
        None,
        key_for(q, k, v, arch=["sm_80"]),
        key_for(q, k, v, softmax_scale=np.float64(0.5)),  # an array looks the same in the key
        key_for(q, k, v, window_size=(-1, np.int32(3))),
    ):
        plans.remember(unusable, plan)
        assert plans.find(unusable, q, k, v) is None


def test_strides_of_dimensions_of_one_element(gpu: Gpu) -> None:
    """They may be anything; a kernel gets legal ones, on every call."""
    q, k, v = (torch.zeros(1, 1, 2, 64).half() for _ in range(3))
    odd = q.as_strided(q.shape, (3, 5, 64, 1))
    for tensors in ((odd, k, v), (q, k, v), (odd, k, v), (q, k, v)):
        cute_fa.flash_attn_func(*tensors)
        assert all(stride % 8 == 0 for stride in gpu.launches[-1][0].stride()[:-1])


def test_a_traced_call_is_one_node(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    tensors, gpu = known
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
    assert len(gpu.launches) == 1


def test_without_torchs_private_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go; torch.empty_strided will stay."""
    layout = plans.contiguous((2, 3, 1, 4), torch.float16)
    quick = plans._allocator("cpu")
    monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    slow = plans._allocator("cpu")
    assert quick is not slow
    for x in (quick(*layout), slow(*layout)):
        assert x.shape == (2, 3, 1, 4) and x.is_contiguous() and x.dtype == torch.float16
        assert x.device.type == "cpu" and x.stride() == torch.empty(2, 3, 1, 4).stride()


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    tensors = qkv()
    for number in range(8):
        plans.remember(key_for(*tensors, softmax_scale=float(number)), Plan(print, (), ()))
        assert len(plans._plans) <= 3
    assert plans.find(key_for(*tensors, softmax_scale=7.0), *tensors) is not None


def test_a_call_on_the_simulator_is_not_remembered() -> None:
    cute_fa.flash_attn_func(*qkv(), causal=True, arch="sm_80")
    assert plans._plans == {}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys that were made: none for a call that a guard recognised."""
    made: list[Any] = []
    key_of = plans.key_of

    def keep(*arguments: Any) -> Any:
        made.append(key_of(*arguments))
        return made[-1]

    monkeypatch.setattr(plans, "key_of", keep)
    return made


def fp8_call(**changes: Any) -> dict[str, Any]:
    values = dict(zip("qkv", (x.to(torch.float8_e4m3fn) for x in qkv()), strict=True))
    scales = {f"{name}_descale": torch.ones(1, 2) for name in "qkv"}
    return {**values, **scales, **changes}


def same(x: Tensor) -> dict[str, Tensor]:
    return {"q": x, "k": x, "v": x}


BORDERS = torch.tensor([0, 10, 24], dtype=torch.int32)
USED = torch.tensor([3, 14], dtype=torch.int32)
ONE = torch.ones(1, 2)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (cute_fa.flash_attn_func, dict(zip("qkv", qkv(), strict=True))),
    "one tensor": (cute_fa.flash_attn_func, same(qkv()[0])),
    "packed": (cute_fa.flash_attn_varlen_func, varlen()),
    "packed, one end": (
        cute_fa.flash_attn_varlen_func,
        varlen(cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS),
    ),
    "packed, one use": (cute_fa.flash_attn_varlen_func, varlen(seqused_q=USED, seqused_k=USED)),
    "FP8": (cute_fa.flash_attn_func, fp8_call()),
    "FP8, one scale": (cute_fa.flash_attn_func, fp8_call(q_descale=ONE, v_descale=ONE)),
    "FP8, a scale": (cute_fa.flash_attn_func, fp8_call(q_descale=None, k_descale=None)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_third_call_needs_no_key(gpu: Gpu, keys: list[Any], name: str) -> None:
    function, arguments = CALLS[name]
    for count in (1, 2, 2, 2):
        function(**arguments)
        assert gpu.checked == 1 and len(keys) == count
    first, last = gpu.launches[0], gpu.launches[-1]
    for x, y in zip((*first[:3], *first[5:]), (*last[:3], *last[5:]), strict=True):
        assert x is y or x == y


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_tensor_of_a_call_is_looked_at(gpu: Gpu, name: str) -> None:
    """None of these passes for one that a guard knows; a nested one would end the process."""
    function, arguments = CALLS[name]
    for _ in range(3):
        function(**arguments)
    given = [each for each, x in arguments.items() if isinstance(x, Tensor)]
    for each in given:
        x = arguments[each]
        others = [
            x.to("meta"),
            torch.nn.Parameter(x, requires_grad=False),
            torch.nested.nested_tensor([x.float(), x.float()]),
            x.float().to_sparse(),
            x.tolist(),
            x[..., :1],
            x.double(),
            torch.stack((x, x), -1)[..., 0],
            torch._neg_view(x),
        ]
        if each not in ("seqused_q", "seqused_k", "q_descale", "k_descale", "v_descale"):
            others.append(None)
        if x.dtype.is_floating_point:
            others.append(x.clone().requires_grad_())
        for other in others:
            plan, _ = plans.look_up(*_as_looked_up({**arguments, each: other}))
            assert plan is None, (each, type(other))
    assert plans.look_up(*_as_looked_up(arguments))[0] is not None


def _as_looked_up(call: dict[str, Any]) -> tuple[Any, ...]:
    """What the public functions ask ``look_up``."""
    seen: list[Any] = []

    def keep(*arguments: Any) -> tuple[None, None]:
        seen.append(arguments)
        raise _Seen

    function = cute_fa.flash_attn_varlen_func if "cu_seqlens_q" in call else cute_fa.flash_attn_func
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Seen):
        patch.setattr(plans, "look_up", keep)
        function(**call)
    return seen[0]


class NothingElse(TorchFunctionMode):
    """A function mode, which changes nothing."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class _Seen(Exception):
    pass


def test_whoever_watches_sees_the_call(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    """Modes of torch and its transforms, also where the tensors themselves are plain."""
    tensors, _ = known
    call = _as_looked_up({**dict(zip("qkv", tensors, strict=True)), "causal": True})
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        found[name] = plans.look_up(*call)[0]

    ask("nobody")
    with FakeTensorMode():
        ask("fake tensors")
    with torch.device("cpu"), NothingElse():
        ask("a function mode")
    with torch.device("meta"):
        ask("nobody: a default device")
    with forward_ad.dual_level():
        ask("forward derivatives")
    with sim.Device("sm_80"):
        ask("a simulated device")
    torch.func.vmap(lambda x: (ask("vmap"), x)[1])(torch.zeros(2))
    torch.func.grad(lambda x: (ask("grad"), x)[1])(torch.zeros(()))
    ask("nobody again")
    for name, plan in found.items():
        assert (plan is not None) == name.startswith("nobody"), name


def test_a_default_device_makes_no_difference(known: tuple[tuple[Tensor, ...], Gpu]) -> None:
    tensors, gpu = known
    with torch.device("meta"):
        for _ in range(2):
            out = cute_fa.flash_attn_func(*tensors, causal=True)
            assert out.device == tensors[0].device
    assert gpu.checked == 1


def test_inference_mode_is_recognised_too(gpu: Gpu, keys: list[Any]) -> None:
    """Its tensors differ for torch, not for a kernel."""
    tensors = qkv()
    for _ in range(3):
        cute_fa.flash_attn_func(*tensors)
    del keys[:]
    with torch.inference_mode():
        for _ in range(3):
            cute_fa.flash_attn_func(*tensors)
        assert len(keys) == 1
        for _ in range(3):
            cute_fa.flash_attn_func(*qkv())
        assert len(keys) == 2
    assert gpu.checked == 1


def test_many_shapes_of_the_same_options(gpu: Gpu, keys: list[Any]) -> None:
    """Those that have k in common are recent while they are few; others are found by their keys."""
    q, k, v = qkv()
    shapes = [(q[:, :rows], k, v) for rows in range(1, 8)]
    for _ in range(3):
        for tensors in shapes:
            out = cute_fa.flash_attn_func(*tensors)
            assert out.shape == tensors[0].shape
    assert gpu.checked == 7
    [recent] = plans._recent.values()
    assert len(recent) == plans._RECENT and len({plan for _, plan in recent}) == plans._RECENT
    del keys[:]
    for _ in range(3):
        for tensors in shapes[-2:]:
            cute_fa.flash_attn_func(*tensors)
    assert keys == []
    lengths = [tuple(x[:, :rows] for x in (q, k, v)) for rows in range(1, 20)]
    for _ in range(3):
        del keys[:]
        for tensors in lengths:
            cute_fa.flash_attn_func(*tensors)
    assert keys == [], "any number of lengths of k"


def test_without_torchs_guards(gpu: Gpu, keys: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_all_alike", None)
    tensors = qkv()
    for _ in range(4):
        cute_fa.flash_attn_func(*tensors)
    assert gpu.checked == 1 and len(keys) == 4 and plans._recent == {}
