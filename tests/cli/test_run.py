"""``cute-fa run`` and ``cute-fa sim`` on small problems."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cute_fa.cli import run as run_module
from cute_fa.cli.main import main
from cute_fa.problem import AttentionProblem
from cute_fa.testing import Case

SMALL = ("-g", "fa2", "-s", "40", "--seqlen-k", "70", "-H", "2", "--heads-k", "1", "-d", "32")


def test_run_checks_and_counts(cute_fa) -> None:
    code, document = cute_fa("run", *SMALL, "--causal", "--json")
    assert code == 0 and document["failed"] == 0
    [result] = document["runs"]
    assert result["ok"] and result["generation"] == "fa2" and result["arch"] == "sm_80"
    assert result["hazards"] == []
    assert 0 < result["max_err"] < 0.1 and result["ref_max_err"] > 0
    problem = AttentionProblem(1, 40, 70, 2, 1, 32, 32, "bfloat16", causal=True)
    assert result["ideal_hbm_bytes"] == problem.ideal_hbm_bytes()
    counters = result["counters"]
    assert counters["global_bytes_read"] >= (40 * 2 + 2 * 70) * 32 * 2
    assert counters["global_bytes_written"] == 40 * 2 * (32 * 2 + 4)
    assert counters["exponentials"] > 0


def test_run_prints_errors_bytes_and_counters(cute_fa) -> None:
    code, text = cute_fa("run", *SMALL, "--completion", "late")
    assert code == 0
    for words in ("fa2 on sm_80", "within its error budget", "HBM bytes", "hazards", "passed"):
        assert words in text


def test_run_at_random_gives_one_row_each(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def few(count: int, seed: int) -> list[Case]:
        drawn.append((count, seed))
        problem = AttentionProblem(1, 9, 9, 1, 1, 32, 32, "bfloat16")
        return [Case(f"random-{seed}-{number}", problem, seed) for number in range(count)]

    monkeypatch.setattr("cute_fa.testing.random_problems", few)
    code, text = cute_fa("run", "-g", "fa2", "--random", "2", "--seed", "3")
    assert code == 0 and drawn == [(2, 3)]
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["random-3-0", "random-3-1"]
    assert text.splitlines()[-1] == "2 of 2 passed on sm_80"


def test_a_wrong_result_fails(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.run_case

    def broken(case, settings):
        result = real(case, settings)
        result.out[0, 0, 0, 0] += 1
        return result

    monkeypatch.setattr(run_module, "run_case", broken)
    code, text = cute_fa("run", *SMALL)
    assert code == 1 and "attention is WRONG" in text and "FAILED" in text
    assert "(b, i, h, d) = (0, 0, 0, 0)" in text


def test_a_hazard_fails(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_module.run_case

    def hazardous(case, settings):
        result = real(case, settings)
        result.launches[0].hazards.append(SimpleNamespace(severity="error", rule="race"))
        return result

    monkeypatch.setattr(run_module, "run_case", hazardous)
    code, text = cute_fa("run", *SMALL)
    assert code == 1 and "within its error budget" in text and "race" in text


def test_nothing_to_compute(cute_fa) -> None:
    code, document = cute_fa("run", "-g", "fa2", "-s", "0", "-d", "32", "--json")
    assert code == 0 and document["runs"][0]["counters"] == {}
    code, text = cute_fa("sim", "-g", "fa2", "-s", "0", "-d", "32")
    assert code == 0 and "nothing to compute" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-H", "3", "--heads-k", "2"), "K/V heads do not divide"),
        (("--arch", "sm_75"), "unknown architecture"),
        (("-g", "fa7"), "fa7"),
        (("--dtype", "fp8"), "dtype"),
        (("--random", "0"), "--random"),
    ],
)
def test_bad_input_is_2(
    shared_cache: None, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert main(["run", *argv]) == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu_is_an_error(cute_fa, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["run", *SMALL, "--backend", "cuda"]) == 2
    assert "no usable GPU" in capsys.readouterr().err


def test_sim_tells_each_launch(cute_fa) -> None:
    code, document = cute_fa("sim", *SMALL, "--completion", "random", "--seed", "5", "--json")
    assert code == 0
    [launch] = document["launches"]
    assert launch["grid"][1:] == [2, 1] and launch["hazards"] == []
    assert launch["smem_bytes"] > 0 and launch["counters"]["warp_instructions"] > 0
    code, text = cute_fa("sim", *SMALL)
    assert code == 0
    assert launch["kernel"] in text and "0 hazards" in text and "global_bytes_read" in text
