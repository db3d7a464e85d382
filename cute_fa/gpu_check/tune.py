"""Which candidate configuration of a kernel is the fastest here; ``tuned.json`` of a bundle.

Candidates of one variant are checked and then timed in turn on the benchmark's shapes. Whoever is
``FAR_BEHIND`` after a shape is dropped, so that many may compete. The winner is the one with the
smallest geometric mean of its medians; the default keeps its place unless another one beats it by
more than ``MARGIN``.

A winner serves problems of its own variant only, grouped heads among them unless they are packed.
Packed sequences compete on shapes of their own: how tiles fall on SMs decides there as much as the
tiles themselves. Everything else, as float16, windows or packed heads, is served by what the rung's
tile table says, into which the winners have to be written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cute_fa.bench import shapes
from cute_fa.bench.inputs import BenchInputs, make
from cute_fa.bench.providers import Ours, first_call, in_words
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Action, Policy, Timer, Timing, measure
from cute_fa.bench.verify import verify
from cute_fa.build.bundle import Bundle, BundleKernel, specificity
from cute_fa.build.registry import GENERATIONS
from cute_fa.gpu_check.place import OneKernel, Place, runnable
from cute_fa.problem import DTYPE_BYTES, KernelVariant

MARGIN = 0.01
FAR_BEHIND = 0.12
"""How much longer than the fastest a candidate may take; a kernel that is best for short sequences
only is rarely as far behind on long ones."""

SEQLENS = (4096, 16384, 1024, 8192, 2048, 512)
"""The first two tell most: neither the start of a launch nor one row tile more or less counts."""

TUNE_POLICY = Policy(warmup=2, rounds=30, seconds=1.5)


@dataclass(frozen=True)
class Trial:
    """A candidate on all shapes.

    Attributes:
        kernel: its name in the bundle.
        config: its configuration's numbers.
        medians: seconds by shape.
        refused: why it was not timed, empty if it was.
        dropped: how far behind it was when it was dropped, empty if it was not.
    """

    kernel: str
    role: str
    config: Mapping[str, Any]
    medians: Mapping[str, float]
    refused: str = ""
    dropped: str = ""

    @property
    def score(self) -> float:
        """Geometric mean of the medians; infinite if it was not timed on every shape."""
        if self.refused or self.dropped or not self.medians:
            return math.inf
        return _geometric_mean(self.medians.values())


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

    @property
    def changes(self) -> dict[str, Any]:
        """Fields of the winner's configuration that are not as the default has them."""
        configs = {trial.kernel: trial.config for trial in self.trials}
        own = next((trial.config for trial in self.trials if trial.role == "default"), {})
        won = configs.get(self.kernel, {})
        return {name: value for name, value in won.items() if own.get(name) != value}


def competitions(bundle: Bundle, place: Place) -> dict[str, list[BundleKernel]]:
    """Kernels by label, where there is more than one, and shapes to time them on; the default
    first. What matters most comes first, as time may be short; code for older architectures, which
    is not launched beside the GPU's own, is left out."""
    kernels = runnable(bundle, place)
    own: dict[tuple[str, KernelVariant], tuple[Any, ...]] = {}
    for kernel in kernels:
        key = kernel.generation, kernel.variant
        own[key] = max(own.get(key, ()), specificity(kernel.target))
    found: dict[str, list[BundleKernel]] = {}
    for kernel in sorted(kernels, key=_interest):
        if specificity(kernel.target) == own[kernel.generation, kernel.variant]:
            found.setdefault(kernel.label, []).append(kernel)
    return {
        label: kernels
        for label, kernels in found.items()
        if len(kernels) > 1 and tuning_shapes(kernels[0].variant)
    }


def _interest(kernel: BundleKernel) -> tuple[Any, ...]:
    """Sorts kernels by variant: newer rungs, dense before packed, the papers' usual head dim,
    inputs of 16 bits; then the default before candidates."""
    v = kernel.variant
    return (
        -GENERATIONS.index(kernel.generation),
        v.is_varlen,
        v.head_dim != 128,
        -DTYPE_BYTES[v.dtype],
        v.head_dim,
        kernel.label,
        kernel.role != "default",
    )


def tuning_shapes(variant: KernelVariant) -> list[Shape]:
    """The benchmark's shapes that the variant serves, those that tell most in front."""
    v = variant
    if v.is_varlen:
        found = shapes.varlen_shapes(v.dtype)
    elif v.head_dim in shapes.HEAD_DIMS:
        found = shapes.paper_shapes([v.dtype], [v.head_dim], SEQLENS, [v.causal])
    else:
        found = []
    return [shape for shape in found if shape.problem.variant == v]


def try_out(
    kernels: Sequence[BundleKernel],
    problems: Iterable[Shape],
    place: Place,
    timer: Timer,
    policy: Policy = TUNE_POLICY,
    *,
    about_to_call: Callable[[str | None], None] = lambda kernel: None,
    has_time: Callable[[], bool] = lambda: True,
) -> list[Trial]:
    """Check and time kernels that serve the same problems, in turn on each shape.

    Args:
        about_to_call: is told whose first call on a shape comes next; None when all are timed.
        has_time: whether one more shape may be begun; the first one is in any case.
    """
    arch = place.target.arch if place.backend == "sim" else None
    providers = {
        kernel.name: Ours(kernel.generation, OneKernel(kernel), place.backend, arch)
        for kernel in kernels
    }
    medians: dict[str, dict[str, float]] = {kernel.name: {} for kernel in kernels}
    refused: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for number, shape in enumerate(problems):
        if number and not has_time():
            break
        inputs = make(shape, place.device)
        actions: dict[str, Action] = {}
        for name, provider in providers.items():
            if name in refused or name in dropped:
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
        scores = {name: _geometric_mean(medians[name].values()) for name in timings}
        defaults = {kernel.name for kernel in kernels if kernel.role == "default"}
        dropped |= far_behind(scores, keep=defaults)
    return [
        Trial(
            kernel.name,
            kernel.role,
            _numbers(kernel.config),
            medians[kernel.name],
            refused.get(kernel.name, ""),
            dropped.get(kernel.name, ""),
        )
        for kernel in kernels
    ]


def far_behind(scores: Mapping[str, float], keep: Collection[str]) -> dict[str, str]:
    """Who needs not be timed any further, and why.

    Args:
        scores: seconds by name.
        keep: names that stay, as the default, which the winner is compared with.
    """
    best = min(scores.values(), default=math.inf)
    return {
        name: f"{score / best - 1:.0%} behind the best"
        for name, score in scores.items()
        if name not in keep and score > best * (1 + FAR_BEHIND)
    }


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


def table(
    choices: Sequence[Choice], device: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
) -> str:
    """What ``tuned.json`` of a bundle holds: the choices of which something was timed.

    Args:
        earlier: the table that is to be replaced. Its other choices are kept if it is of such a
            device, too: a run may be cut off, or have little time.
    """
    entries = [asdict(choice) for choice in choices if any(t.medians for t in choice.trials)]
    if earlier is not None and earlier["device"].get("name") == device.get("name"):
        new = {entry["label"] for entry in entries}
        entries += [entry for entry in earlier["choices"] if entry["label"] not in new]
    return json.dumps({"device": dict(device), "choices": entries}, indent=1)


def _geometric_mean(values: Collection[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _numbers(config: Any) -> dict[str, Any]:
    return {
        name: value for name, value in vars(config).items() if type(value) in (int, bool, float)
    }
