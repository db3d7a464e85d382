"""Arguments that several commands share."""

from __future__ import annotations

import argparse

import pytest

from cute_fa.cli import arguments
from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.varlen import Packing, VarlenProblem


def parse(*argv: str) -> AttentionProblem | VarlenProblem:
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


def test_packed_sequences() -> None:
    base = AttentionProblem(1, 1, 1, 2, 2, 64, 64, "bfloat16", causal=True, window_right=0)
    assert parse("--varlen", "3, 0,5", "--causal") == VarlenProblem.of(
        base, Packing.of_lengths((3, 0, 5), (3, 0, 5))
    )
    argv = "--varlen 3,0 --varlen-k 7,9 --seqused-q 2,0 --seqused-k 7,0 --causal"
    assert parse(*argv.split()) == VarlenProblem.of(
        base, Packing.of_lengths((3, 0), (7, 9), (2, 0), (7, 0))
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--varlen", "--varlen is no list of lengths"),
        ("--varlen 3,x", "--varlen is no list of lengths"),
        ("--varlen 3,4 --varlen-k 3", "different batches"),
        ("--varlen 3 --seqused-q 4", "no part of its sequence"),
        ("--varlen 3 --batch 2", "--batch is of dense tensors"),
        ("--varlen 3 -s 2", "--seqlen is of dense tensors"),
        ("--seqused-k 3", "--seqused-k belongs to packed sequences"),
        ("--varlen-k 3", "--varlen-k belongs to packed sequences"),
    ],
)
def test_what_is_no_packing_is_refused(argv: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        parse(*argv.split())


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
