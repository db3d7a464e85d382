"""CPU tensors in the place of a GPU's: everything of a call runs but the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cute_fa.ops import checks, plans, sources
from cute_fa.target import get_target


def gpu_stands_in(monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    """What a launch asks torch about a GPU; ``record.current`` is the current device."""

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        record.current = index
        yield
        record.current = None

    monkeypatch.setattr(torch.cuda, "device", device)
    # None is the index of the CPU's device, so the tensors' device is current inside the block.
    other = lambda: 7 if record.current is None else None  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getDevice", other, raising=False)
    monkeypatch.setattr(plans, "_empty_on_gpu", plans._empty_on_cpu)


class Gpu:
    """A GPU of an architecture, on which a call only leaves its traces.

    Attributes:
        launches: the arguments of each launch.
        checked: how many calls were checked.
        kernels: (generation, arch, variant, source) of each kernel that was asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.kernels: list[tuple[Any, ...]] = []
        self.checked = 0
        self.current: Any = None
        target = get_target(arch)
        gpu_stands_in(monkeypatch, self)

        def backend(*_: Any) -> str:
            self.checked += 1
            return "cuda"

        def kernel(*of: Any) -> Any:
            self.kernels.append(of)
            config = SimpleNamespace(workspace=lambda batch, rows, heads: ())
            return SimpleNamespace(host=lambda backend: self._launch, config=config)

        kernel.cache_clear = lambda: None  # type: ignore[attr-defined]
        monkeypatch.setattr(checks, "choose_backend", backend)
        monkeypatch.setattr(checks, "choose_target", lambda *_: target)
        monkeypatch.setattr(sources, "kernel", kernel)

    def _launch(self, *arguments: Any) -> None:
        assert self.current is not None, "the tensors' device is the current one"
        self.launches.append(arguments)


def key_for(
    q: Any,
    k: Any,
    v: Any,
    *more: Tensor | None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    arch: Any = None,
) -> Any:
    """The key of a call of ``flash_attn_func`` with these arguments and no others."""
    numbers = (softmax_scale, causal, window_size, softcap, None, False, False)
    return plans.key_of(q, k, v, more, numbers, ("auto", "auto", arch, None))
