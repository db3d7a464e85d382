"""``cute-fa bench`` without a GPU: what it would time, and how it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fa.bench import benchmark, gpu_state, timing
from cute_fa.bench.benchmark import Results
from cute_fa.cli import bench
from cute_fa.cli.main import main
from cute_fa.errors import InvalidArgumentError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_fwd.py"


def shapes(*argv: str) -> list:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.shapes_of(parser.parse_args(argv))


def test_which_shapes() -> None:
    assert len(shapes()) == 2 * 3 * 2 * 6
    some = shapes("--dtype", "fp16", "-d", "128", "-s", "512,1024", "--mask", "causal")
    assert [(s.padded.dtype, s.padded.seqlen_q, s.padded.causal) for s in some] == [
        ("float16", 512, True),
        ("float16", 1024, True),
    ]
    groups = {shape.group for shape in shapes("--set", "all")}
    assert groups == {"papers", "gqa", "varlen"}
    for argv, what in (
        (["--set", "small"], "unknown set"),
        (["-s", "many"], "list of numbers"),
        (["-s", "1000"], "does not divide"),
        (["-s", "0"], "list of numbers"),
        (["--set", ""], "no shape"),
        (["--dtype", ","], "no shape"),
        (["--set", "gqa", "-s", "512"], "sizes and masks of their own(.|\\n)*--seqlen"),
        (["--set", "gqa,varlen", "-d", "64", "--mask", "full"], "--head-dim, --mask"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            shapes(*argv)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "there is no GPU to measure on" in err


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--set", "foo"], "unknown set of shapes"),
        (["--rounds", "0"], "--rounds times nothing"),
        (["-s", "abc"], "a list of numbers is not usable"),
        (["-d", "63"], "does not divide"),
        (["--dtype", "fp32"], "dtype is not an attention dtype"),
        (["--providers", "nobody"], "unknown provider"),
        (["--bundle", "/nonexistent"], "this is not a bundle"),
        (["--host", "--rounds", "3"], "--host takes no other argument"),
    ],
    ids=str,
)
def test_its_arguments_are_checked_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    what: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and what in err and "expected:" in err and "GPU" not in err


def test_the_script_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("usage: cute-fa bench")


def test_what_was_found_is_kept_when_a_run_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*args: Any, changed: Callable[[Results], None], **kwargs: Any) -> Results:
        changed(Results(matmul={"bfloat16": 600.0}))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_state, "require_gpu", lambda: None)
    monkeypatch.setattr(timing, "CudaTimer", lambda: None)
    monkeypatch.setattr(benchmark, "run", cut_off)
    arguments = argparse.ArgumentParser()
    bench.add_arguments(arguments)
    with pytest.raises(KeyboardInterrupt):
        bench.run(arguments.parse_args(["-o", str(tmp_path)]))
    document = json.loads((tmp_path / "bench_fwd.json").read_text())
    assert document["matmul_tflops"] == {"bfloat16": 600.0}
