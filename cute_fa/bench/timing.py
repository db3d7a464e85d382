"""Timing on a GPU: CUDA events, a cold L2, competitors in turn, medians with their spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Action = Callable[[], Any]
FLUSH_BYTES = 256 * 1024**2
"""More than any L2 cache holds."""

LEAD_CYCLES = 400_000
"""How long the GPU idles before it flushes its L2 cache, in its own clock cycles: 0.2 ms or so, in
which the host gets ahead even by way of slow Python code."""


@dataclass(frozen=True)
class Policy:
    """How often and how long.

    Attributes:
        warmup: unmeasured calls of each competitor.
        rounds: measured calls of each, at most; the competitors take turns within a round.
        seconds: no new round is begun after this long.
        rest: seconds of sleep after each round, so that the clocks do not sink.
        flush: whether the L2 cache is overwritten before each call (always, in what is published).
    """

    warmup: int = 3
    rounds: int = 30
    seconds: float = 2.0
    rest: float = 0.002
    flush: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20th and 80th percentile, minimum, and how many were measured."""

    median: float
    p20: float
    p80: float
    minimum: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        return cls(
            statistics.median(ordered),
            percentile(ordered, 0.2),
            percentile(ordered, 0.8),
            ordered[0],
            len(ordered),
        )


class Timer(Protocol):
    """Measures one call."""

    def sample(self, action: Action, *, flush: bool) -> float:
        """Seconds of one call."""


class CudaTimer:
    """Times calls on the current stream with CUDA events; the host is not part of it.

    A kernel that only waits, and the flush, keep the GPU busy while the host enqueues the call, so
    that the cost of a launch is hidden as in a running program.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def sample(self, action: Action, *, flush: bool) -> float:
        torch.cuda._sleep(LEAD_CYCLES)
        if flush:
            self._scratch.zero_()
        self._start.record()
        action()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3


class HostTimer:
    """Times calls with the host's clock: for what runs on the host."""

    def sample(self, action: Action, *, flush: bool) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started


def measure(
    actions: Mapping[str, Action],
    timer: Timer,
    policy: Policy | None = None,
    *,
    failed: Callable[[str, Exception], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time every action, one call of each per round, beginning with another one each time.

    Args:
        failed: is told of an action that raises, which is then left out; the others go on.

    Raises:
        whatever an action raises, if ``failed`` is None.
    """
    policy = policy or Policy()
    samples: dict[str, list[float]] = {name: [] for name in actions}

    def sample(name: str) -> float | None:
        try:
            return timer.sample(actions[name], flush=policy.flush)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            del samples[name]
            return None

    for name in actions:
        for _ in range(policy.warmup):
            if sample(name) is None:
                break
    started = clock()
    for turn in range(policy.rounds if samples else 0):
        names = list(samples)
        shift = turn % max(1, len(names))
        for name in (*names[shift:], *names[:shift]):
            seconds = sample(name)
            if seconds is not None:
                samples[name].append(seconds)
        if clock() - started >= policy.seconds:
            break
        sleep(policy.rest)
    return {name: Timing.of(found) for name, found in samples.items() if found}


def percentile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of the sorted samples lie, between neighbours linearly."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
