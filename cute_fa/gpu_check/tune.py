"""Which candidate configuration of a kernel is the fastest here; ``tuned.json`` of a bundle.

Candidates of one variant are checked and then timed in turn on the benchmark's shapes. The winner
is the one with the smallest geometric mean of its medians; the default keeps its place unless
another one beats it by more than ``MARGIN``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cute_fa.bench import shapes
from cute_fa.bench.inputs import BenchInputs, make
from cute_fa.bench.providers import Ours, first_call, in_words
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Action, Policy, Timer, Timing, measure
from cute_fa.bench.verify import verify
from cute_fa.build.bundle import Bundle, BundleKernel
from cute_fa.gpu_check.place import OneKernel, Place, runnable
from cute_fa.problem import KernelVariant

MARGIN = 0.01
SEQLENS = (1024, 4096, 16384)
TUNE_POLICY = Policy(warmup=2, rounds=12, seconds=1.5)


@dataclass(frozen=True)
class Trial:
    """A candidate on all shapes.

    Attributes:
        kernel: its name in the bundle.
        config: its configuration's numbers.
        medians: seconds by shape.
        refused: why it was not timed, empty if it was.
    """

    kernel: str
    role: str
    config: Mapping[str, Any]
    medians: Mapping[str, float]
    refused: str = ""

    @property
    def score(self) -> float:
        """Geometric mean of the medians; infinite if it was not timed on every shape."""
        if self.refused or not self.medians:
            return math.inf
        return math.exp(sum(map(math.log, self.medians.values())) / len(self.medians))


@dataclass(frozen=True)
class Choice:
    """The winner of a variant.

    Attributes:
        label: of the kernels that competed; they differ in their configuration only.
        kernel: name of the winner.
        speedup: over the default; 1.0 if that won.
    """

    label: str
    kernel: str
    speedup: float
    trials: tuple[Trial, ...]


def competitions(bundle: Bundle, place: Place) -> dict[str, list[BundleKernel]]:
    """Kernels by label, where there is more than one; dense ones, the default first."""
    found: dict[str, list[BundleKernel]] = {}
    for kernel in runnable(bundle, place):
        if not kernel.variant.is_varlen:
            found.setdefault(kernel.label, []).append(kernel)
    return {
        label: sorted(kernels, key=lambda kernel: kernel.role != "default")
        for label, kernels in found.items()
        if len(kernels) > 1
    }


def tuning_shapes(variant: KernelVariant) -> list[Shape]:
    """The papers' shapes that the variant serves."""
    v = variant
    return shapes.paper_shapes([v.dtype], [v.head_dim], SEQLENS, [v.causal])


def try_out(
    kernels: Sequence[BundleKernel],
    problems: Iterable[Shape],
    place: Place,
    timer: Timer,
    policy: Policy = TUNE_POLICY,
    *,
    about_to_call: Callable[[str | None], None] = lambda kernel: None,
) -> list[Trial]:
    """Check and time kernels that serve the same problems, in turn on each shape.

    Args:
        about_to_call: is told whose first call on a shape comes next; None when all are timed.
    """
    arch = place.target.arch if place.backend == "sim" else None
    providers = {
        kernel.name: Ours(kernel.generation, OneKernel(kernel), place.backend, arch)
        for kernel in kernels
    }
    medians: dict[str, dict[str, float]] = {kernel.name: {} for kernel in kernels}
    refused: dict[str, str] = {}
    for shape in problems:
        inputs = make(shape, place.device)
        actions: dict[str, Action] = {}
        for name, provider in providers.items():
            if name in refused:
                continue
            about_to_call(name)
            tried = _first_call(provider, shape, inputs)
            if isinstance(tried, str):
                refused[name] = tried
            else:
                actions[name] = tried
        about_to_call(None)
        timings: dict[str, Timing] = measure(
            actions,
            timer,
            policy,
            failed=lambda name, error: refused.update({name: in_words(error)}),
        )
        for name, timing in timings.items():
            medians[name][shape.name] = timing.median
    return [
        Trial(k.name, k.role, _numbers(k.config), medians[k.name], refused.get(k.name, ""))
        for k in kernels
    ]


def _first_call(provider: Ours, shape: Shape, inputs: BenchInputs) -> Action | str:
    """What is to be timed, or why not."""
    try:
        tried = first_call(provider, shape, inputs)
        if isinstance(tried, str):
            return tried
        call, out = tried
        verdict = verify(out, inputs, shape)
    except Exception as error:
        return in_words(error)
    return call if verdict.ok else f"wrong on {shape.name}: {verdict.why}"


def choose(label: str, trials: Sequence[Trial]) -> Choice:
    """The winner; the default, if nobody is clearly faster."""
    default = min(
        (trial for trial in trials if trial.role == "default"),
        key=lambda trial: trial.score,
        default=min(trials, key=lambda trial: trial.score),
    )
    best = min(trials, key=lambda trial: trial.score)
    if best.score >= default.score * (1 - MARGIN):
        best = default
    usable = math.isfinite(best.score) and math.isfinite(default.score)
    return Choice(label, best.kernel, default.score / best.score if usable else 1.0, tuple(trials))


def table(choices: Sequence[Choice], device: Mapping[str, Any]) -> str:
    """What ``tuned.json`` of a bundle holds."""
    document = {"device": dict(device), "choices": [asdict(choice) for choice in choices]}
    return json.dumps(document, indent=1)


def _numbers(config: Any) -> dict[str, Any]:
    return {
        name: value for name, value in vars(config).items() if type(value) in (int, bool, float)
    }
