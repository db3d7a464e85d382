"""The whole check from end to end, on the simulator: what runs on a GPU is this code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cute_fa.bench import benchmark
from cute_fa.build import manifest
from cute_fa.build.bundle import TUNED, Bundle, BundleKernel
from cute_fa.errors import CompileError
from cute_fa.gpu_check import agreement, correctness, run, tune
from cute_fa.gpu_check.events import Begins, History
from cute_fa.gpu_check.grid import GridInputs
from cute_fa.gpu_check.outcome import Check, Deadline, Outcome
from cute_fa.gpu_check.place import OneKernel, Place, runnable, serving
from cute_fa.gpu_check.report import Report
from cute_fa.gpu_check.sections import DeviceLostError, Run, Settings, benchmark_shapes
from cute_fa.ops.bundle import LoadedBundle, load_bundle
from cute_fa.target import get_target
from cute_fa.testing.cases import Case
from tests.gpu_check.processes import SHAPE, Clock

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"
TINY = Settings(tiny=True, shapes=(SHAPE,), competitors=(), timer=Clock)


def test_everything_on_the_simulator(
    bundle: LoadedBundle, simulator: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, as on a GPU."""
    output = tmp_path / "report.json"
    report = run.run(bundle, simulator, TINY, minutes=30, output=output)
    assert [outcome.detail for outcome in report.outcomes if not outcome.ok] == []
    found = dict.fromkeys(("agreement", "correctness", "repeats"), 0)
    for outcome in report.outcomes:
        found[outcome.section] += 1
    # Two default kernels; normal and index inputs are recorded, four kinds are checked.
    assert found == {"agreement": 4, "correctness": 8, "repeats": 2}
    assert report.left_out == {"agreement": 0, "correctness": 0, "repeats": 0, "benchmark": 0}
    timed = {row.provider: row for row in report.results.rows}
    assert timed["cute_fa-fa2"].ok and timed["cute_fa-fa2"].seconds is not None
    assert not timed["cute_fa-fa3"].served
    assert "bfloat16" in report.results.matmul

    assert run.show(report, as_json=False) == run.PASSED
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "PASSED"
    assert printed.err.splitlines() == [f"{name} …" for name in (*found, "benchmark")]
    document = json.loads(output.read_text())
    assert document["ok"] and document["complete"] and document["device"]["arch"] == "sm_80"
    assert document["benchmark"]["rows"][1]["provider"] == "cute_fa-fa2"
    assert document["benchmark"]["device"]["name"] == "simulated sm_80"


def test_tuning_writes_a_table_that_is_used(
    folder: Path,
    simulator: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The candidate is said to be twice as fast; from then on it is what runs, and is checked."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    bundle = load_bundle(copy)
    [candidate] = [kernel for kernel in bundle.kernels if kernel.role == "candidate"]
    assert candidate not in serving(bundle, simulator)

    class InProcess:
        """Runs a job here, where its clock can tell who is called."""

        def __init__(self, job, report, *, changed, say) -> None:
            self.job, self.report, self.begun = job, report, []

        def run(self) -> None:
            def tell(event: Any) -> None:
                if isinstance(event, Begins):
                    self.begun.append(event.kernel)
                self.report.take(event)

            done = frozenset({"agreement", "correctness", "repeats", "benchmark"})
            Run(
                load_bundle(self.job.folder), simulator, self.job.settings, History(done), tell
            ).all(600, 600)
            assert candidate.name in self.begun and self.begun[-1] is None
            self.report.is_complete = True

    def measure(actions, timer, policy, failed):
        from cute_fa.bench.timing import Timing

        seconds = {name: 1e-3 if name == candidate.name else 2e-3 for name in actions}
        return {name: Timing.of([value]) for name, value in seconds.items()}

    monkeypatch.setattr("cute_fa.gpu_check.tune.measure", measure)
    settings = Settings(tuning=True, tuning_shapes=(SHAPE,), timer=Clock)
    report = run.run(bundle, simulator, settings, watch=InProcess)
    [choice] = report.choices
    assert (choice.label, choice.kernel, choice.speedup) == (candidate.label, candidate.name, 2.0)
    assert {trial.config["tile_n"] for trial in choice.trials} == {32, 64}
    assert report.tuned == str(copy / TUNED)

    run.show(report, as_json=False)
    assert "tile_n=32; 2 were tried" in capsys.readouterr().out
    # The next run finds no time for this one: it stays.
    first = json.loads((copy / TUNED).read_text())["choices"]
    other = replace(choice, label="another", trials=choice.trials[:1])

    class Another(InProcess):
        def run(self) -> None:
            self.report.device["name"] = "simulated sm_80"
            self.report.choices.append(other)

    run.run(bundle, simulator, settings, watch=Another)
    after = json.loads((copy / TUNED).read_text())["choices"]
    assert [entry["label"] for entry in after] == ["another", candidate.label]
    assert after[1:] == first
    (copy / TUNED).write_text(json.dumps({"device": report.device, "choices": first}))

    tuned = load_bundle(copy)
    assert tuned.kernel("fa2", "sm_80", candidate.variant).name == candidate.name
    assert candidate.name in [kernel.name for kernel in serving(tuned, simulator)]
    [note] = [note for note in tuned.notes() if TUNED in note]
    assert "simulated sm_80" in note
    manifest.check_files(copy, bundle.document)
    # What runs is the candidate, and it is right.
    q = torch.randn(1, 40, 2, 64).bfloat16()
    out = tuned.flash_attn_func(q, q, q, causal=True, generation="fa2", arch="sm_80")
    again = OneKernel(tuned.kernel("fa2", "sm_80", candidate.variant)).flash_attn_func(
        q, q, q, causal=True, generation="fa2", arch="sm_80"
    )
    assert torch.equal(out, again)


def test_tuning_alone(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own; it passes if anything was timed, as only right kernels are."""
    written: list[Path] = []
    monkeypatch.setattr(run, "write_in_one_step", lambda path, text: written.append(path))
    settings = Settings(tuning=True, checking=False, tuning_shapes=(SHAPE,), timer=Clock)
    report = run.run(bundle, simulator, settings)
    assert report.is_complete and report.outcomes == [] and report.results.rows == []
    assert report.left_out == {"tuning": 0} and written == [bundle.folder / TUNED]
    [choice] = report.choices
    assert [len(trial.medians) for trial in choice.trials] == [1, 1]
    assert report.ok
    report.choices = [replace(choice, trials=())]
    assert not report.ok
    # Who is wrong is not timed, and the others' being right does not make up for it.
    right, wrong = choice.trials[0], replace(choice.trials[1], medians={}, refused="wrong on it")
    report.choices = [replace(choice, trials=(right, wrong))]
    assert not report.ok
    assert f"FAILED tuning: {wrong.kernel} of {choice.label}\n  wrong on it" in report.text()


def test_without_candidates_there_is_no_tuning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LoadedBundle, "check_gpu", lambda self: get_target("sm_90a"))
    monkeypatch.setattr(run, "Watch", None)  # nothing is begun
    for option in ("--tune", "--tune-only"):
        assert run.main([str(folder), option]) == run.USAGE
        said = capsys.readouterr().err
        assert "no kernels of this bundle compete" in said and "--arch sm_90a" in said


def test_a_table_that_cannot_be_written(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The report is not lost with it."""

    class Chosen:
        def __init__(self, job, report, *, changed, say) -> None:
            report.choices.append(object())

        def run(self) -> None: ...

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_in_one_step", full)
    monkeypatch.setattr(run, "table", lambda *what: "")
    report = run.run(bundle, simulator, TINY, watch=Chosen)
    assert report.tuned is not None and "No space left" in report.tuned


def test_a_failure_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"path": "b"}, {"arch": "sm_80"}, is_complete=True)
    assert not report.ok, "nothing was checked"
    report.outcomes = [Outcome("repeats", "fine", True)]
    assert report.ok
    report.outcomes += [
        Outcome("repeats", "fa2 causal", False, "3 of 50 runs differ from the first"),
        Outcome("repeats", "fp8", None, "no inputs", {"max_err": float("inf")}),
    ]
    report.left_out = {"repeats": 4}
    assert run.show(report, as_json=False) == run.FAILED
    text = capsys.readouterr().out
    assert "repeats: 1 passed, 1 FAILED, 1 could not be checked, 4 not reached in time" in text
    assert "FAILED repeats: fa2 causal\n  3 of 50 runs differ" in text
    assert run.show(report, as_json=True) == run.FAILED

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert document["checks"][2]["figures"]["max_err"] == "inf"


def test_without_a_gpu_it_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = subprocess.run(
        [sys.executable, str(TOOL), str(folder)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (run.NO_GPU, "")
    assert "no CUDA driver" in result.stderr and "Traceback" not in result.stderr
    assert run.main([str(tmp_path)]) == run.USAGE
    assert "this is not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([str(tmp_path), "--minutes", minutes])
    assert caught.value.code == run.USAGE
    assert "is no time to use" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_at_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(LoadedBundle, "check_gpu", lambda self: get_target("sm_80"))
    monkeypatch.setattr(run, "Watch", None)  # nothing is begun
    assert run.main([str(folder), "-o", str(tmp_path / "no" / "report.json")]) == run.USAGE
    assert "the output cannot be written" in capsys.readouterr().err


# --- what a wrong kernel looks like


class Broken(OneKernel):
    """A kernel that spoils one element on some of its calls."""

    calls = 0
    spoil_from = 0

    def bind(
        self, place: Place, case: Case, inputs: GridInputs
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        call = super().bind(place, case, inputs)

        def spoilt() -> tuple[Tensor, Tensor]:
            out, lse = call()
            type(self).calls += 1
            if type(self).calls > self.spoil_from:
                out.flatten()[7] += 0.25
            return out, lse

        return spoilt


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    Broken.calls, Broken.spoil_from = 0, 0
    monkeypatch.setattr(correctness, "OneKernel", Broken)
    monkeypatch.setattr(agreement, "OneKernel", Broken)
    return Broken


def test_a_wrong_element_is_found(
    bundle: LoadedBundle, simulator: Place, broken: type[Broken]
) -> None:
    kinds = {"normal": "WRONG", "index": "1 of 4224 elements differ"}
    for check in correctness.checks([bundle.kernels[0]], simulator, tiny=True):
        wanted = kinds.pop(check.name.rpartition(", ")[2], None)
        if wanted is not None:
            outcome = check.outcome()
            assert outcome.ok is False and wanted in outcome.detail
    assert not kinds
    found = [check.outcome() for check in agreement.checks(bundle, simulator)]
    assert found and all(outcome.ok is False for outcome in found)


def test_a_run_that_differs_is_found(
    bundle: LoadedBundle, simulator: Place, broken: type[Broken]
) -> None:
    broken.spoil_from = 2
    [check] = correctness.repeats([bundle.kernels[0]], simulator, times=4, tiny=True)
    outcome = check.outcome()
    assert outcome.ok is False and outcome.detail == "2 of 4 runs differ from the first"


def test_a_kernel_that_fails_is_an_outcome(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: BundleKernel, backend: str) -> Any:
        raise CompileError("it does not load")

    monkeypatch.setattr(BundleKernel, "host", fail)
    report = Report({}, {})
    Run(bundle, simulator, TINY, History(), report.take).all(600, 0)
    checked = [outcome for outcome in report.outcomes if outcome.section != "benchmark"]
    assert len(checked) == 14 and {outcome.ok for outcome in checked} == {False}
    assert all("it does not load" in outcome.detail for outcome in checked)
    # What fails is a failure of the benchmark too, not a refusal.
    [row] = [row for row in report.results.wrong if row.provider == "cute_fa-fa2"]
    assert row.reason == "it does not load"


def test_a_device_that_is_lost_ends_the_process(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun last is to blame; nothing that follows is."""

    def fail(self: BundleKernel, backend: str) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(BundleKernel, "host", fail)
    monkeypatch.setattr(Place, "complaint", lambda self: "CUDA error: everything is refused")
    told: list[Any] = []
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        Run(bundle, simulator, TINY, History(), told.append).all(600, 0)
    assert isinstance(told[-1], Begins) and told[-1].kernel == bundle.kernels[0].name

    done = frozenset({"agreement", "correctness", "repeats"})
    monkeypatch.setattr(Place, "complaint", lambda self: None)
    losses = iter([None, None, "CUDA error: everything is refused"])
    monkeypatch.setattr(Place, "complaint", lambda self: next(losses))
    told.clear()
    with pytest.raises(DeviceLostError, match="everything is refused"):
        Run(bundle, simulator, TINY, History(done), told.append).all(600, 0)
    assert isinstance(told[-1], Begins) and told[-1].call == ("cute_fa-fa1", SHAPE.problem.variant)


def test_what_goes_wrong_in_a_section_leaves_the_others(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(agreement, "checks", fail)
    monkeypatch.setattr(benchmark, "run_shape", fail)
    monkeypatch.setattr(tune, "try_out", fail)
    report = Report({}, {})
    settings = replace(TINY, tuning=True)
    Run(bundle, simulator, settings, History(), report.take).all(600, 600)
    found = {(each.section, each.name): each.detail for each in report.failures}
    [label] = tune.competitions(bundle, simulator)
    expected = [("agreement", "as a whole"), ("benchmark", SHAPE.name), ("tuning", label)]
    assert list(found) == expected
    assert all("nobody thought of this" in detail for detail in found.values())
    assert sum(each.ok is True for each in report.outcomes) == 10
    sections = {"agreement", "correctness", "repeats", "benchmark", "tuning"}
    assert set(report.seconds) == sections


def test_a_family_that_is_given_up_is_left_out(bundle: LoadedBundle, simulator: Place) -> None:
    packed = [kernel for kernel in bundle.kernels if kernel.variant.is_varlen]
    begun: list[Begins] = []
    history = History(frozenset({"agreement", "repeats"}), given_up=frozenset({"fa2 fp16 dense"}))

    def tell(event: Any) -> None:
        if isinstance(event, Begins):
            begun.append(event)

    Run(bundle, simulator, TINY, history, tell).all(600, 0)
    assert {each.kernel for each in begun if each.kernel} == {kernel.name for kernel in packed}
    families = {each.family for each in begun if each.section == "correctness"}
    assert families == {"fa2 fp16 packed"} and bundle.kernels == tuple(packed)


def test_what_is_done_or_broken_is_not_done_again(bundle: LoadedBundle, simulator: Place) -> None:
    [default, _, packed] = sorted(
        bundle.kernels, key=lambda kernel: (kernel.variant.is_varlen, kernel.role != "default")
    )
    first = correctness.checks([packed], simulator, tiny=True)[0]
    history = History(
        sections=frozenset({"agreement", "repeats"}),
        done=frozenset({("correctness", first.name)}),
        broken={default.name: "it hung"},
        refused={("cute_fa-fa1", SHAPE.problem.variant): "it hung too"},
    )
    told: list[Any] = []
    report = Report({}, {})

    def tell(event: Any) -> None:
        told.append(event)
        report.take(event)

    Run(bundle, simulator, TINY, history, tell).all(600, 0)
    begun = {event.kernel for event in told if isinstance(event, Begins) and event.kernel}
    assert begun == {packed.name}
    assert first.name not in {outcome.name for outcome in report.outcomes}
    assert [row.provider for row in report.results.wrong] == ["cute_fa-fa1"]
    [ours] = [row for row in report.results.rows if row.provider == "cute_fa-fa2"]
    assert not ours.served and "no kernel for the problem" in ours.reason


def test_inputs_that_cannot_be_made_again(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_digest", lambda inputs: "another")
    outcomes = [check.outcome() for check in agreement.checks(bundle, simulator)]
    assert len(outcomes) == 4 and {outcome.ok for outcome in outcomes} == {None}


def test_agreement_has_a_tolerance() -> None:
    a = torch.tensor([[1.0, 0.01]]).bfloat16()
    assert agreement._ulps(a, a) == 0.0
    higher = a + torch.tensor([[0.0, 0.0156]]).bfloat16()
    assert agreement._ulps(higher, a) == pytest.approx(2, rel=0.05)
    nan = torch.full_like(a, torch.nan)
    assert agreement._ulps(nan, a) == float("inf")
    minus_inf = torch.tensor([-torch.inf, 10.0])
    assert agreement._lse_error(minus_inf, minus_inf) == 0.0
    assert agreement._lse_error(torch.tensor([0.0, 10.0]), minus_inf) == float("inf")
    higher = torch.tensor([-torch.inf, 10.1])
    assert agreement._lse_error(higher, minus_inf) == pytest.approx(0.01, rel=1e-4)


def test_fp8_kernels_are_checked_with_their_descales(fp8_folder: Path) -> None:
    bundle, place = load_bundle(fp8_folder), Place("cpu", get_target("sm_90a"))
    checks: list[Check] = correctness.checks(bundle.kernels, place, tiny=True)
    kinds = {check.name.rpartition(", ")[2] for check in checks}
    assert kinds == {"normal", "one hot", "index", "extreme", "quantized"}
    outcomes = [check.outcome() for check in checks]
    assert [outcome.detail for outcome in outcomes if not outcome.ok] == []
    recorded = [check.outcome() for check in agreement.checks(bundle, place)]
    assert [outcome.ok for outcome in recorded] == [True, True]


def test_a_kernel_that_takes_the_wrong_descales_is_found(
    fp8_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first block for all blocks."""

    class FirstBlock(OneKernel):
        def run(self, place: Place, case: Case, inputs: GridInputs) -> tuple[Tensor, Tensor]:
            of_k = inputs.descales.k
            assert of_k is not None
            same = of_k[..., :1].expand(of_k.shape)
            return super().run(
                place, case, inputs._replace(descales=inputs.descales._replace(k=same))
            )

    monkeypatch.setattr(correctness, "OneKernel", FirstBlock)
    bundle, place = load_bundle(fp8_folder), Place("cpu", get_target("sm_90a"))
    kernels = [kernel for kernel in bundle.kernels if kernel.variant.has_block_descales]
    found = [
        check.outcome()
        for check in correctness.checks(kernels, place, tiny=True)
        if check.name.endswith("quantized")
    ]
    assert [outcome.ok for outcome in found] == [False, False], "dense and packed"


def test_time_that_runs_out_is_told() -> None:
    now = iter([0.0, 1.0, 4.9, 5.0, 6.0])
    deadline = Deadline(5.0, clock=lambda: next(now))
    assert list(deadline.while_time("abcd")) == ["a", "b"]
    assert deadline.left_out == 2


def test_what_there_is_no_time_for_is_counted(bundle: LoadedBundle, simulator: Place) -> None:
    report = Report({}, {})
    Run(bundle, simulator, TINY, History(), report.take).all(0, 0)
    assert report.outcomes == [] and report.results.rows == []
    assert report.left_out == {"agreement": 4, "correctness": 8, "repeats": 2, "benchmark": 1}


def test_what_runs_where(bundle: LoadedBundle) -> None:
    for arch, count in (("sm_80", 3), ("sm_86", 3), ("sm_90a", 0)):
        assert len(runnable(bundle, Place("cpu", get_target(arch)))) == count
    assert len(serving(bundle, Place("cpu", get_target("sm_80")))) == 2


def test_the_most_interesting_shapes_come_first() -> None:
    found = [shape.padded for shape in benchmark_shapes()]
    assert [p.dtype for p in found[:24:12]] == ["bfloat16", "float8_e4m3fn"]
    assert {p.head_dim for p in found[:36]} == {128}
    assert len({shape.name for shape in benchmark_shapes()}) == len(found)


def test_a_recorded_bundle_is_whole(folder: Path) -> None:
    document = Bundle(folder).document
    assert len(document["agreement"]) == 4
    assert all(entry["file"] in document["files"] for entry in document["agreement"])
