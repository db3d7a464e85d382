"""All checks of a bundle on the GPU at hand, in a few minutes, as one JSON document."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cute_fa.bench import benchmark, gpu_state, providers, shapes
from cute_fa.bench.benchmark import Results
from cute_fa.bench.report import summary
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import CudaTimer, Policy, Timer
from cute_fa.errors import CuteFAError, MissingToolError
from cute_fa.gpu_check import agreement, correctness, tune
from cute_fa.gpu_check.outcome import Deadline, Outcome
from cute_fa.gpu_check.place import Place, runnable
from cute_fa.ops.bundle import LoadedBundle, load_bundle

PASSED, FAILED, USAGE, NO_GPU = 0, 1, 2, 3
DEFAULT_MINUTES = 7.5
# Shares of the time; what a section does not need goes to those behind it.
_SHARES = (("agreement", 0.10), ("correctness", 0.35), ("repeats", 0.10), ("benchmark", 0.45))
BENCH_POLICY = Policy(warmup=2, rounds=12, seconds=0.5)


@dataclass
class Report:
    """What a run found; ``as_dict`` is the JSON document."""

    bundle: dict[str, Any]
    device: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    results: Results | None = None
    choices: list[tune.Choice] = field(default_factory=list)
    tuned: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ok is False]

    @property
    def ok(self) -> bool:
        """Nothing that was checked is wrong, and something was checked."""
        checked = any(outcome.ok for outcome in self.outcomes)
        return checked and not self.failures and not self._wrong_rows()

    def _wrong_rows(self) -> list[benchmark.Row]:
        rows = self.results.wrong if self.results is not None else []
        return [row for row in rows if row.provider.startswith("cute_fa-")]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "bundle": self.bundle,
            "device": self.device,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "benchmark": None if self.results is None else self.results.as_dict(),
            "tuning": [asdict(choice) for choice in self.choices],
            "tuned_table": self.tuned,
        }

    def text(self) -> Iterator[str]:
        """What a person reads, line by line."""
        yield f"{self.device.get('name', self.device.get('arch'))}: {self.bundle['path']}"
        for section in dict.fromkeys(outcome.section for outcome in self.outcomes):
            found = [outcome for outcome in self.outcomes if outcome.section == section]
            passed = sum(outcome.ok is True for outcome in found)
            failed = sum(outcome.ok is False for outcome in found)
            line = f"{section}: {passed} passed, {failed} FAILED, "
            line += f"{len(found) - passed - failed} could not be checked"
            if self.left_out.get(section):
                line += f", {self.left_out[section]} not reached in time"
            yield line
        for outcome in self.failures:
            yield f"FAILED {outcome.section}: {outcome.name}\n  {outcome.detail}"
        for row in self._wrong_rows():
            yield f"FAILED benchmark: {row.provider} on {row.shape}: {row.reason}"
        if self.results is not None:
            header, rows = summary(self.results)
            yield "  ".join(header)
            for cells in rows:
                yield "  ".join(str(cell) for cell in cells)
        for choice in self.choices:
            yield f"tuned {choice.label}: {choice.kernel}, {choice.speedup:.3f} × the default"
        yield "PASSED" if self.ok else "FAILED"


def run(
    bundle: LoadedBundle,
    place: Place,
    timer: Timer,
    *,
    minutes: float = DEFAULT_MINUTES,
    tuning: bool = False,
    tiny: bool = False,
    bench_shapes: Sequence[Shape] | None = None,
    competitors: Sequence[providers.Provider] = providers.COMPETITORS,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check, time and, if asked for, tune.

    Args:
        tiny: small problems and few repeats, for the simulator.
        bench_shapes: what is timed; None for the papers' shapes, in order of interest.
    """
    document = bundle.document
    report = Report(
        bundle={
            "path": str(bundle.folder),
            "digest": document["digest"],
            "toolchain": document["toolchain"],
            "presets": document["presets"],
            "archs": list(bundle.archs),
        },
        device={"arch": place.target.arch, **_device(place)},
    )
    kernels = runnable(bundle, place)
    repeats = 3 if tiny else 50
    sections: dict[str, Callable[[Deadline], None]] = {
        "agreement": lambda deadline: report.outcomes.extend(
            agreement.compare(bundle, place, deadline)
        ),
        "correctness": lambda deadline: report.outcomes.extend(
            [
                *correctness.check_kernels(kernels, place, deadline, tiny=tiny),
                *correctness.uncheckable(kernels),
            ]
        ),
        "repeats": lambda deadline: report.outcomes.extend(
            correctness.check_repeats(kernels, place, deadline, times=repeats, tiny=tiny)
        ),
        "benchmark": lambda deadline: _benchmark(
            report, bundle, place, timer, deadline, bench_shapes, competitors
        ),
    }
    budget = 60.0 * minutes
    end = time.monotonic() + budget
    for number, (name, _) in enumerate(_SHARES):
        rest = sum(share for _, share in _SHARES[number:])
        share = _SHARES[number][1] / rest
        started = time.monotonic()
        deadline = Deadline(share * max(0.0, end - started))
        say(f"{name} …")
        sections[name](deadline)
        report.left_out[name] = report.left_out.get(name, 0) + deadline.left_out
        report.seconds[name] = time.monotonic() - started
    if tuning:
        started = time.monotonic()
        deadline = Deadline(budget)
        report.choices = tune.tune(bundle, place, timer, deadline, progress=say)
        report.left_out["tuning"] = deadline.left_out
        if report.choices:
            report.tuned = str(tune.write_table(bundle, report.choices, report.device))
        report.seconds["tuning"] = time.monotonic() - started
    return report


def _device(place: Place) -> dict[str, Any]:
    if place.device == "cpu":
        return {"name": f"simulated {place.target.arch}"}
    return gpu_state.device_document()


def _benchmark(
    report: Report,
    bundle: LoadedBundle,
    place: Place,
    timer: Timer,
    deadline: Deadline,
    wanted: Sequence[Shape] | None,
    competitors: Sequence[providers.Provider],
) -> None:
    arch = place.target.arch if place.backend == "sim" else None
    ours = [providers.Ours(name, bundle, place.backend, arch) for name in providers.OURS]
    todo = benchmark_shapes() if wanted is None else list(wanted)
    results = benchmark.run(
        todo,
        [*ours, *competitors],
        timer,
        device=place.device,
        policy=BENCH_POLICY,
        state=gpu_state.snapshot if place.device != "cpu" else dict,
        matmul_size=benchmark.MATMUL_SIZE if place.device != "cpu" else 64,
        more_time=deadline.has_time,
    )
    results.device.update(report.device)
    report.results = results
    report.left_out["benchmark"] = len(todo) - len(results.states)


def benchmark_shapes() -> list[Shape]:
    """The benchmark's shapes, what is looked at first in front: a run may be out of time."""
    papers = shapes.paper_shapes()
    order = {"bfloat16": 0, "float16": 1, "float8_e4m3fn": 2}
    papers.sort(key=lambda s: (order[s.padded.dtype], s.padded.head_dim != 128))
    half = [shape for shape in papers if shape.padded.dtype != "float8_e4m3fn"]
    rest = [shape for shape in papers if shape.padded.dtype == "float8_e4m3fn"]
    return [*half, *shapes.gqa_shapes(), *shapes.varlen_shapes(), *rest]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``tools/gpu_check.py``; the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Check and time the kernels of a bundle on the GPU of this machine. Exit "
        "codes: 0 all passed, 1 a check failed, 2 bad usage or a bundle that cannot be used, "
        "3 no GPU.",
    )
    parser.add_argument("bundle", type=Path, help="a directory that cute-fa aot wrote")
    parser.add_argument("-o", "--output", type=Path, help="write the JSON document here")
    parser.add_argument("--json", action="store_true", help="print it instead of a summary")
    parser.add_argument("--tune", action="store_true", help="let candidates compete, keep winners")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="time to use, tuning left aside"
    )
    args = parser.parse_args(argv)
    try:
        bundle = load_bundle(args.bundle)
    except CuteFAError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return USAGE
    try:
        target = bundle.check_gpu()
    except CuteFAError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return NO_GPU if isinstance(error, MissingToolError) else USAGE
    report = run(
        bundle,
        Place("cuda", target),
        CudaTimer(),
        minutes=args.minutes,
        tuning=args.tune,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return finish(report, args.output, as_json=args.json)


def finish(report: Report, output: Path | None, *, as_json: bool) -> int:
    """Write and print a report; the exit code."""
    document = json.dumps(report.as_dict(), indent=1, default=str)
    if output is not None:
        try:
            output.write_text(document + "\n")
        except OSError as error:
            print(f"gpu_check: the output cannot be written: {error}", file=sys.stderr)
            return USAGE
    if as_json:
        print(document)
    else:
        for line in report.text():
            print(line)
    return PASSED if report.ok else FAILED
