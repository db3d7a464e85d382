"""The public functions with kernels from a bundle: the same results, and refusals in words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cute_fa
from cute_fa import sim
from cute_fa.build import aot, presets
from cute_fa.build import bundle as bundles
from cute_fa.errors import (
    BundleError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingToolError,
    UnsupportedError,
)
from cute_fa.ops import sources
from cute_fa.ops.bundle import LoadedBundle
from cute_fa.problem import KernelVariant

PLAIN = KernelVariant("bfloat16", 64, 64)
WISHES = (
    presets.Wish(PLAIN, ("fa1", "fa2")),
    presets.Wish(KernelVariant("bfloat16", 64, 64, causal=True, is_varlen=True), ("fa2",)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three kernels for sm_80, without the runtime library."""
    output = tmp_path_factory.mktemp("bundles") / "few"
    table = {"few": presets.Preset("tests", lambda: iter(WISHES))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", table)
        aot.write_bundle(output, archs=["sm_80"], presets=["few"], with_runtime=False, jobs=1)
    return output


@pytest.fixture
def bundle(folder: Path) -> LoadedBundle:
    return cute_fa.load_bundle(folder)


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("generation", ["fa1", "fa2", "auto"])
def test_the_same_result_bit_by_bit(
    bundle: LoadedBundle, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = qkv(1, 70, 2, 64)
    options = {"generation": generation, "return_lse": True, "arch": "sm_80"}
    with sim.Device("sm_80") as device:
        expected = cute_fa.flash_attn_func(*tensors, **options)

        def no_compiler(*arguments: object, **keywords: object) -> None:
            raise AssertionError("a bundle asked the compiler")

        monkeypatch.setattr("cute_fa.build.compile", no_compiler)
        monkeypatch.setattr("cute_fa.build.choose_generation", no_compiler)
        found = bundle.flash_attn_func(*tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [launch.hazards for launch in device.launches] == [[], []]
    assert device.launches[0].kernel == device.launches[1].kernel


def test_packed_sequences(bundle: LoadedBundle) -> None:
    tensors = qkv(60, 2, 64)
    borders = torch.tensor([0, 25, 60], dtype=torch.int32)
    options = {
        "cu_seqlens_q": borders,
        "cu_seqlens_k": borders,
        "max_seqlen_q": 35,
        "max_seqlen_k": 35,
        "causal": True,
        "arch": "sm_80",
    }
    expected = cute_fa.flash_attn_varlen_func(*tensors, **options)
    assert torch.equal(bundle.flash_attn_varlen_func(*tensors, **options), expected)


def test_the_functions_are_those_of_the_package(bundle: LoadedBundle) -> None:
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        ours, package = getattr(bundle, name), getattr(cute_fa, name)
        assert (
            inspect.signature(ours).parameters.keys()
            <= inspect.signature(package).parameters.keys()
        )
        assert "causal" in inspect.signature(ours).parameters and ours.__doc__ == package.__doc__


def test_what_is_not_in_it_is_refused(bundle: LoadedBundle) -> None:
    with pytest.raises(UnsupportedError, match=r"no kernel for the problem(.|\n)*d64") as caught:
        bundle.flash_attn_func(*qkv(1, 8, 1, 64), causal=True)
    assert "fa2 fwd sm_80 bfloat16 d64" in str(caught.value)
    with pytest.raises(UnsupportedError, match=r"runs on this architecture(.|\n)*sm_90a"):
        bundle.flash_attn_func(*qkv(1, 8, 1, 64), arch="sm_90a")
    with pytest.raises(UnsupportedError, match="fa3"):
        bundle.flash_attn_func(*qkv(1, 8, 1, 64), generation="fa3", arch="sm_80")


def test_a_graph_keeps_the_bundle(bundle: LoadedBundle) -> None:
    """The operator carries its name, so that what was traced with it runs with it."""
    q, k, v = qkv(1, 16, 1, 64)
    options = (None, False, -1, -1, 0.0, "fa2", "sim", "sm_80", bundle.source_name)
    out, _ = torch.ops.cute_fa.fwd(q, k, v, *options)
    assert torch.equal(out, bundle.flash_attn_func(q, k, v, generation="fa2"))
    with pytest.raises(InvalidArgumentError, match=r"not loaded here(.|\n)*elsewhere"):
        torch.ops.cute_fa.fwd(q, k, v, *options[:-1], "/elsewhere")


def test_kernels_must_be_a_bundle() -> None:
    for wrong in ("/some/folder", 3, bundles):
        with pytest.raises(InvalidTypeError, match="kernels is not a bundle"):
            cute_fa.flash_attn_func(*qkv(1, 8, 1, 64), kernels=wrong)  # type: ignore[arg-type]
    assert sources.name_of(None) is None


def test_loading_again_replaces(folder: Path) -> None:
    first, second = cute_fa.load_bundle(folder), cute_fa.load_bundle(str(folder))
    assert first.source_name == second.source_name
    assert sources.source(first.source_name) is second


def test_check_gpu(bundle: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "cuda_driver_version", lambda: None)
    with pytest.raises(MissingToolError, match="there is no CUDA driver"):
        bundle.check_gpu()
    monkeypatch.setattr(bundles, "cuda_driver_version", lambda: (99, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingToolError, match="torch sees no GPU"):
        bundle.check_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BundleError, match=r"on this GPU(.|\n)*H100, sm_90a(.|\n)*sm_80"):
        bundle.check_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert bundle.check_gpu().arch == "sm_86"


NO_NUMPY = """
import sys
sys.modules["numpy"] = None
import torch
from cute_fa.errors import MissingToolError
from cute_fa.ops import launch
assert launch.entered_device() is None
print([name for name in sys.modules if name.startswith("cute_fa.sim")])
try:
    launch.run_sim(None, None, ())
except MissingToolError as error:
    print(error.got, error.fix)
"""


def test_the_way_to_a_gpu_needs_no_simulator() -> None:
    command = [sys.executable, "-W", "ignore", "-c", NO_NUMPY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\nno numpy pip install numpy, or pass CUDA tensors\n"
