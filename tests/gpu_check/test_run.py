"""The whole check from end to end, on the simulator: what runs on a GPU is this code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Timing
from cute_fa.build import bundle as bundles
from cute_fa.build import manifest
from cute_fa.build.bundle import Bundle, BundleKernel
from cute_fa.errors import CompileError
from cute_fa.gpu_check import agreement, correctness, run, tune
from cute_fa.gpu_check.grid import GridCase, grid
from cute_fa.gpu_check.outcome import Deadline, Outcome
from cute_fa.gpu_check.place import OneKernel, Place, runnable
from cute_fa.ops.bundle import LoadedBundle, load_bundle
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import get_target
from cute_fa.testing.cases import Case
from cute_fa.testing.inputs import Inputs

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"
SHAPE = Shape("papers", AttentionProblem(1, 32, 32, 2, 2, 64, 64, "bfloat16", causal=True))


class Clock:
    """A timer that runs the call and says that it took 1 ms."""

    def sample(self, action, *, flush: bool) -> float:
        action()
        return 1e-3


def test_everything_on_the_simulator(
    bundle: LoadedBundle, simulator: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run.run(
        bundle,
        simulator,
        Clock(),
        minutes=30,
        tiny=True,
        bench_shapes=[SHAPE],
        competitors=(),
    )
    assert [outcome.detail for outcome in report.outcomes if not outcome.ok] == []
    found = dict.fromkeys(("agreement", "correctness", "repeats"), 0)
    for outcome in report.outcomes:
        found[outcome.section] += 1
    # Two default kernels; normal and index inputs are recorded, four kinds are checked.
    assert found == {"agreement": 4, "correctness": 8, "repeats": 2}
    assert report.left_out == {"agreement": 0, "correctness": 0, "repeats": 0, "benchmark": 0}
    assert report.results is not None
    timed = {row.provider: row for row in report.results.rows}
    assert timed["cute_fa-fa2"].ok and timed["cute_fa-fa2"].seconds is not None
    assert not timed["cute_fa-fa3"].served

    output = tmp_path / "report.json"
    assert run.finish(report, output, as_json=False) == run.PASSED
    assert capsys.readouterr().out.splitlines()[-1] == "PASSED"
    document = json.loads(output.read_text())
    assert document["ok"] and document["device"]["arch"] == "sm_80"
    assert document["benchmark"]["rows"][1]["provider"] == "cute_fa-fa2"
    assert run.finish(report, tmp_path / "no" / "folder.json", as_json=True) == run.USAGE


def test_a_failure_is_reported(bundle: LoadedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    report = run.Report({"path": "b"}, {"arch": "sm_80"})
    assert not report.ok, "nothing was checked"
    report.outcomes = [Outcome("repeats", "fine", True)]
    assert report.ok
    report.outcomes += [
        Outcome("repeats", "fa2 causal", False, "3 of 50 runs differ from the first"),
        Outcome("repeats", "fp8", None, "no inputs"),
    ]
    report.left_out = {"repeats": 4}
    assert run.finish(report, None, as_json=False) == run.FAILED
    text = capsys.readouterr().out
    assert "repeats: 1 passed, 1 FAILED, 1 could not be checked, 4 not reached in time" in text
    assert "FAILED repeats: fa2 causal\n  3 of 50 runs differ" in text


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


# --- what a wrong kernel looks like


class Broken(OneKernel):
    """A kernel that spoils one element on some of its calls."""

    calls = 0
    spoil_from = 0

    def run(self, place: Place, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
        out, lse = super().run(place, case, inputs)
        type(self).calls += 1
        if type(self).calls > self.spoil_from:
            out.flatten()[7] += 0.25
        return out, lse


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    Broken.calls, Broken.spoil_from = 0, 0
    monkeypatch.setattr(correctness, "OneKernel", Broken)
    monkeypatch.setattr(agreement, "OneKernel", Broken)
    return Broken


def test_a_wrong_element_is_found(
    bundle: LoadedBundle, simulator: Place, broken: type[Broken]
) -> None:
    kernel = bundle.kernels[0]
    outcomes = {
        case.kind: correctness.check_one(kernel, simulator, case)
        for case in grid(kernel.variant, tiny=True)
        if case.kind in ("normal", "index")
    }
    assert [outcome.ok for outcome in outcomes.values()] == [False, False]
    assert "WRONG" in outcomes["normal"].detail
    assert outcomes["index"].detail.startswith("1 of 4224 elements differ")
    found = list(agreement.compare(bundle, simulator, Deadline(60)))
    assert found and all(outcome.ok is False for outcome in found)


def test_a_run_that_differs_is_found(
    bundle: LoadedBundle, simulator: Place, broken: type[Broken]
) -> None:
    broken.spoil_from = 2
    [case] = [case for case in grid(bundle.kernels[0].variant, tiny=True) if case.kind == "normal"]
    outcome = correctness.repeat(bundle.kernels[0], simulator, case, times=4)
    assert outcome.ok is False and outcome.detail == "2 of 4 runs differ from the first"


def test_a_kernel_that_fails_is_an_outcome(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: BundleKernel, backend: str) -> Any:
        raise CompileError("it does not load")

    monkeypatch.setattr(BundleKernel, "host", fail)
    kernel = bundle.kernels[0]
    case = next(iter(grid(kernel.variant, tiny=True)))
    assert "it does not load" in correctness.check_one(kernel, simulator, case).detail
    assert correctness.repeat(kernel, simulator, case, 2).ok is False
    assert {o.ok for o in agreement.compare(bundle, simulator, Deadline(60))} == {False}


def test_inputs_that_cannot_be_made_again(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "_digest", lambda inputs: "another")
    outcomes = list(agreement.compare(bundle, simulator, Deadline(60)))
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


# --- grid


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(
    "variant",
    [
        KernelVariant("bfloat16", 64, 64),
        KernelVariant("float16", 128, 64, causal=True, has_window_left=True),
        KernelVariant("float16", 64, 64, has_window_left=True, has_window_right=True),
        KernelVariant("bfloat16", 64, 64, has_softcap=True, packed_group=4),
        KernelVariant("bfloat16", 64, 64, is_varlen=True, has_seqused_q=True),
        KernelVariant("bfloat16", 64, 64, is_varlen=True, causal=True, has_seqused_k=True),
    ],
    ids=str,
)
def test_the_grid_is_of_the_variant(variant: KernelVariant, tiny: bool) -> None:
    cases: list[GridCase] = list(grid(variant, tiny=tiny))
    assert {case.kind for case in cases} >= {"normal", "one hot", "extreme"}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert replace(case.case.problem.variant, packed_group=variant.packed_group) == variant
        assert (case.inputs().expected is not None) == case.exact


def test_what_has_no_inputs_is_not_taken_for_checked(bundle: LoadedBundle) -> None:
    fp8 = KernelVariant("float8_e4m3fn", 64, 64)
    assert {case.kind for case in grid(fp8, tiny=True)} == {"normal", "one hot", "index", "extreme"}
    kernel = replace(bundle.kernels[0], variant=replace(fp8, has_block_descales=True))
    [outcome] = correctness.uncheckable([kernel, bundle.kernels[0]])
    assert outcome.ok is None and "float8_e4m3fn" in outcome.detail


def test_time_that_runs_out_is_told() -> None:
    now = iter([0.0, 1.0, 4.9, 5.0, 6.0])
    deadline = Deadline(5.0, clock=lambda: next(now))
    assert list(deadline.while_time("abcd")) == ["a", "b"]
    assert deadline.left_out == 2


def test_what_runs_where(bundle: LoadedBundle) -> None:
    for arch, count in (("sm_80", 2), ("sm_86", 2), ("sm_90a", 0)):
        assert len(runnable(bundle, Place("cpu", get_target(arch)))) == count
    everything = runnable(bundle, Place("cpu", get_target("sm_80")), role=None)
    assert [kernel.role for kernel in everything].count("candidate") == 1


# --- tuning


def test_tuning_writes_a_table_that_is_used(
    folder: Path, simulator: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    bundle = load_bundle(copy)
    [label] = tune.competitions(bundle, simulator)
    [default, candidate] = tune.competitions(bundle, simulator)[label]
    assert (default.role, candidate.role) == ("default", "candidate")

    def measure(actions, timer, policy):
        """The candidate is twice as fast."""
        for action in actions.values():
            timer.sample(action, flush=policy.flush)
        seconds = {name: 1e-3 if name == candidate.name else 2e-3 for name in actions}
        return {name: Timing.of([value]) for name, value in seconds.items()}

    monkeypatch.setattr(tune, "measure", measure)
    choices = tune.tune(
        bundle,
        simulator,
        Clock(),
        Deadline(600),
        policy=tune.Policy(warmup=0, rounds=1),
        shapes_of=lambda variant: [SHAPE],
    )
    [choice] = choices
    assert (choice.label, choice.kernel, choice.speedup) == (label, candidate.name, 2.0)
    assert {trial.config["tile_n"] for trial in choice.trials} == {32, 64}
    path = tune.write_table(bundle, choices, {"name": "a GPU"})
    assert path.name == bundles.TUNED
    assert load_bundle(copy).kernel("fa2", "sm_80", candidate.variant).name == candidate.name
    manifest.check_files(copy, bundle.document)


def trial(kernel: str, role: str, *seconds: float, refused: str = "") -> tune.Trial:
    medians = {str(number): value for number, value in enumerate(seconds)}
    return tune.Trial(kernel, role, {}, medians, refused)


@pytest.mark.parametrize(
    ("trials", "winner", "speedup"),
    [
        ([trial("d", "default", 2.0, 2.0), trial("c", "candidate", 1.0, 2.0)], "c", 2**0.5),
        ([trial("d", "default", 1.0), trial("c", "candidate", 0.995)], "d", 1.0),
        ([trial("d", "default", 2.0), trial("c", "candidate", 1.0, refused="wrong")], "d", 1.0),
        ([trial("d", "default", refused="no"), trial("c", "candidate", 1.0)], "c", 1.0),
        ([trial("d", "default", refused="no"), trial("c", "candidate", refused="no")], "d", 1.0),
    ],
)
def test_the_winner(trials: list[tune.Trial], winner: str, speedup: float) -> None:
    choice = tune.choose("label", trials)
    assert choice.kernel == winner and choice.speedup == pytest.approx(speedup)


def test_tuning_shapes_are_the_variants() -> None:
    found = tune.tuning_shapes(KernelVariant("float16", 128, 128, causal=True))
    assert [shape.padded.seqlen_q for shape in found] == [1024, 4096, 16384]
    assert {shape.padded.variant for shape in found} == {KernelVariant("float16", 128, 128, True)}


def test_a_recorded_bundle_is_whole(folder: Path) -> None:
    document = Bundle(folder).document
    assert len(document["agreement"]) == 4
    assert all(entry["file"] in document["files"] for entry in document["agreement"])
