"""Does a call run where torch wants it: in the current stream, and as part of a CUDA graph?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Sequence[Tensor]]

WAIT_CYCLES = 4_000_000
"""2 ms or so, in which a call that went to another stream has long read its inputs."""


def in_another_stream(bind: Callable[..., Call], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a call gives in a stream of its own, in which its inputs are written just before it.

    Args:
        bind: makes the call, of tensors in the places of ``inputs``. What it launches in another
            stream reads NaN.
    """
    late = [torch.empty_like(x) for x in inputs]
    for x in late:
        spoil(x)
    call, stream = bind(*late), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT_CYCLES)
        for x, source in zip(late, inputs, strict=True):
            x.copy_(source)
        results = tuple(call())
    torch.cuda.synchronize()
    return results


def in_a_graph(call: Call) -> tuple[Tensor, ...]:
    """What a CUDA graph of a call gives when it is replayed over spoilt results.

    Args:
        call: has run before: kernels are not loaded while a graph is captured.
    """
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tuple(call())
    for x in results:
        spoil(x)
    graph.replay()
    torch.cuda.synchronize()
    return tuple(x.clone() for x in results)  # the graph's own memory goes with it


def spoil(x: Tensor) -> None:
    """Set all bits, which is NaN in every format of floating point that there is here."""
    x.view(torch.uint8).fill_(0xFF)
