"""What a run of gpu_check found, told piece by piece; a JSON document, or lines to read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cute_fa.bench.benchmark import Results, Row
from cute_fa.bench.report import finite, summary
from cute_fa.gpu_check.events import (
    ChoiceMade,
    DeviceFound,
    MatmulTimed,
    OutcomeFound,
    SectionDone,
    ShapeTimed,
)
from cute_fa.gpu_check.outcome import Outcome
from cute_fa.gpu_check.tune import Choice, Trial
from cute_fa.ops.bundle import LoadedBundle


@dataclass
class Report:
    """What a run found so far; ``as_dict`` is the JSON document.

    Attributes:
        left_out: by section, how many items there was no time for.
        tuned: where the table of tuned kernels is, or why it could not be written.
        is_complete: False until everything was done that there was time for.
    """

    bundle: dict[str, Any]
    device: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    results: Results = field(default_factory=Results)
    choices: list[Choice] = field(default_factory=list)
    tuned: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    is_complete: bool = False

    def take(self, event: object) -> None:
        """Add what an event tells."""
        if isinstance(event, DeviceFound):
            self.device.update(event.document)
            self.results.device.update(self.device)
        elif isinstance(event, OutcomeFound):
            self.outcomes.append(event.outcome)
        elif isinstance(event, MatmulTimed):
            self.results.matmul[event.dtype] = event.tflops
        elif isinstance(event, ShapeTimed):
            self.results.rows.extend(event.rows)
            self.results.states.append(dict(event.state))
        elif isinstance(event, ChoiceMade):
            self.choices.append(event.choice)
        elif isinstance(event, SectionDone):
            self.left_out[event.section] = event.left_out
            self.seconds[event.section] = self.seconds.get(event.section, 0.0) + event.seconds

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ok is False]

    @property
    def ok(self) -> bool:
        """It came to its end, nothing that was checked is wrong, and something was checked."""
        checked = any(outcome.ok for outcome in self.outcomes)
        checked |= any(trial.medians for choice in self.choices for trial in choice.trials)
        wrong = self.failures or self._wrong_rows() or self._refused_trials()
        return self.is_complete and checked and not wrong

    def _wrong_rows(self) -> list[Row]:
        return [row for row in self.results.wrong if row.provider.startswith("cute_fa-")]

    def _refused_trials(self) -> list[tuple[Choice, Trial]]:
        """Kernels that were wrong or failed while they competed."""
        return [(c, trial) for c in self.choices for trial in c.trials if trial.refused]

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "complete": self.is_complete,
            "bundle": self.bundle,
            "device": self.device,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "benchmark": self.results.as_dict() if self.results.rows else None,
            "tuning": [asdict(choice) for choice in self.choices],
            "tuned_table": self.tuned,
        }

    def as_json(self) -> str:
        """The document; numbers that are not finite are spelled, as JSON has none."""
        return json.dumps(finite(self.as_dict()), indent=1, default=str, allow_nan=False)

    def write(self, path: Path) -> None:
        """Write the document in one step: whoever looks finds the last whole one.

        Raises:
            OSError: it cannot be written there.
        """
        write_in_one_step(path, self.as_json() + "\n")

    def text(self) -> Iterator[str]:
        """What a person reads, line by line."""
        yield f"{self.device.get('name', self.device.get('arch'))}: {self.bundle['path']}"
        for section in dict.fromkeys((*(each.section for each in self.outcomes), *self.left_out)):
            yield self._section_line(section)
        for outcome in self.failures:
            yield f"FAILED {outcome.section}: {outcome.name}\n  {outcome.detail}"
        for row in self._wrong_rows():
            yield f"FAILED benchmark: {row.provider} on {row.shape}: {row.reason}"
        for choice, trial in self._refused_trials():
            yield f"FAILED tuning: {trial.kernel} of {choice.label}\n  {trial.refused}"
        if self.results.rows:
            header, rows = summary(self.results)
            yield "  ".join(header)
            for cells in rows:
                yield "  ".join(str(cell) for cell in cells)
        for choice in self.choices:
            yield f"tuned {choice.label}: {choice.kernel}, {choice.speedup:.3f} × the default"
            changes = ", ".join(f"{name}={value}" for name, value in choice.changes.items())
            yield f"  {changes or 'the default'}; {len(choice.trials)} were tried"
        if self.tuned is not None:
            yield f"table of tuned kernels: {self.tuned}"
        if not self.is_complete:
            yield "it did not come to its end"
        yield "PASSED" if self.ok else "FAILED"

    def _section_line(self, section: str) -> str:
        found = [outcome for outcome in self.outcomes if outcome.section == section]
        passed = sum(outcome.ok is True for outcome in found)
        failed = sum(outcome.ok is False for outcome in found)
        line = f"{section}: {passed} passed, {failed} FAILED, "
        line += f"{len(found) - passed - failed} could not be checked"
        if section in ("benchmark", "tuning") and not found:
            done = len(self.results.states) if section == "benchmark" else len(self.choices)
            line = f"{section}: {done} done"
        if self.left_out.get(section):
            line += f", {self.left_out[section]} not reached in time"
        return line


def report_on(bundle: LoadedBundle, device: Mapping[str, Any]) -> Report:
    """An empty report."""
    document = bundle.document
    about = {
        "path": str(bundle.folder),
        "digest": document["digest"],
        "toolchain": document["toolchain"],
        "presets": document["presets"],
        "archs": list(bundle.archs),
        "notes": bundle.notes(),
    }
    return Report(about, dict(device))


def write_in_one_step(path: Path, text: str) -> None:
    """Write a file so that whoever looks sees the old one or the new one.

    Raises:
        OSError: it cannot be written there.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
