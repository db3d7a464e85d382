"""AttentionProblem: legality, masks and costs, against brute force."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from cute_fa.errors import CuteFAError, InvalidArgumentError, InvalidTypeError
from cute_fa.problem import AttentionProblem, check_scalar, normalise_window

BASE = AttentionProblem(2, 5, 7, 4, 2, 16, 8, "float16")


def problem(**changes):
    return replace(BASE, **changes)


def visible(p, i, j):
    """The mask by its definition."""
    distance = j - (i + p.seqlen_k - p.seqlen_q)
    if p.causal and distance > 0:
        return False
    if p.window_left is not None and distance < -p.window_left:
        return False
    return p.window_right is None or distance <= p.window_right


def random_band(rng):
    bound = lambda: rng.choice([None, 0, 1, 2, 5, 9, 100])  # noqa: E731
    causal = rng.random() < 0.3
    return {
        "seqlen_q": rng.randint(0, 9),
        "seqlen_k": rng.randint(0, 9),
        "causal": causal,
        "window_left": bound(),
        "window_right": None if causal else bound(),
    }


def test_score_count_and_columns_equal_a_brute_force_mask():
    rng = random.Random(0)
    for _ in range(2000):
        p = problem(**random_band(rng))
        rows = [[j for j in range(p.seqlen_k) if visible(p, i, j)] for i in range(p.seqlen_q)]
        assert p.score_count() == sum(map(len, rows)), p
        for i, columns in enumerate(rows):
            assert list(range(*p.visible_columns(i))) == columns, (p, i)


def test_score_count_of_long_sequences_is_closed_form():
    size = 10**12
    assert problem(seqlen_q=size, seqlen_k=size).score_count() == size * size
    assert problem(seqlen_q=size, seqlen_k=size, causal=True).score_count() == (
        size * (size + 1) // 2
    )
    # every row but the first sees 2 columns
    banded = problem(seqlen_q=size, seqlen_k=size, causal=True, window_left=1)
    assert banded.score_count() == 2 * size - 1


def test_flops_and_bytes():
    p = problem(causal=True)
    # rows see 3, 4, 5, 6, 7 of 7 columns
    assert p.score_count() == 25
    assert p.flops() == 2 * 4 * 2 * (16 + 8) * 25
    q, k, v, o = 2 * 5 * 4 * 16, 2 * 7 * 2 * 16, 2 * 7 * 2 * 8, 2 * 5 * 4 * 8
    lse = 2 * 4 * 5
    assert p.ideal_hbm_bytes() == 2 * (q + k + v + o) + 4 * lse
    scores = 2 * 4 * 5 * 7
    assert p.standard_hbm_bytes() == p.ideal_hbm_bytes() + 4 * 2 * scores


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"batch": -1}, "batch"),
        ({"seqlen_k": -3}, "seqlen_k"),
        ({"heads_q": 0}, "heads_q"),
        ({"heads_q": 5}, "heads"),
        ({"head_dim": 260}, "256"),
        ({"head_dim": 512}, "head_dim"),
        ({"head_dim": 100}, "104"),
        ({"head_dim_v": 4}, "head_dim_v"),
        ({"window_left": -2}, "window_left"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
        ({"softcap": 1e-40}, "softcap"),
        ({"softmax_scale": float("inf")}, "softmax_scale"),
        ({"softmax_scale": 1e39}, "softmax_scale"),
    ],
    ids=str,
)
def test_illegal_values_are_named_with_what_was_got(changes, word):
    with pytest.raises(InvalidArgumentError) as caught:
        problem(**changes)
    message = str(caught.value)
    assert word in message and "got:" in message and "expected:" in message


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"softcap": "much"}, {"softmax_scale": True}],
    ids=str,
)
def test_wrong_types(changes):
    with pytest.raises(InvalidTypeError):
        problem(**changes)


def test_a_scale_of_zero_is_not_the_default():
    assert problem(softmax_scale=0.0).scale == 0.0
    assert problem(softmax_scale=None).scale == 16**-0.5


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(3), -2.0])
def test_numbers_of_other_libraries_are_numbers(value):
    assert check_scalar("softmax_scale", value) == float(value)


def test_normalise_window():
    assert normalise_window(False, (-1, -1)) == (None, None)
    assert normalise_window(False, (None, 3)) == (None, 3)
    assert normalise_window(True, (4, 7)) == (4, 0)
    assert normalise_window(True, (-1, -1)) == (None, 0)
    left, right = normalise_window(False, (np.int64(2), 0))
    assert (left, right) == (2, 0) and type(left) is int


@pytest.mark.parametrize(
    "window", [(-2, 0), (0, -5), (True, 0), (1.0, 0), 3, (1, 2, 3), "ab", ("1", None)], ids=str
)
def test_windows_that_mean_nothing(window):
    with pytest.raises(CuteFAError, match="window_size"):
        normalise_window(False, window)


def test_variant_holds_features_not_sizes():
    variants = {
        problem(seqlen_q=s, batch=b, heads_q=h, window_left=w).variant
        for s, b, h, w in itertools.product((0, 1, 900), (0, 3), (2, 8), (0, 77))
    }
    assert len(variants) == 1
    assert problem(causal=True, window_right=3).variant.has_window_right is False
    assert problem(window_right=3).variant.has_window_right is True
    assert problem(softcap=2.0).variant.has_softcap is True


@pytest.mark.parametrize(
    "name",
    [
        "batch",
        "seqlen_q",
        "seqlen_k",
        "heads_q",
        "heads_k",
        "head_dim",
        "head_dim_v",
        "window_left",
    ],
)
@pytest.mark.parametrize("value", [5.5, 8.0, True, "8"])
def test_what_counts_is_an_integer(name, value):
    with pytest.raises(InvalidTypeError, match=f"{name} is not an integer(.|\n)*expected"):
        problem(**{name: value})


def test_numpy_integers_count():
    assert problem(batch=np.int64(3)).flops() == 3 * problem(batch=1).flops()


def test_causal_is_a_bool():
    with pytest.raises(InvalidTypeError, match="causal is not a bool"):
        problem(causal=1)


def test_the_dtypes_named_are_those_that_kernels_take():
    with pytest.raises(InvalidTypeError) as caught:
        problem(dtype="float32")
    assert caught.value.expected == "float16 or bfloat16 or float8_e4m3fn"
    half, fp8 = (problem(dtype=name, head_dim_v=16) for name in ("float16", "float8_e4m3fn"))
    assert fp8.ideal_hbm_bytes() < half.ideal_hbm_bytes()
