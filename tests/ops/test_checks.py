"""Bad input is refused before anything is compiled, with a message that says how to mend it."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from cute_fa.build.registry import COMPILED
from cute_fa.errors import CuteFAError, InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops import checks, flash_attn_func
from cute_fa.ops.checks import Options, check_call
from cute_fa.target import get_target

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


def tensors(batch=2, seqlen_q=5, seqlen_k=7, heads_q=4, heads_k=2, dim=16, dim_v=16, **kind):
    kind = {"dtype": torch.float16, **kind}
    return (
        torch.zeros(batch, seqlen_q, heads_q, dim, **kind),
        torch.zeros(batch, seqlen_k, heads_k, dim, **kind),
        torch.zeros(batch, seqlen_k, heads_k, dim_v, **kind),
    )


def check(q, k, v, *, device=None, **options):
    return check_call(q, k, v, Options(**options), device=device)


def strided(x):
    """The same values with rows of 17 elements: 34 bytes."""
    storage = x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)
    return storage[..., :-1]


def shifted(x):
    """The same shape, starting 2 bytes after an aligned address."""
    storage = x.new_zeros(x.numel() + 8)
    return storage[1 : 1 + x.numel()].view(x.shape)


def quantised(x):
    with warnings.catch_warnings():  # deprecated in torch, still in use
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def nested(x):
    with warnings.catch_warnings():  # a prototype in torch
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(x))


def replaced(**changes):
    """q, k, v with some of them changed by a function."""
    result = dict(zip("qkv", tensors(), strict=True))
    return [changes[name](x) if name in changes else x for name, x in result.items()]


BAD_TENSORS = {
    "a list": (replaced(q=lambda x: x.tolist()), InvalidTypeError, "q is not a tensor", "list"),
    "an array": (replaced(k=lambda x: x.numpy()), InvalidTypeError, "k is not a tensor", "ndarray"),
    "None": (replaced(v=lambda x: None), InvalidTypeError, "v is not a tensor", "NoneType"),
    "fp32": (tensors(dtype=torch.float32), InvalidTypeError, "no kernel takes", "float32"),
    "fp64": (tensors(dtype=torch.float64), InvalidTypeError, "no kernel takes", "float64"),
    "int": (tensors(dtype=torch.int32), InvalidTypeError, "no kernel takes", "int32"),
    "bool": (tensors(dtype=torch.bool), InvalidTypeError, "no kernel takes", "bool"),
    "complex": (tensors(dtype=torch.complex64), InvalidTypeError, "no kernel takes", "complex64"),
    "sparse": (
        replaced(q=lambda x: x.to_sparse()),
        InvalidTypeError,
        "q is not a dense tensor",
        "sparse_coo",
    ),
    "quantized": (
        replaced(k=quantised),
        InvalidTypeError,
        "k is not a dense tensor",
        "quantized",
    ),
    "nested": (
        replaced(v=nested),
        InvalidTypeError,
        "v is not a dense tensor",
        "nested",
    ),
    "mixed dtypes": (
        replaced(v=lambda x: x.bfloat16()),
        InvalidTypeError,
        "v has another dtype",
        "bfloat16",
    ),
    "mixed devices": (
        replaced(k=lambda x: x.to("meta")),
        InvalidArgumentError,
        "k is on another device",
        "meta",
    ),
    "meta": (tensors(device="meta"), InvalidArgumentError, "nothing here runs on", "meta"),
    "three dimensions": (
        replaced(q=lambda x: x[0]),
        InvalidArgumentError,
        "q does not have four",
        "3:",
    ),
    "five dimensions": (
        replaced(k=lambda x: x[None]),
        InvalidArgumentError,
        "k does not have four",
        "5:",
    ),
    "batch": (replaced(k=lambda x: x[:1]), InvalidArgumentError, "batch sizes", "(1, 7, 2, 16)"),
    "key length": (
        replaced(v=lambda x: x[:, :6]),
        InvalidArgumentError,
        "key and value lengths",
        "(2, 6, 2, 16)",
    ),
    "key heads": (
        replaced(v=lambda x: x[:, :, :1]),
        InvalidArgumentError,
        "key and value heads",
        "(2, 7, 1, 16)",
    ),
    "head dims": (
        replaced(k=lambda x: torch.cat([x, x], -1)),
        InvalidArgumentError,
        "query and key head dims",
        "32",
    ),
    "head ratio": (tensors(heads_q=3), InvalidArgumentError, "heads do not divide", "3 query"),
    "no K/V heads": (tensors(heads_k=0), InvalidArgumentError, "heads_k", "0"),
    "head dim 100": (tensors(dim=100), InvalidArgumentError, "head_dim", "100"),
    "head dim 0": (tensors(dim=0), InvalidArgumentError, "head_dim", "0"),
    "head dim 264": (tensors(dim=264), InvalidArgumentError, "head_dim", "264"),
    "value dim 512": (tensors(dim_v=512), InvalidArgumentError, "head_dim_v", "512"),
    "last stride": (
        replaced(q=lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)),
        InvalidArgumentError,
        "last dimension of q",
        "strides (",
    ),
    "stride of 34 bytes": (
        replaced(k=strided),
        InvalidArgumentError,
        "rows of k are not 16-byte aligned",
        "17",
    ),
    "address": (replaced(v=shifted), InvalidArgumentError, "v does not start", "offset 1"),
    "batch beyond the grid": (
        [x[:1].expand(70000, -1, -1, -1) for x in tensors()],
        UnsupportedError,
        "batch is larger",
        "70000",
    ),
    "gradient": (
        replaced(k=lambda x: x.requires_grad_()),
        UnsupportedError,
        "no backward",
        "k requires",
    ),
    "fp8": (tensors(dtype=torch.float8_e5m2), InvalidTypeError, "dtype", "float8_e5m2"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors(what):
    (q, k, v), kind, message, got = BAD_TENSORS[what]
    with pytest.raises(kind) as caught:
        check(q, k, v, generation="fa2")
    text = str(caught.value)
    assert message in text and got in text, text
    assert "got:" in text and ("expected:" in text or "to mend:" in text), text


def test_autocast_converts_nothing_and_the_message_says_so():
    wrong = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InvalidTypeError) as caught:
        flash_attn_func(*wrong)
    assert "torch.get_autocast_dtype('cpu')" in str(caught.value)
    with pytest.raises(InvalidTypeError) as caught:
        flash_attn_func(*wrong)
    assert "autocast" not in str(caught.value)


BAD_OPTIONS = [
    ({"softmax_scale": math.nan}, InvalidArgumentError, "softmax_scale"),
    ({"softmax_scale": math.inf}, InvalidArgumentError, "softmax_scale"),
    ({"softmax_scale": 1e39}, InvalidArgumentError, "softmax_scale"),
    ({"softmax_scale": "0.1"}, InvalidTypeError, "softmax_scale"),
    ({"softmax_scale": torch.tensor(0.1)}, InvalidTypeError, "softmax_scale"),
    ({"softcap": -1.0}, InvalidArgumentError, "softcap"),
    ({"softcap": math.nan}, InvalidArgumentError, "softcap"),
    ({"softcap": 1e-40}, InvalidArgumentError, "softcap"),
    ({"softcap": None}, InvalidTypeError, "softcap"),
    ({"causal": 1}, InvalidTypeError, "causal"),
    ({"causal": "top_left"}, InvalidTypeError, "bottom-right"),
    ({"causal": torch.tensor(True)}, InvalidTypeError, "causal"),
    ({"window_size": (-2, 0)}, InvalidArgumentError, "window_size"),
    ({"window_size": 3}, InvalidTypeError, "window_size"),
    ({"window_size": (1, 2, 3)}, InvalidTypeError, "window_size"),
    ({"window_size": (1.5, 0)}, InvalidTypeError, "window_size"),
    ({"generation": "fa5"}, InvalidArgumentError, "fa4"),
    ({"generation": None}, InvalidArgumentError, "generation"),
    ({"generation": "fa4", "arch": "sm_90a"}, UnsupportedError, "fa3"),
    ({"backend": "tpu"}, InvalidArgumentError, "backend"),
    ({"backend": "cuda"}, InvalidArgumentError, "cpu"),
    ({"arch": "sm_70"}, InvalidArgumentError, "sm_80"),
    ({"arch": ""}, InvalidArgumentError, "architecture"),
    ({"arch": 8.0}, InvalidTypeError, "arch"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS, ids=str)
def test_bad_options(options, kind, message):
    with pytest.raises(kind) as caught:
        check(*tensors(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["causal", "deterministic", "return_lse"])
@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_flags_are_bools(name, value):
    with pytest.raises(InvalidTypeError, match=name):
        checks.check_flag(name, value)


def test_a_good_call_states_its_problem():
    q, k, v = tensors(dim_v=24)
    call = check(q, k, v, causal=True, window_size=(3, 9), softcap=2, softmax_scale=np.float32(0.5))
    p = call.problem
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.heads_q, p.heads_k) == (2, 5, 7, 4, 2)
    assert (p.head_dim, p.head_dim_v, p.dtype, p.scale) == (16, 24, "float16", 0.5)
    assert p.window == (3, 0) and p.causal and p.softcap == 2
    assert (call.backend, call.generation, call.target.arch) == ("sim", "fa2", "sm_80")
    assert call.has_work


def test_a_right_bound_of_zero_is_causal():
    q, k, v = tensors()
    causal = check(q, k, v, causal=True).problem
    assert check(q, k, v, window_size=(-1, 0)).problem == causal
    assert check(q, k, v, window_size=(None, np.int64(0))).problem == causal


@pytest.mark.parametrize("arch", COMPILED)
@pytest.mark.parametrize("generation", ["fa1", "fa2"])
def test_every_architecture_is_served_by_both_rungs(arch, generation):
    for dim in (8, 32, 64, 96, 128, 192, 256):
        call = check(*tensors(dim=dim, dim_v=dim), arch=arch, generation=generation)
        assert (call.generation, call.target.arch) == (generation, arch)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward_ad loads some
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_tangent_is_dropped(name):
    """A result without a tangent would count as a constant: jvp would give 0."""
    values = dict(zip("qkv", torch.zeros(3, 1, 8, 2, 64).half(), strict=True))

    def attend(x):
        return flash_attn_func(**{**values, name: x})

    with pytest.raises(UnsupportedError, match=f"{name} has a tangent"):
        torch.func.jvp(attend, (values[name],), (values[name],))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(values[name], values[name])
        with pytest.raises(UnsupportedError, match=f"{name} has a tangent"):
            attend(dual)
        assert check_call(**values, options=Options()).has_work, "others have none"


def test_gradients_are_only_refused_where_they_would_flow():
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.no_grad():
        assert check(q, k, v).has_work
    with torch.inference_mode():
        assert check(q, k, v).has_work
    with pytest.raises(UnsupportedError, match="q requires a gradient"):
        check(q, k, v)


def test_legal_layouts_pass():
    q, k, v = tensors()
    packed = torch.zeros(2, 5, 3, 4, 16, dtype=torch.float16)
    for views in (
        packed.unbind(2),
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        (q, k[:, :, :1].expand(-1, -1, 4, -1), v[:, :, :1].expand(-1, -1, 4, -1)),
        (q[:, :1], k[:, :1], v[:, :1]),
        # one row: no stride but the last is ever used
        [strided(x[:1, :1, :1]) for x in (q, k, v)],
    ):
        assert check(*views).has_work


def test_empty_problems_have_no_work_but_are_checked():
    for sizes in (
        {"batch": 0},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
        {"heads_q": 0},
        {"heads_q": 0, "heads_k": 0},
    ):
        assert not check(*tensors(**sizes)).has_work
    with pytest.raises(CuteFAError, match="head_dim"):
        check(*tensors(seqlen_q=0, dim=12))
    with pytest.raises(CuteFAError, match="fa4"):
        check(*tensors(batch=0), generation="fa4", arch="sm_90a")


def test_the_entered_device_decides_and_arch_must_agree():
    device = SimpleNamespace(target=get_target("sm_89"))
    q, k, v = tensors()
    assert check(q, k, v, device=device).target.arch == "sm_89"
    assert check(q, k, v, device=device, arch="ada").target.arch == "sm_89"
    with pytest.raises(InvalidArgumentError, match=r"sim\.Device\('sm_80'\)"):
        check(q, k, v, device=device, arch="sm_80")


def on_a_gpu(index=0):
    """Something that says it is a CUDA tensor, for what is decided before its memory is used."""
    return SimpleNamespace(device=torch.device("cuda", index))


def test_cuda_tensors_run_on_their_own_architecture(monkeypatch):
    seen = []

    def capability(device):
        seen.append(device)
        return (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    q = on_a_gpu(1)
    for arch, expected in ((None, "sm_90a"), ("sm_90", "sm_90"), ("hopper", "sm_90a")):
        assert checks.choose_backend(q, Options(), None) == "cuda"
        assert checks.choose_target(q, Options(arch=arch), "cuda", None).arch == expected
    assert seen == [torch.device("cuda", 1)] * 3
    with pytest.raises(InvalidArgumentError, match=r"capability 9\.0"):
        checks.choose_target(q, Options(arch="sm_80"), "cuda", None)
    with pytest.raises(InvalidArgumentError, match=r"\.cpu\(\)"):
        checks.choose_backend(q, Options(backend="sim"), None)
    with pytest.raises(InvalidArgumentError, match="simulated device"):
        checks.choose_backend(q, Options(), SimpleNamespace(target=get_target("sm_80")))


def test_a_gpu_without_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InvalidArgumentError, match=r"7\.5"):
        checks.choose_target(on_a_gpu(), Options(), "cuda", None)


def test_a_lazily_negated_view_is_refused():
    q = torch.randn(1, 4, 1, 8, dtype=torch.float16)
    with pytest.raises(InvalidArgumentError, match="resolve_neg"):
        flash_attn_func(torch._neg_view(q), q, q)
