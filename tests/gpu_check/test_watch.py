"""A run that is watched: what hangs or dies is blamed, and the rest is done all the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cute_fa.gpu_check import run, watch
from cute_fa.gpu_check.events import Finished, History, Lost
from cute_fa.gpu_check.place import Place
from cute_fa.gpu_check.report import Report
from cute_fa.gpu_check.sections import Settings
from cute_fa.gpu_check.watch import Job, Watch
from cute_fa.target import get_target
from tests.gpu_check import processes

ROOT = Path(__file__).parents[2]


def watched(
    target, *, seconds: float = 300.0, tuning: float = 0.0, history: History | None = None
) -> tuple[Report, list[str]]:
    place = Place("cpu", get_target("sm_80"))
    settings = Settings(tuning=tuning > 0)
    job = Job(Path("nowhere"), place, settings, history or History(), seconds, tuning)
    report, said = Report({"path": "b"}, {}), []
    rest: list[float] = []
    Watch(job, report, say=said.append, target=target, method="fork", sleep=rest.append).run()
    return report, said


def outcomes(report: Report) -> dict[str, tuple[bool | None, str]]:
    return {each.name: (each.ok, each.detail) for each in report.outcomes}


def test_a_kernel_that_hangs_is_ended() -> None:
    report, said = watched(processes.hangs)
    assert report.is_complete and not report.ok and report.device["name"] == "a GPU"
    reason = "it did not come back within 0 s; nothing more is asked of this kernel"
    assert outcomes(report) == {
        "first": (True, ""),
        "second": (False, reason),
        "third": (True, ""),
    }
    assert report.left_out == {"correctness": 4} and report.seconds == {"correctness": 1.5}
    assert said == ["correctness …"]


def test_processes_that_are_lost() -> None:
    report, _ = watched(processes.dies)
    assert report.is_complete and not report.ok
    found = outcomes(report)
    assert "exit code 9" in found["first"][1] and "illegal memory access" in found["second"][1]
    # The benchmark's own rows tell of calls that failed; nobody else knows of a shape.
    assert "a call" not in found and "exit code 1" in found[processes.SHAPE.name][1]
    assert found["third"] == (True, "")
    assert report.results.states == [{"sm_mhz": 1980}]


def test_what_cannot_start_is_not_tried_again() -> None:
    report, _ = watched(processes.never_starts)
    assert not report.is_complete
    [(name, (ok, detail))] = outcomes(report).items()
    assert (name, ok) == ("as a whole", False) and "exit code 1" in detail


def test_what_began_before_may_begin_again() -> None:
    processes.attempts.value = 0
    report, _ = watched(processes.starts_again_later)
    assert report.is_complete and not report.ok and processes.attempts.value == 3
    found = outcomes(report)
    assert "out of memory" in found["as a whole"][1] and found["second"] == (True, "")
    assert found["first"][0] is False


def test_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_LOSSES", 3)
    report, _ = watched(processes.always_hangs)
    assert not report.is_complete
    assert [each.section for each in report.outcomes] == ["correctness"] * 3 + ["run"]
    assert "3 processes were lost" in report.outcomes[-1].detail


def test_a_family_of_kernels_is_given_up() -> None:
    """It must not take the time of all others."""
    report, _ = watched(processes.loses_a_family)
    assert report.is_complete and not report.ok
    lost = [each.name for each in report.outcomes if each.section == "correctness" and not each.ok]
    assert lost == [f"no. {number}" for number in range(watch.FAMILY_LOSSES)]
    found = outcomes(report)
    assert found["fa3 fp16 dense kernels"][0] is False and found["another"] == (True, "")


def test_time_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 1.0)
    report, _ = watched(processes.runs_out_of_time, seconds=1.0)
    assert not report.is_complete
    assert outcomes(report) == {"first": (None, "time was up before it came back")}


def test_tuning_has_its_own_time() -> None:
    report, said = watched(processes.tunes, seconds=60.0, tuning=1000.0)
    assert report.is_complete and said[-1] == "tuning: fa3 …"
    assert [choice.kernel for choice in report.choices] == ["k8"]
    assert [each.name for each in report.failures] == ["fa3"]
    assert any("1.250 × the default" in line for line in report.text())


def test_tuning_alone_has_its_time_from_the_beginning() -> None:
    report, _ = watched(processes.tunes, seconds=0.0, tuning=1000.0, history=CHECKED)
    assert report.is_complete and [choice.kernel for choice in report.choices] == ["k8"]
    assert report.outcomes == []


CHECKED = History(frozenset({"agreement", "correctness", "repeats", "benchmark"}))


def worked(
    monkeypatch: pytest.MonkeyPatch, all_of_it: Callable[..., None], **changes: Any
) -> list[Any]:
    """What ``watch.work`` tells, with ``all_of_it`` in the place of what a run does."""
    monkeypatch.setattr(watch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(watch, "load_bundle", lambda folder: None)
    monkeypatch.setattr(watch, "Run", lambda *_: SimpleNamespace(all=all_of_it))
    job: dict[str, Any] = {
        "history": History(),
        "seconds": 100.0,
        "tuning_seconds": 50.0,
        **changes,
    }
    place = Place("cpu", get_target("sm_80"))
    told: list[Any] = []
    connection: Any = SimpleNamespace(send=told.append)
    watch.work(connection, Job(Path("nowhere"), place, Settings(tuning=True), **job))
    return told


def test_what_takes_long_to_load_is_loaded_before_anything_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[Any] = []
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)  # whoever asks for it now fails
    [lost] = worked(monkeypatch, lambda *seconds: begun.append(seconds))
    assert isinstance(lost, Lost) and "tvm_ffi" in lost.why and not begun


@pytest.mark.parametrize(
    ("history", "left"),
    [(History(), (60.0, 50.0)), (CHECKED, (100.0, 10.0))],
    ids=["checks", "tuning"],
)
def test_the_time_that_it_takes_to_start_is_part_of_a_run(
    monkeypatch: pytest.MonkeyPatch, history: History, left: tuple[float, float]
) -> None:
    """Who watches counts from there, and ends what goes on for longer."""
    given: list[float] = []

    def all_of_it(*seconds: float) -> None:
        given.extend(seconds)

    since = time.monotonic() - 40.0
    [finished] = worked(monkeypatch, all_of_it, history=history, since=since)
    assert isinstance(finished, Finished) and given == pytest.approx(left, abs=5.0)


INTERRUPTED = """
import sys
from pathlib import Path
from cute_fa.gpu_check import run
from cute_fa.gpu_check.place import Place
from cute_fa.gpu_check.sections import Settings
from cute_fa.ops.bundle import load_bundle
from cute_fa.target import get_target

if __name__ == "__main__":
    import os, signal
    from cute_fa.gpu_check.watch import Watch
    from tests.gpu_check import processes
    signal.signal(signal.SIGTERM, run._interrupt)

    class Told(Watch):
        def __init__(self, job, report, *, changed, say):
            def changed_then_cut():
                changed()
                if report.outcomes:
                    os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(job, report, changed=changed_then_cut, target=processes.hangs)

    place = Place("cpu", get_target("sm_80"))
    report = run.run(
        load_bundle(sys.argv[1]), place, Settings(), output=Path(sys.argv[2]), watch=Told
    )
    sys.exit(run.show(report, as_json=False))
"""


def test_a_run_that_is_cut_off_leaves_its_report(folder: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "cut.py", tmp_path / "report.json"
    script.write_text(INTERRUPTED)
    result = subprocess.run(
        [sys.executable, str(script), str(folder), str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert result.returncode == run.FAILED, result.stderr
    assert "interrupted" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-2:] == ["it did not come to its end", "FAILED"]
    document = json.loads(output.read_text())
    assert document["complete"] is False and document["ok"] is False
    assert [each["name"] for each in document["checks"]] == ["first"]
    assert len(list(tmp_path.iterdir())) == 2, "no scratch file is left"
