"""``cute-fa run`` and ``cute-fa sim`` on small problems."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cute_fa.cli import run as run_module
from cute_fa.cli.main import main
from cute_fa.problem import AttentionProblem
from cute_fa.testing import Case
from cute_fa.varlen import Packing, VarlenProblem

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


def test_the_architecture_is_the_generations_own_unless_named(cute_fa) -> None:
    sizes = ("-s", "20", "-H", "1", "-d", "64", "--json")
    for generation, arch in (("fa3", "sm_90a"), ("auto", "sm_80")):
        code, document = cute_fa("run", "-g", generation, *sizes)
        assert code == 0 and document["runs"][0]["arch"] == arch
    packed = ("--varlen", "20,0,7", "-H", "1", "--dtype", "fp8", "--json")
    code, document = cute_fa("run", *packed)
    [result] = document["runs"]
    assert code == 0 and (result["arch"], result["generation"]) == ("sm_90a", "fa3")
    code, document = cute_fa("inspect", "-g", "fa3", "-d", "64", "--json")
    assert code == 0 and "sm_90a" in str(document)
    code, document = cute_fa("run", "-g", "fa9", *sizes)
    assert code == 2 and document["error"]["what"] == "unknown generation"


def test_run_at_random_gives_one_row_each(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def few(count: int, seed: int, *, varlen: bool) -> list[Case]:
        drawn.append((count, seed, varlen))
        problem = AttentionProblem(1, 9, 9, 1, 1, 32, 32, "bfloat16")
        return [Case(f"random-{seed}-{number}", problem, seed) for number in range(count)]

    monkeypatch.setattr("cute_fa.testing.random_problems", few)
    code, text = cute_fa("run", "-g", "fa2", "--random", "2", "--seed", "3")
    assert code == 0 and drawn == [(2, 3, False)]
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["random-3-0", "random-3-1"]
    assert text.splitlines()[-1] == "2 of 2 passed on sm_80"


def test_run_packed_sequences(cute_fa) -> None:
    sizes = ("--varlen", "5,0,40", "--varlen-k", "9,3,70", "--seqused-k", "9,0,60")
    heads = ("-g", "fa2", "-H", "2", "--heads-k", "1", "-d", "32")
    code, text = cute_fa("run", *sizes, *heads, "--causal")
    assert code == 0 and "varlen 5×9 0×0 40×60 h2/1 d32" in text and "passed" in text
    code, document = cute_fa("run", *sizes, *heads, "--causal", "--json")
    [result] = document["runs"]
    assert code == 0 and result["problem"]["packing"]["seqused_k"] == [9, 0, 60]
    assert result["counters"]["global_bytes_written"] == 45 * 2 * (32 * 2 + 4)
    code, text = cute_fa("sim", *sizes, *heads, "--causal")
    assert code == 0 and "grid" in text and "0 hazards" in text


def test_run_packed_sequences_at_random(cute_fa) -> None:
    code, document = cute_fa("run", "-g", "fa2", "--varlen", "--random", "1", "--json")
    assert code == 0 and "packing" in document["runs"][0]["problem"]


def test_a_long_batch_is_told_in_short() -> None:
    problem = AttentionProblem(1, 1, 1, 1, 1, 32, 32, "bfloat16")
    packed = VarlenProblem.of(problem, Packing.of_lengths(range(9), range(9)))
    assert "5×5 … 9 sequences h1/1" in run_module.describe(Case("long", packed))


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
        (("--dtype", "int8"), "dtype"),
        (("--dtype", "fp8", "-g", "fa2"), "float8_e4m3fn"),
        (("--random", "0"), "--random"),
        (("--random", "2", "--varlen", "5"), "--random draws its own lengths"),
        (("--random", "2", "--dtype", "float8_e4m3fn"), "it and --dtype float8_e4m3fn"),
        (("--random", "2", "--causal"), "it and --causal"),
        (("--random", "2", "--window", "3", "-1"), "it and --window"),
        (("-s", "100000000"), "scores of the fp64 reference do not fit into memory"),
        (("-s", "10000000000", "--seqlen-k", "0"), "inputs and outputs do not fit into memory"),
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
