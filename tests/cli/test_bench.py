"""``cute-fa bench`` without a GPU: what it would time, and how it refuses."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_the_script_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("usage: cute-fa bench")
