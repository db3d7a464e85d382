"""Lengths and masks at the places where blocks begin, end, are empty or are cut."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem


def _problem(seqlen_q: int, seqlen_k: int, **features) -> AttentionProblem:
    values = {"head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", **features}
    return AttentionProblem(1, seqlen_q, seqlen_k, 1, 1, **values)


# The tile is 128 × 64. Without a mask only Sk matters: nothing, one key, a full block, one more,
# and more blocks than the ring has slots. A causal mask adds the diagonal: on a tile's corner, off
# it by one either way, entirely left of the tile (Sq > Sk: whole row tiles without a key), far to
# the right, and a single query, as in decoding.
LENGTHS = {
    "none": [(1, 1), (7, 0), (129, 64), (3, 65), (128, 257)],
    "causal": [(128, 128), (129, 128), (127, 191), (300, 5), (5, 0), (1, 200), (2, 1)],
}


@pytest.mark.parametrize("lengths", LENGTHS["none"], ids=lambda s: f"{s[0]}x{s[1]}")
def test_lengths(fa2, lengths):
    fa2.check(_problem(*lengths))


@pytest.mark.parametrize("lengths", LENGTHS["causal"], ids=lambda s: f"{s[0]}x{s[1]}")
def test_causal_lengths(fa2, lengths):
    fa2.check(_problem(*lengths, causal=True))


# Windows narrower than a block, than a tile, of the diagonal only, wider than the sequence (2³¹ − 1
# must not overflow), and with rows that see no key at all on either side of those that do.
@pytest.mark.parametrize(
    ("lengths", "left", "right"),
    [
        ((150, 330), 0, 0),
        ((140, 150), 70, 3),
        ((130, 200), 2**31 - 1, 2**31 - 1),
        ((200, 70), 10, 20),
        ((257, 257), 64, 64),
    ],
)
def test_window(fa2, lengths, left, right):
    fa2.check(_problem(*lengths, window_left=left, window_right=right))


def test_left_window_under_causal(fa2):
    fa2.check(_problem(200, 330, causal=True, window_left=100))


@pytest.mark.parametrize("stages", [1, 3])
def test_ring_depth(fa2, stages):
    """One slot loads V in its own iteration; three slots are more than some rows' blocks."""
    fa2.check(_problem(130, 330, causal=True), stages=stages)
