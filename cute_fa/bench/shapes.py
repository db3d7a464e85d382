"""What is timed: the shapes of the FlashAttention papers, grouped heads, and packed sequences.

FlashAttention-2 (section 4.1) and -3 (section 4.1): 16k tokens in a batch whatever the sequence
length, a hidden dimension of 2048, head dims 64, 128 and 256, with and without a causal mask.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import AttentionProblem
from cute_fa.varlen import Packing, VarlenProblem

TOKENS = 16384
HIDDEN = 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
SETS = ("papers", "gqa", "varlen")
_LENGTHS_SEED = 5


@dataclass(frozen=True)
class Shape:
    """One problem to time.

    Attributes:
        group: one of ``SETS``.
        problem: dense, or packed sequences.
    """

    group: str
    problem: AttentionProblem | VarlenProblem

    @property
    def padded(self) -> AttentionProblem:
        """The problem; of packed sequences, with each as long as the longest."""
        problem = self.problem
        return problem.padded if isinstance(problem, VarlenProblem) else problem

    @property
    def is_varlen(self) -> bool:
        return isinstance(self.problem, VarlenProblem)

    @property
    def flops(self) -> int:
        """Matrix-multiply FLOPs by the papers' convention."""
        if isinstance(self.problem, VarlenProblem):
            return sum(map(paper_flops, self.problem.sequences()))
        return paper_flops(self.problem)

    @property
    def name(self) -> str:
        """One line, e.g. "papers bfloat16 d128 causal b8 s2048 h16/16"."""
        p = self.padded
        words = [self.group, p.dtype, f"d{p.head_dim}"]
        if p.causal:
            words.append("causal")
        length = f"s{p.seqlen_k}" if p.seqlen_q == p.seqlen_k else f"s{p.seqlen_q}×{p.seqlen_k}"
        words += [f"b{p.batch}", length, f"h{p.heads_q}/{p.heads_k}"]
        return " ".join(words)


def paper_flops(problem: AttentionProblem) -> int:
    """FLOPs of the two products, as the papers count them: 2·(D + Dv) per visible score.

    Where causality is the only mask and no row is empty (Sq ≤ Sk), the diagonal counts by half,
    so that a square problem has just half the FLOPs of an unmasked one (4·B·H·S²·D). Any other
    mask is counted exactly.
    """
    p = problem
    scores2 = 2 * p.score_count()
    if p.window == (None, 0) and p.seqlen_q <= p.seqlen_k:
        scores2 -= p.seqlen_q
    return p.batch * p.heads_q * (p.head_dim + p.head_dim_v) * scores2


def paper_shapes(
    dtypes: Sequence[str] = DTYPES,
    head_dims: Sequence[int] = HEAD_DIMS,
    seqlens: Sequence[int] = SEQLENS,
    causal: Sequence[bool] = (False, True),
) -> list[Shape]:
    """The papers' grid: batch · S = 16k tokens, heads · D = 2048."""
    shapes = []
    for dtype in dtypes:
        for dim in head_dims:
            for masked in causal:
                for seqlen in seqlens:
                    sizes = (_share(TOKENS, seqlen, "seqlen"), seqlen, seqlen)
                    heads = _share(HIDDEN, dim, "head dim")
                    problem = AttentionProblem(*sizes, heads, heads, dim, dim, dtype, causal=masked)
                    shapes.append(Shape("papers", problem))
    return shapes


def gqa_shapes(dtype: str = "bfloat16", seqlens: Sequence[int] = (2048, 8192)) -> list[Shape]:
    """Causal, D 128: 32 query heads on 8 K/V heads, 64 on 8, and 32 on 1."""
    return [
        Shape(
            "gqa",
            AttentionProblem(TOKENS // s, s, s, hq, hk, 128, 128, dtype, causal=True),
        )
        for hq, hk in ((32, 8), (64, 8), (32, 1))
        for s in seqlens
    ]


def varlen_shapes(dtype: str = "bfloat16", tokens: int = TOKENS) -> list[Shape]:
    """16 heads of D 128 over 16k packed tokens: equal lengths, lengths drawn at random (the same
    every time), and one long sequence among short ones."""
    short = tokens // 32
    batches = (
        [tokens // 8] * 8,
        random_lengths(tokens, 16, _LENGTHS_SEED),
        [tokens // 2, *([short] * 16)],
    )
    shapes = []
    for lengths in batches:
        for causal in (False, True):
            base = AttentionProblem(1, 1, 1, 16, 16, 128, 128, dtype, causal=causal)
            packing = Packing.of_lengths(lengths, lengths)
            shapes.append(Shape("varlen", VarlenProblem.of(base, packing)))
    return shapes


def random_lengths(total: int, count: int, seed: int) -> list[int]:
    """``count`` lengths of at least 1 that add up to ``total``."""
    if not 0 < count <= total:
        raise InvalidArgumentError(
            "tokens cannot be split so", got=f"{total} into {count}", expected="1 ≤ count ≤ total"
        )
    borders = sorted(random.Random(seed).sample(range(1, total), count - 1))
    return [stop - start for start, stop in zip([0, *borders], [*borders, total], strict=True)]


def _share(total: int, part: int, what: str) -> int:
    if part < 1 or total % part:
        raise InvalidArgumentError(
            f"{what} does not divide the papers' {total}",
            got=part,
            expected=f"a divisor of {total}",
        )
    return total // part
