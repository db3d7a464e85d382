"""Lengths and masks at the places where blocks begin, end, are empty or are cut."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem


def _problem(seqlen_q: int, seqlen_k: int, **features) -> AttentionProblem:
    values = {"head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", **features}
    return AttentionProblem(1, seqlen_q, seqlen_k, 1, 1, **values)


# The tile is 192 × 128, in strips of 64 rows. Without a mask only Sk matters: nothing, one key, a
# full block, one more, and more blocks than the rings have slots (an even and an odd number); Sq
# leaves none, one or two strips without rows. A causal mask adds the diagonal: on a tile's corner,
# off it by one either way, entirely left of the tile (Sq > Sk: whole row tiles without a key), far
# to the right, and a single query, as in decoding.
LENGTHS = {
    "none": [(1, 1), (7, 0), (193, 128), (65, 129), (130, 513), (64, 641)],
    "causal": [(192, 192), (193, 192), (191, 320), (600, 5), (5, 0), (1, 700), (2, 1), (400, 400)],
}


@pytest.mark.parametrize("lengths", LENGTHS["none"], ids=lambda s: f"{s[0]}x{s[1]}")
def test_lengths(fa3, lengths):
    fa3.check(_problem(*lengths))


@pytest.mark.parametrize("lengths", LENGTHS["causal"], ids=lambda s: f"{s[0]}x{s[1]}")
def test_causal_lengths(fa3, lengths):
    fa3.check(_problem(*lengths, causal=True))


# Windows narrower than a block, than a tile, of the diagonal only, wider than the sequence (2³¹ − 1
# must not overflow), and with rows that see no key at all on either side of those that do.
@pytest.mark.parametrize(
    ("lengths", "left", "right"),
    [
        ((250, 630), 0, 0),
        ((240, 250), 150, 3),
        ((230, 400), 2**31 - 1, 2**31 - 1),
        ((400, 170), 10, 20),
        ((460, 460), 128, 128),
    ],
)
def test_window(fa3, lengths, left, right):
    fa3.check(_problem(*lengths, window_left=left, window_right=right))


def test_left_window_under_causal(fa3):
    fa3.check(_problem(300, 730, causal=True, window_left=200))


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": 3},
        {"num_consumers": 2, "tile_n": 64},
        {"has_turns": False},
    ],
    ids=["stages3", "consumers2", "no-turns"],
)
def test_other_plans(fa3, changes):
    """What the tile table does not choose at D = 64: deeper rings, fewer strips, no order."""
    fa3.check(_problem(260, 530, causal=True), completion="random", **changes)
