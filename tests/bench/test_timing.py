"""Rounds, turns and statistics; no test here depends on how long anything takes."""

from __future__ import annotations

import pytest
import torch

from cute_fa.bench.timing import CudaTimer, HostTimer, Policy, Timing, measure, percentile


class Script:
    """A timer that tells prepared figures and remembers who asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def sample(self, action, *, flush: bool) -> float:
        name = action()
        self.calls.append((name, flush))
        return float(len(self.calls))


def actions(names: str) -> dict:
    return {name: (lambda name=name: name) for name in names}


def run(names: str, policy: Policy, seconds_per_look: float = 0.0):
    timer = Script()
    now = [0.0]
    slept: list[float] = []

    def clock() -> float:
        now[0] += seconds_per_look
        return now[0]

    found = measure(actions(names), timer, policy, clock=clock, sleep=slept.append)
    return found, timer.calls, slept


def test_competitors_take_turns() -> None:
    found, calls, slept = run("abc", Policy(warmup=1, rounds=4, seconds=9, rest=0.5))
    names = "".join(name for name, _ in calls)
    assert names == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(flush for _, flush in calls)
    assert slept == [0.5] * 4
    # Warm-up is not measured: a's samples are the calls 4, 9, 11 and 13.
    assert found["a"] == Timing.of([4.0, 9.0, 11.0, 13.0])
    assert {name: timing.count for name, timing in found.items()} == dict.fromkeys("abc", 4)


def test_it_ends_after_its_time_with_whole_rounds() -> None:
    found, _, _ = run("ab", Policy(warmup=0, rounds=100, seconds=2.5, flush=False), 1.0)
    assert {timing.count for timing in found.values()} == {3}


def test_without_flush() -> None:
    _, calls, _ = run("a", Policy(warmup=1, rounds=1, flush=False))
    assert calls == [("a", False), ("a", False)]


def test_nobody_to_time() -> None:
    assert run("", Policy())[0] == {}


def test_statistics() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (timing.median, timing.minimum, timing.count) == (3.5, 1.0, 6)
    assert (timing.p20, timing.p80) == (2.0, 5.0)
    assert percentile([7.0], 0.2) == 7.0
    assert percentile([0.0, 1.0], 0.25) == 0.25


def test_an_action_that_fails_is_not_hidden() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure({"a": fail}, HostTimer())


def test_the_host_clock_times_a_call() -> None:
    done: list[int] = []
    assert HostTimer().sample(lambda: done.append(1), flush=True) >= 0.0
    assert done == [1]


def test_who_fails_is_left_out_of_the_turns() -> None:
    calls = {"a": 0, "b": 0, "c": 0}

    def action(name: str, fails_at: int = 0):
        def call() -> str:
            calls[name] += 1
            if calls[name] == fails_at:
                raise ZeroDivisionError(name)
            return name

        return call

    told: dict[str, Exception] = {}
    found = measure(
        {"a": action("a"), "b": action("b", fails_at=3), "c": action("c", fails_at=1)},
        Script(),
        Policy(warmup=1, rounds=4, rest=0.0),
        failed=told.__setitem__,
    )
    assert {name: timing.count for name, timing in found.items()} == {"a": 4}
    assert {name: str(error) for name, error in told.items()} == {"b": "b", "c": "c"}
    assert calls == {"a": 5, "b": 3, "c": 1}


def test_a_gpu_is_busy_when_its_call_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait, flush, start, call, stop: in this order on the stream, and the host waits at the end
    only."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "start" if not hasattr(Event, "first") else "stop"
            Event.first = True

        def record(self) -> None:
            done.append(self.name)

        def synchronize(self) -> None:
            done.append(f"wait for {self.name}")

        def elapsed_time(self, other: Event) -> float:
            assert (self.name, other.name) == ("start", "stop")
            return 2.5

    class Scratch:
        def zero_(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("lead"))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: Scratch())
    timer = CudaTimer()
    assert timer.sample(lambda: done.append("call"), flush=True) == 2.5e-3
    assert done == ["lead", "flush", "start", "call", "stop", "wait for stop"]
    done.clear()
    timer.sample(lambda: done.append("call"), flush=False)
    assert "flush" not in done
