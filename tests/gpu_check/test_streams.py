"""Calls in other streams and in CUDA graphs, with torch's streams and graphs stood in: what is done
at once on the CPU is done in the order in which a GPU would do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cute_fa.gpu_check import correctness, streams
from cute_fa.gpu_check.place import Place
from cute_fa.ops.bundle import LoadedBundle

INPUTS = [torch.randn(2, 8).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
FP8 = [torch.randn(2, 8).to(torch.float8_e4m3fn)]


class Cuda:
    """What is asked of torch.cuda, in order; a graph repeats what was called inside of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.captured: list[Callable[[], None]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, answer in {
            "Stream": lambda: "another stream",
            "stream": self.inside,
            "_sleep": lambda cycles: self.asked.append("wait"),
            "synchronize": lambda: self.asked.append("synchronize"),
            "CUDAGraph": lambda: self,
            "graph": lambda graph: self.inside("a graph"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        self.asked.append(what)
        yield
        self.asked.append("end")

    def replay(self) -> None:
        for again in self.captured:
            again()

    def call(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Doubles its inputs; a graph does so again."""
        self.asked.append("call")
        results = [2 * x.float() for x in inputs]

        def again() -> None:
            for x, result in zip(inputs, results, strict=True):
                result.copy_(2 * x.float())

        self.captured.append(again)
        return results


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.mark.parametrize("inputs", [INPUTS, FP8], ids=["16 bits", "fp8"])
def test_the_inputs_are_written_in_the_stream_of_the_call(cuda: Cuda, inputs: list[Tensor]) -> None:
    early: list[Tensor] = []

    def bind(*late: Tensor) -> streams.Call:
        early.extend(x.float() for x in late)  # what a launch in another stream would read
        return lambda: cuda.call(late)

    results = streams.in_another_stream(bind, inputs)
    assert all(x.isnan().all() for x in early) and len(early) == len(inputs)
    assert all(torch.equal(a, 2 * b.float()) for a, b in zip(results, inputs, strict=True))
    order = ["synchronize", "another stream", "wait", "call", "end", "synchronize"]
    assert cuda.asked == order


def test_a_graph_computes_its_results_again(cuda: Cuda) -> None:
    results = streams.in_a_graph(lambda: cuda.call(tuple(INPUTS)))
    assert all(torch.equal(a, 2 * b.float()) for a, b in zip(results, INPUTS, strict=True))
    assert cuda.asked == ["a graph", "call", "end", "synchronize"]
    cuda.captured.clear()
    stale = streams.in_a_graph(lambda: [2 * x.float() for x in INPUTS])
    assert all(x.isnan().all() for x in stale), "what was not captured is not replayed"


@pytest.mark.parametrize("lost", ["", "in_another_stream", "in_a_graph"])
def test_repeats_on_a_gpu_go_elsewhere_too(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    def elsewhere(name: str) -> Callable[..., list[Tensor]]:
        def run(call: Any, *inputs: Any) -> list[Tensor]:
            results = [x.clone() for x in (call(*inputs[0])() if inputs else call())]
            if name == lost:
                streams.spoil(results[1])
            return results

        return run

    monkeypatch.setattr(Place, "is_gpu", True)
    monkeypatch.setattr(Place, "backend", "sim")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("in_another_stream", "in_a_graph"):
        monkeypatch.setattr(streams, name, elsewhere(name))
    [check] = correctness.repeats([bundle.kernels[0]], simulator, times=2, tiny=True)
    outcome = check.outcome()
    words = {"": "", "in_another_stream": "in another stream", "in_a_graph": "as a CUDA graph"}
    assert outcome.ok is (not lost) and words[lost] in outcome.detail
