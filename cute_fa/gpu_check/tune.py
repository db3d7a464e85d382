"""Which candidate configuration of a kernel is the fastest here; ``tuned.json`` of a bundle.

Candidates of one variant are checked and then timed in turn on the benchmark's shapes. The winner
is the one with the smallest geometric mean of its medians; the default keeps its place unless
another one beats it by more than ``MARGIN``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cute_fa.bench import shapes
from cute_fa.bench.inputs import make
from cute_fa.bench.providers import Ours, first_call
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Action, Policy, Timer, Timing, measure
from cute_fa.bench.verify import verify
from cute_fa.build.bundle import TUNED, Bundle, BundleKernel
from cute_fa.gpu_check.outcome import Deadline
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


def tune(
    bundle: Bundle,
    place: Place,
    timer: Timer,
    deadline: Deadline,
    *,
    policy: Policy = TUNE_POLICY,
    shapes_of: Callable[[KernelVariant], Sequence[Shape]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Let the candidates of every variant compete."""
    fields = competitions(bundle, place)
    choices = []
    for label, kernels in deadline.while_time(fields.items()):
        if progress is not None:
            progress(f"{label}: {len(kernels)} candidates")
        problems = (shapes_of or tuning_shapes)(kernels[0].variant)
        choices.append(choose(label, try_out(kernels, problems, place, timer, policy)))
    return choices


def competitions(bundle: Bundle, place: Place) -> dict[str, list[BundleKernel]]:
    """Kernels by label, where there is more than one; dense ones, the default first."""
    found: dict[str, list[BundleKernel]] = {}
    for kernel in runnable(bundle, place, role=None):
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
    policy: Policy,
) -> list[Trial]:
    """Check and time kernels that serve the same problems, in turn on each shape."""
    providers = {
        kernel.name: Ours(
            kernel.generation,
            OneKernel(kernel),
            place.backend,
            kernel.arch if place.backend == "sim" else None,
        )
        for kernel in kernels
    }
    medians: dict[str, dict[str, float]] = {kernel.name: {} for kernel in kernels}
    refused: dict[str, str] = {}
    for shape in problems:
        inputs = make(shape, place.device)
        actions: dict[str, Action] = {}
        for name, provider in providers.items():
            tried = first_call(provider, shape, inputs)
            if isinstance(tried, str):
                refused.setdefault(name, tried)
                continue
            call, out = tried
            verdict = verify(out, inputs, shape)
            if verdict.ok:
                actions[name] = call
            else:
                refused.setdefault(name, f"wrong on {shape.name}: {verdict.why}")
        timings: dict[str, Timing] = measure(actions, timer, policy)
        for name, timing in timings.items():
            medians[name][shape.name] = timing.median
    return [
        Trial(k.name, k.role, _numbers(k.config), medians[k.name], refused.get(k.name, ""))
        for k in kernels
    ]


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


def write_table(bundle: Bundle, choices: Sequence[Choice], device: Mapping[str, Any]) -> Path:
    """Write the winners where ``load_bundle`` finds them, in one step."""
    document = {"device": dict(device), "choices": [asdict(choice) for choice in choices]}
    handle, scratch = tempfile.mkstemp(dir=bundle.folder, prefix=f".{TUNED}-")
    with os.fdopen(handle, "w") as file:
        json.dump(document, file, indent=1)
    path = bundle.folder / TUNED
    os.replace(scratch, path)
    return path


def _numbers(config: Any) -> dict[str, Any]:
    return {
        name: value for name, value in vars(config).items() if type(value) in (int, bool, float)
    }
