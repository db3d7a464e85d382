"""Arguments that several commands share."""

from __future__ import annotations

import argparse

import pytest

from cute_fa.cli import arguments
from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.problem import AttentionProblem


def parse(*argv: str) -> AttentionProblem:
    parser = argparse.ArgumentParser()
    arguments.add_problem(parser)
    return arguments.problem_of(parser.parse_args(argv))


def test_defaults_fill_the_other_side_in() -> None:
    assert parse("-s", "100", "-H", "6", "-d", "96") == AttentionProblem(
        1, 100, 100, 6, 6, 96, 96, "bfloat16"
    )


def test_every_argument_reaches_the_problem() -> None:
    argv = "-b 2 -s 7 --seqlen-k 9 -H 6 --heads-k 3 -d 64 --head-dim-v 32 --dtype fp16"
    argv += " --scale 0 --causal --window 4 -1 --softcap 20"
    assert parse(*argv.split()) == AttentionProblem(
        2, 7, 9, 6, 3, 64, 32, "float16", True, 4, 0, 20.0, 0.0
    )


def test_a_right_window_without_causal() -> None:
    problem = parse("--window", "-1", "5")
    assert problem.window == (None, 5)


@pytest.mark.parametrize(
    "argv", ["-H 3 --heads-k 2", "-d 100", "--dtype float32", "--softcap nan", "--window -3 0"]
)
def test_what_is_no_problem_is_refused(argv: str) -> None:
    with pytest.raises(CuteFAError):
        parse(*argv.split())


def test_settings_are_literals_or_words() -> None:
    items = ["tile_n=64", "scale=0.5", "flag=True", "name=hopper", "text=a=b"]
    assert arguments.settings(items) == {
        "tile_n": 64,
        "scale": 0.5,
        "flag": True,
        "name": "hopper",
        "text": "a=b",
    }


@pytest.mark.parametrize("item", ["tile_n", "=3", "tile n=3"])
def test_settings_that_are_none(item: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--set"):
        arguments.settings([item])


def test_words() -> None:
    assert arguments.words(" sm_80, ,sm_90a,") == ["sm_80", "sm_90a"]
