"""What is timed, and how its work is counted."""

from __future__ import annotations

import pytest
import torch

from cute_fa.bench import inputs, shapes
from cute_fa.bench.shapes import Shape, paper_flops
from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.varlen import Packing, VarlenProblem


def visible(problem: AttentionProblem) -> torch.Tensor:
    """The mask, score by score."""
    p = problem
    rows, columns = torch.arange(p.seqlen_q)[:, None], torch.arange(p.seqlen_k)[None]
    difference = columns - rows - (p.seqlen_k - p.seqlen_q)
    left, right = p.window
    mask = torch.ones(p.seqlen_q, p.seqlen_k, dtype=torch.bool)
    if left is not None:
        mask &= difference >= -left
    if right is not None:
        mask &= difference <= right
    return mask


SIZES = [(1, 1), (7, 7), (16, 16), (5, 12), (12, 5), (1, 9), (9, 1)]
MASKS = [
    {},
    {"causal": True},
    {"causal": True, "window_left": 3},
    {"window_left": 2, "window_right": 4},
    {"window_left": 0, "window_right": 0},
    {"window_right": 2},
    {"window_left": 5},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_flops_are_those_of_the_mask(sizes: tuple[int, int], mask: dict) -> None:
    p = AttentionProblem(2, *sizes, 6, 2, 64, 32, "bfloat16", **mask)
    per_score = 2 * p.batch * p.heads_q * (p.head_dim + p.head_dim_v)
    counted = int(visible(p).sum()) * per_score
    assert p.flops() == counted
    halved = mask == {"causal": True} and p.seqlen_q <= p.seqlen_k
    # By the papers' convention half a score less per row: the diagonal is cut in two.
    assert paper_flops(p) == counted - (p.seqlen_q * per_score // 2 if halved else 0)


@pytest.mark.parametrize("seqlen", [1, 64, 512])
def test_the_papers_formula(seqlen: int) -> None:
    """4 · B · H · S² · D, and half of it with a causal mask."""
    full = AttentionProblem(3, seqlen, seqlen, 4, 4, 64, 64, "float16")
    causal = AttentionProblem(3, seqlen, seqlen, 4, 4, 64, 64, "float16", causal=True)
    assert paper_flops(full) == 4 * 3 * 4 * seqlen**2 * 64 == 2 * paper_flops(causal)


def test_the_papers_grid() -> None:
    found = [shape.problem for shape in shapes.paper_shapes()]
    assert len(found) == len(set(found)) == 3 * 3 * 2 * 6
    for p in found:
        assert isinstance(p, AttentionProblem)
        assert p.batch * p.seqlen_q == 16384 and p.heads_q * p.head_dim == 2048
        assert p.seqlen_q == p.seqlen_k and p.heads_q == p.heads_k
    assert {p.seqlen_q for p in found} == {512, 1024, 2048, 4096, 8192, 16384}  # type: ignore
    assert {p.dtype for p in found} == {"float16", "bfloat16", "float8_e4m3fn"}  # type: ignore


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="seqlen does not divide"):
        shapes.paper_shapes(seqlens=[1000])
    with pytest.raises(InvalidArgumentError, match="head dim does not divide"):
        shapes.paper_shapes(head_dims=[96])


def test_grouped_heads_have_the_same_tokens() -> None:
    for shape in shapes.gqa_shapes():
        p = shape.padded
        assert p.batch * p.seqlen_q == 16384 and p.heads_q > p.heads_k
        assert shape.name.startswith("gqa bfloat16 d128 causal")


def test_packed_sequences() -> None:
    found = shapes.varlen_shapes()
    assert found == shapes.varlen_shapes(), "lengths drawn at random are the same every time"
    for shape in found:
        assert isinstance(shape.problem, VarlenProblem) and shape.is_varlen
        assert shape.problem.total_q == shape.problem.total_k == 16384
        assert shape.flops == sum(map(paper_flops, shape.problem.sequences()))


def test_random_lengths() -> None:
    for total, count in ((16, 16), (100, 7), (5, 1)):
        lengths = shapes.random_lengths(total, count, seed=0)
        assert len(lengths) == count and sum(lengths) == total and min(lengths) >= 1
    with pytest.raises(InvalidArgumentError, match="cannot be split"):
        shapes.random_lengths(3, 4, seed=0)


def test_inputs_are_normal_and_the_same_every_time() -> None:
    shape = Shape("papers", AttentionProblem(2, 64, 32, 4, 2, 64, 40, "bfloat16"))
    made, again = (inputs.make(shape, "cpu", seed=3) for _ in range(2))
    assert made.q.shape == (2, 64, 4, 64) and made.v.shape == (2, 32, 2, 40)
    assert made.cu_seqlens is None and made.k.dtype == torch.bfloat16
    for a, b in zip((made.q, made.k, made.v), (again.q, again.k, again.v), strict=True):
        assert torch.equal(a, b)
        assert abs(a.float().mean()) < 0.1 and abs(a.float().std() - 1) < 0.1


def test_packed_inputs() -> None:
    base = AttentionProblem(1, 1, 1, 2, 2, 64, 64, "float8_e4m3fn")
    shape = Shape("varlen", VarlenProblem.of(base, Packing.of_lengths([3, 5], [3, 5])))
    made = inputs.make(shape, "cpu")
    assert made.q.shape == (8, 2, 64) and made.q.dtype == torch.float8_e4m3fn
    assert made.cu_seqlens is not None and made.cu_seqlens.tolist() == [0, 3, 8]
