"""Packed sequences as values: what a packing must be, and the costs of its sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.varlen import Packing, VarlenProblem

BASE = AttentionProblem(1, 1, 1, 4, 2, 64, 32, "float16", causal=True)
PACKING = Packing.of_lengths((3, 0, 5), (4, 2, 0), seqused_k=(4, 1, 0))


def test_packing_of_lengths():
    assert PACKING.cu_seqlens_q == (0, 3, 3, 8) and PACKING.cu_seqlens_k == (0, 4, 6, 6)
    assert PACKING.batch == 3
    assert PACKING.rows_q == (range(3), range(3, 3), range(3, 8))
    assert PACKING.rows_k == (range(4), range(4, 5), range(6, 6))


def test_no_sequence():
    problem = VarlenProblem.of(BASE, Packing((0,), (0,)))
    assert problem.sequences() == () and problem.flops() == problem.ideal_hbm_bytes() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), ()), "cu_seqlens_q does not begin with 0"),
        (((1, 2), (0, 2)), "cu_seqlens_q does not begin with 0"),
        (((0, 2), (0, 2, 3)), "different batches"),
        (((0, 2), (0, -1)), "cu_seqlens_k falls"),
        (((0, 5, 4), (0, 2, 3)), "5 at [1], 4 at [2]"),
        (((0, 5), (0, 2), (1, 2)), "expected: 1, one for each sequence"),
        (((0, 5), (0, 2), (6,)), "seqused_q[0] is no part of its sequence"),
        (((0, 5), (0, 2), None, (-1,)), "expected: 0 to 2"),
    ],
)
def test_numbers_that_describe_no_packing(arguments, words):
    with pytest.raises(InvalidArgumentError) as caught:
        Packing(*arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"padded": replace(BASE, batch=2, seqlen_q=5, seqlen_k=4)}, "another batch"),
        ({"padded": replace(BASE, batch=3, seqlen_q=4, seqlen_k=4)}, "max_seqlen_q is smaller"),
        ({"padded": replace(BASE, batch=3, seqlen_q=5, seqlen_k=3)}, "max_seqlen_k is smaller"),
        ({"total_q": 7}, "beyond the rows of q"),
        ({"total_q": 9}, "rows of q belong to no sequence"),
        ({"total_k": 5}, "beyond the rows of k"),
        ({"has_seqused_k": False}, "has_seqused_k does not say"),
        ({"has_seqused_q": True}, "has_seqused_q does not say"),
    ],
)
def test_a_packing_must_fit_its_tensors(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        replace(VarlenProblem.of(BASE, PACKING), **changes)


def test_longest_lengths_are_of_rows_that_count():
    """Keys behind the sequences, and longer sequences of which less counts, are no mistake."""
    packing = Packing((0, 8), (0, 9), (2,), (3,))
    problem = VarlenProblem.of(BASE, packing)
    assert (problem.padded.seqlen_q, problem.padded.seqlen_k) == (2, 3)
    assert replace(problem, total_k=20).flops() == problem.flops()


def test_costs_are_those_of_the_sequences():
    problem = VarlenProblem.of(BASE, PACKING)
    lengths = ((3, 4), (0, 1), (5, 0))
    assert [(p.batch, p.seqlen_q, p.seqlen_k) for p in problem.sequences()] == [
        (1, *pair) for pair in lengths
    ]
    # Only the first sequence has scores: rows of a causal 3 × 4 see 2, 3 and 4 columns.
    assert problem.flops() == 4 * 2 * (64 + 32) * (2 + 3 + 4)
    rows_q, rows_k = 8, 5
    q_and_o = rows_q * 4 * (64 + 32) * 2 + rows_q * 4 * 4
    assert problem.ideal_hbm_bytes() == q_and_o + rows_k * 2 * (64 + 32) * 2
    scores = 4 * 3 * 4 * 2
    assert problem.standard_hbm_bytes() == problem.ideal_hbm_bytes() + 4 * scores


def test_costs_need_the_lengths():
    problem = VarlenProblem(replace(BASE, batch=3), 8, 6)
    with pytest.raises(InvalidArgumentError, match="not known on the host"):
        problem.flops()


def test_variant():
    variant = VarlenProblem.of(BASE, PACKING).variant
    assert variant == replace(BASE.variant, is_varlen=True, has_seqused_k=True)
    assert not BASE.variant.is_varlen
