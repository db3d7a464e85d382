"""Nothing that is checked or timed mixes the CPU's tensors with the GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cute_fa.bench.inputs import make
from cute_fa.bench.verify import verify
from cute_fa.gpu_check import agreement, correctness, streams
from cute_fa.gpu_check.place import OneKernel, Place
from cute_fa.ops.bundle import load_bundle
from cute_fa.target import get_target
from tests.gpu_check import other_device
from tests.gpu_check.processes import SHAPE


@pytest.fixture
def place(folder: Path, fp8_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The second device, where calls are those of the simulator. (Bundles are made before.)"""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Place, "backend", "sim")
    for name, elsewhere in {
        "in_another_stream": lambda bind, inputs: bind(*inputs)(),
        "in_a_graph": lambda call: call(),
    }.items():
        monkeypatch.setattr(streams, name, elsewhere)
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(OneKernel, name, _in_the_simulator(getattr(OneKernel, name)))
    with other_device.entered():
        yield Place(other_device.DEVICE, get_target("sm_80"))


def _in_the_simulator(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
    def call(self: OneKernel, *tensors: Tensor, **options: Any) -> list[Tensor]:
        given = [*tensors, *(x for x in options.values() if isinstance(x, Tensor))]
        assert {x.device.type for x in given} == {other_device.DEVICE}
        with torch.utils._python_dispatch._disable_current_modes():
            options = {name: other_device.inside_of(x) for name, x in options.items()}
            results = function(self, *map(other_device.inside_of, tensors), **options)
        return [other_device.put_there(x) for x in results]

    return call


def test_two_devices_do_not_mix(place: Place) -> None:
    """The device is no looser than torch is."""
    there, here = torch.ones(3, device=place.device), torch.ones(3)
    assert there.device.type == (there + 1).device.type == place.device
    assert float((2 * there).sum()) == 6.0 and torch.equal(there.cpu(), here)
    with pytest.raises(AssertionError, match="tensors of two devices"):
        there + here


@pytest.mark.parametrize("which", ["folder", "fp8_folder"])
def test_checks_keep_to_the_device(
    which: str, place: Place, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    bundle = load_bundle(folder)
    place = Place(place.device, get_target(bundle.archs[0]))
    kernels = [kernel for kernel in bundle.kernels if kernel.role == "default"]
    checks = [
        *agreement.checks(bundle, place),
        *correctness.checks(kernels, place, tiny=True),
        *correctness.repeats(kernels, place, times=2, tiny=True),
    ]
    outcomes = [check.outcome() for check in checks]
    assert [outcome.detail for outcome in outcomes if not outcome.ok] == []
    assert {outcome.section for outcome in outcomes} == {"agreement", "correctness", "repeats"}


def test_the_benchmark_keeps_to_the_device(place: Place) -> None:
    inputs = make(SHAPE, "cpu")
    there = make(SHAPE, place.device)
    assert there.q.device.type == place.device and torch.equal(there.q.cpu(), inputs.q)
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)), is_causal=True
    ).transpose(1, 2)
    assert verify(out.to(place.device), there, SHAPE).ok
    assert not verify(out.to(place.device) * 2, there, SHAPE).ok
