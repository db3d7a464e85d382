"""The sections of a run, one after the other, in the process that uses the GPU."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from cute_fa.bench import benchmark, gpu_state, providers, shapes
from cute_fa.bench.providers import Ours, Provider
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import CudaTimer, Policy, Timer
from cute_fa.gpu_check import agreement, correctness, tune
from cute_fa.gpu_check.events import (
    Begins,
    ChoiceMade,
    DeviceFound,
    History,
    MatmulTimed,
    OutcomeFound,
    SectionDone,
    ShapeTimed,
)
from cute_fa.gpu_check.outcome import (
    Check,
    Deadline,
    Outcome,
    family_name,
    family_of,
    first_lines,
)
from cute_fa.gpu_check.place import Place, serving
from cute_fa.ops.bundle import LoadedBundle

T = TypeVar("T")

# Shares of the time; what a section does not need goes to those behind it.
SHARES = (("agreement", 0.10), ("correctness", 0.35), ("repeats", 0.10), ("benchmark", 0.45))
TUNING = "tuning"
BENCH_POLICY = Policy(warmup=2, rounds=12, seconds=0.5)

# Seconds after which something hangs. Other libraries may compile at their first call.
PATIENCE = 30.0
FOREIGN_PATIENCE = 90.0


class DeviceLostError(Exception):
    """The device refuses everything that this process asks for."""


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        tiny: small problems and few repeats, for the simulator.
        tuning: whether candidates compete.
        checking: whether anything else is done.
        shapes: what is timed; None for the papers' shapes, in order of interest.
        tuning_shapes: what candidates are timed on; None for the papers' shapes of their variant.
        timer: makes what times calls.
    """

    tiny: bool = False
    tuning: bool = False
    checking: bool = True
    shapes: tuple[Shape, ...] | None = None
    competitors: tuple[Provider, ...] = providers.COMPETITORS
    tuning_shapes: tuple[Shape, ...] | None = None
    timer: Callable[[], Timer] = CudaTimer


class Run:
    """One process's part of a run.

    Args:
        history: what is not to be done again.
        tell: takes the events of ``cute_fa.gpu_check.events``.
    """

    def __init__(
        self,
        bundle: LoadedBundle,
        place: Place,
        settings: Settings,
        history: History,
        tell: Callable[[Any], None],
    ) -> None:
        given_up = {k.name for k in bundle.kernels if family_of(k) in history.given_up}
        bundle.leave_out({*history.broken, *given_up})
        self._bundle = bundle
        self._place = place
        self._settings = settings
        self._history = history
        self._tell = tell
        self._timer = settings.timer()

    def all(self, seconds: float, tuning_seconds: float) -> None:
        """Every section that is not done.

        Args:
            seconds: for all sections but tuning.

        Raises:
            DeviceLostError: no more can be done in this process.
        """
        self._tell(DeviceFound(device_document(self._place)))
        end = time.monotonic() + seconds
        for number, (name, share) in enumerate(SHARES):
            rest = sum(share for _, share in SHARES[number:])
            self._section(name, share / rest * max(0.0, end - time.monotonic()))
        if self._settings.tuning:
            self._section(TUNING, tuning_seconds)

    def _section(self, name: str, seconds: float) -> None:
        """One section, if it is not done; what goes wrong in it keeps no other from being made."""
        if name in self._history.sections:
            return
        started, deadline = time.monotonic(), Deadline(seconds)
        sections: dict[str, Callable[[Deadline], None]] = {
            "agreement": self._agreement,
            "correctness": self._correctness,
            "repeats": self._repeats,
            "benchmark": self._benchmark,
            TUNING: self._tuning,
        }
        try:
            sections[name](deadline)
        except DeviceLostError:
            raise
        except Exception:
            reason = traceback.format_exc()
            self._require_device(reason)
            self._tell(OutcomeFound(Outcome(name, "as a whole", False, reason)))
        self._tell(SectionDone(name, deadline.left_out, time.monotonic() - started))

    def _agreement(self, deadline: Deadline) -> None:
        self._make(agreement.checks(self._bundle, self._place), deadline)

    def _correctness(self, deadline: Deadline) -> None:
        kernels, tiny = serving(self._bundle, self._place), self._settings.tiny
        self._make(correctness.checks(kernels, self._place, tiny=tiny), deadline)

    def _repeats(self, deadline: Deadline) -> None:
        kernels, tiny = serving(self._bundle, self._place), self._settings.tiny
        times = 3 if tiny else 50
        self._make(correctness.repeats(kernels, self._place, times=times, tiny=tiny), deadline)

    def _make(self, checks: Iterable[Check], deadline: Deadline) -> None:
        new = (each for each in checks if (each.section, each.name) not in self._history.done)
        for check in deadline.while_time(new):
            name, family = check.kernel.name, family_of(check.kernel)
            self._tell(Begins(check.section, check.name, PATIENCE, kernel=name, family=family))
            outcome = check.outcome()
            if outcome.ok is False:
                self._require_device(outcome.detail)
            self._tell(OutcomeFound(outcome))

    def _require_device(self, before: str = "") -> None:
        complaint = self._place.complaint()
        if complaint is not None:
            raise DeviceLostError(before or complaint)

    def _benchmark(self, deadline: Deadline) -> None:
        place, settings = self._place, self._settings
        arch = place.target.arch if place.backend == "sim" else None
        ours = [Ours(name, self._bundle, place.backend, arch) for name in providers.OURS]
        todo = benchmark_shapes() if settings.shapes is None else list(settings.shapes)
        todo = [shape for shape in todo if ("benchmark", shape.name) not in self._history.done]
        for dtype in dict.fromkeys(shape.padded.dtype for shape in todo):
            self._matmul(dtype, deadline)
        for shape in deadline.while_time(todo):
            timed = self._attempt(
                "benchmark",
                shape.name,
                functools.partial(
                    benchmark.run_shape,
                    shape,
                    [*ours, *settings.competitors],
                    self._timer,
                    BENCH_POLICY,
                    device=place.device,
                    state=gpu_state.snapshot if place.is_gpu else dict,
                    about_to_call=functools.partial(self._about_to_call, shape),
                    refused=functools.partial(self._refusal, shape),
                ),
            )
            if timed is not None:
                self._tell(ShapeTimed(shape.name, *timed))

    def _attempt(self, section: str, name: str, make: Callable[[], T]) -> T | None:
        """What ``make`` gives; None if it raises something, which is an outcome then and keeps
        nothing else from being made."""
        try:
            made = make()
        except DeviceLostError:
            raise
        except Exception as error:
            self._require_device()
            reason = f"{type(error).__name__}: {first_lines(error)}"
            self._tell(OutcomeFound(Outcome(section, name, False, reason)))
            return None
        self._require_device()
        return made

    def _matmul(self, dtype: str, deadline: Deadline) -> None:
        name = f"matrix product, {dtype}"
        if not deadline.has_time() or ("benchmark", name) in self._history.done:
            return
        self._tell(Begins("benchmark", name, FOREIGN_PATIENCE))
        place = self._place
        size = benchmark.MATMUL_SIZE if place.is_gpu else 64
        speed = benchmark.matmul_tflops(
            dtype, self._timer, BENCH_POLICY, device=place.device, size=size
        )
        self._require_device()
        if speed is not None:
            self._tell(MatmulTimed(name, dtype, speed))

    def _refusal(self, shape: Shape, provider: Provider) -> str | None:
        return self._history.refused.get((provider.name, shape.problem.variant))

    def _about_to_call(self, shape: Shape, provider: Provider | None) -> None:
        """Said of each provider's first call, and with None before all are timed."""
        self._require_device()  # else what was begun before is to blame
        if provider is None:
            self._tell(Begins("benchmark", shape.name, FOREIGN_PATIENCE))
            return
        patience = PATIENCE if isinstance(provider, Ours) else FOREIGN_PATIENCE
        name = f"{provider.name} on {shape.name}"
        call = provider.name, shape.problem.variant
        family = None
        if isinstance(provider, Ours):
            family = family_name(provider.generation, shape.problem.variant)
        self._tell(Begins("benchmark", name, patience, call=call, family=family))

    def _tuning(self, deadline: Deadline) -> None:
        fields = tune.competitions(self._bundle, self._place)
        new = {
            label: kernels
            for label, kernels in fields.items()
            if (TUNING, label) not in self._history.done
        }
        for label, kernels in deadline.while_time(new.items()):

            def about_to_call(kernel: str | None, label: str = label) -> None:
                self._require_device()
                patience = FOREIGN_PATIENCE if kernel is None else PATIENCE
                self._tell(Begins(TUNING, label, patience, kernel=kernel))

            problems = self._settings.tuning_shapes or tune.tuning_shapes(kernels[0].variant)
            trials = self._attempt(
                TUNING,
                label,
                functools.partial(
                    tune.try_out,
                    kernels,
                    problems,
                    self._place,
                    self._timer,
                    about_to_call=about_to_call,
                    has_time=deadline.has_time,
                ),
            )
            if trials is not None:
                self._tell(ChoiceMade(tune.choose(label, trials)))


def device_document(place: Place) -> dict[str, Any]:
    """What runs the kernels."""
    if not place.is_gpu:
        return {"arch": place.target.arch, "name": f"simulated {place.target.arch}"}
    return {"arch": place.target.arch, **gpu_state.device_document()}


def benchmark_shapes() -> list[Shape]:
    """The benchmark's shapes, what is looked at first in front: a run may be out of time."""
    papers = shapes.paper_shapes()
    order = {"bfloat16": 0, "float8_e4m3fn": 1, "float16": 2}
    papers.sort(key=lambda s: (s.padded.head_dim != 128, order[s.padded.dtype]))
    first = [shape for shape in papers if shape.padded.head_dim == 128]
    others = papers[len(first) :]
    packed = [*shapes.varlen_shapes(), *shapes.varlen_shapes("float8_e4m3fn")]
    return [*first, *shapes.gqa_shapes(), *packed, *others]
