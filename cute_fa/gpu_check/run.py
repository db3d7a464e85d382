"""All checks of a bundle on the GPU at hand, in a few minutes, as one JSON document."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cute_fa.build.bundle import TUNED
from cute_fa.errors import CuteFAError, MissingToolError, UnsupportedError
from cute_fa.gpu_check.events import History
from cute_fa.gpu_check.place import Place
from cute_fa.gpu_check.report import Report, report_on, write_in_one_step
from cute_fa.gpu_check.sections import SHARES, Settings
from cute_fa.gpu_check.tune import competitions, table
from cute_fa.gpu_check.watch import Job, Watch
from cute_fa.ops.bundle import LoadedBundle, load_bundle

PASSED, FAILED, USAGE, NO_GPU = 0, 1, 2, 3
DEFAULT_MINUTES = 7.5
WRITE_EVERY = 5.0
"""Seconds between two versions of the output, which is whole at any time."""


class Output:
    """The report's file, kept up to date."""

    def __init__(self, report: Report, path: Path | None) -> None:
        self._report = report
        self._path = path
        self._due = 0.0

    def changed(self) -> None:
        """Write it, unless that was done just now.

        Raises:
            OSError: it cannot be written.
        """
        now = time.monotonic()
        if self._path is not None and now >= self._due:
            self._report.write(self._path)
            self._due = now + WRITE_EVERY


def run(
    bundle: LoadedBundle,
    place: Place,
    settings: Settings,
    *,
    minutes: float = DEFAULT_MINUTES,
    output: Path | None = None,
    watch: type[Watch] = Watch,
) -> Report:
    """Check, time and, if asked for, tune; the report is whole whatever becomes of it.

    Args:
        minutes: to use; as many again for tuning.
        output: the JSON document, kept up to date from the beginning.

    Raises:
        OSError: the output cannot be written.
    """
    report = report_on(bundle, {"arch": place.target.arch})
    file = Output(report, output)
    file.changed()
    seconds = 60.0 * minutes
    done = frozenset() if settings.checking else frozenset(name for name, _ in SHARES)
    job = Job(bundle.folder, place, settings, History(done), seconds, seconds)
    try:
        watch(job, report, changed=file.changed, say=_say).run()
    except KeyboardInterrupt:
        _say("interrupted")
    if report.choices:
        path = bundle.folder / TUNED
        try:
            earlier = json.loads(path.read_text()) if path.exists() else None
            write_in_one_step(path, table(report.choices, report.device, earlier))
            report.tuned = str(path)
        except OSError as error:
            report.tuned = f"not written: {error}"
    if output is not None:
        report.write(output)
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``tools/gpu_check.py``; the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description="Check and time the kernels of a bundle on the GPU of this machine. Exit "
        "codes: 0 all passed, 1 a check failed, 2 bad usage or a bundle that cannot be used, "
        "3 no GPU.",
    )
    parser.add_argument("bundle", type=Path, help="a directory that cute-fa aot wrote")
    parser.add_argument(
        "-o", "--output", type=Path, help="write the JSON document here, again and again"
    )
    parser.add_argument("--json", action="store_true", help="print it instead of a summary")
    parser.add_argument("--tune", action="store_true", help="let candidates compete, keep winners")
    parser.add_argument("--tune-only", action="store_true", help="the same, and nothing else")
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="time to use, and as much again for --tune (default 7.5)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error(f"argument --minutes: {args.minutes} is no time to use")
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
    place = Place("cuda", target)
    settings = Settings(tuning=args.tune or args.tune_only, checking=not args.tune_only)
    if settings.tuning and not competitions(bundle, place):
        print(f"gpu_check: {_no_candidates(bundle, place)}", file=sys.stderr)
        return USAGE
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        report = run(bundle, place, settings, minutes=args.minutes, output=args.output)
    except OSError as error:
        print(f"gpu_check: the output cannot be written: {error}", file=sys.stderr)
        return USAGE
    return show(report, as_json=args.json)


def _no_candidates(bundle: LoadedBundle, place: Place) -> UnsupportedError:
    return UnsupportedError(
        "no kernels of this bundle compete with each other on this GPU",
        got=f"{place.target.arch}, and a bundle of {', '.join(bundle.document['presets'])}",
        expected="candidates beside the default kernels",
        fix=f"make one with cute-fa aot --arch {place.target.arch} --preset tune",
    )


def show(report: Report, *, as_json: bool) -> int:
    """Print a report; the exit code."""
    if as_json:
        print(report.as_json())
    else:
        for line in report.text():
            print(line)
    return PASSED if report.ok else FAILED


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
