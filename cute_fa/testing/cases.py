"""Problems to test on: a few with names, because each has been a bug somewhere, and any number
drawn at random from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import LAYOUTS, length_arguments
from cute_fa.varlen import Packing, VarlenProblem

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Padded inside the kernels: every multiple of 8 must do.
ODD_HEAD_DIMS = (8, 24, 40, 72, 104, 136, 200, 248)


@dataclass(frozen=True)
class Case:
    """One problem with the seed and the layouts of its inputs.

    Attributes:
        layouts: of q, k and v, from ``cute_fa.testing.LAYOUTS``.
    """

    name: str
    problem: AttentionProblem | VarlenProblem
    seed: int = 0
    layouts: tuple[str, str, str] = ("contiguous",) * 3

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``flash_attn_func``, or of ``flash_attn_varlen_func`` for packed
        sequences, that ask for this problem."""
        return call_arguments(self.problem)

    @property
    def repro(self) -> str:
        """One line of Python that runs this case and checks the result."""
        return self.repro_with()

    def repro_with(self, **options: Any) -> str:
        """The same with further arguments of ``flash_attn_func``, as ``generation="fa1"``."""
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        function, types = "flash_attn_func", ""
        if isinstance(self.problem, VarlenProblem):
            function = "flash_attn_varlen_func"
            types = "from cute_fa.varlen import Packing, VarlenProblem; "
        return (
            f"from cute_fa.problem import AttentionProblem; {types}"
            "from cute_fa.testing import Case, check_attention, make_inputs; import cute_fa; "
            f"case = {self!r}; q, k, v, _ = make_inputs(case); "
            f"print(check_attention(*cute_fa.{function}("
            f"q, k, v, return_lse=True, **case.arguments{more}), q, k, v, case.problem))"
        )


def call_arguments(problem: AttentionProblem | VarlenProblem) -> dict[str, Any]:
    """What ``flash_attn_func`` takes beside the tensors to solve a problem; of packed sequences
    also their lengths, as ``flash_attn_varlen_func`` does."""
    lengths = length_arguments(problem) if isinstance(problem, VarlenProblem) else {}
    return {**mask_arguments(problem), **lengths}


def mask_arguments(problem: AttentionProblem | VarlenProblem) -> dict[str, Any]:
    """Masking, softcap and scale of a problem as the public functions and the references take
    them."""
    p = problem.padded if isinstance(problem, VarlenProblem) else problem
    return {
        "causal": p.causal,
        "window_size": (p.window_left, p.window_right),
        "softcap": p.softcap,
        "softmax_scale": p.softmax_scale,
    }


def _problem(**changes: Any) -> AttentionProblem:
    values: dict[str, Any] = {
        "batch": 1,
        "seqlen_q": 64,
        "seqlen_k": 64,
        "heads_q": 2,
        "heads_k": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "dtype": "bfloat16",
    }
    values.update(changes)
    values["head_dim_v"] = changes.get("head_dim_v", values["head_dim"])
    return AttentionProblem(**values)


_NAMED: dict[str, dict[str, Any]] = {
    "square": {},
    "one row": {"seqlen_q": 1, "seqlen_k": 97},
    "one column": {"seqlen_q": 65, "seqlen_k": 1},
    "primes": {"seqlen_q": 113, "seqlen_k": 127, "head_dim": 96},
    "causal": {"causal": True, "seqlen_q": 100, "seqlen_k": 100},
    "causal, longer keys": {"causal": True, "seqlen_q": 37, "seqlen_k": 150},
    # The first Sq - Sk rows see nothing: output 0, LSE -inf.
    "causal, rows that see nothing": {"causal": True, "seqlen_q": 150, "seqlen_k": 37},
    "window": {"seqlen_q": 140, "seqlen_k": 140, "window_left": 17, "window_right": 5},
    # The leading K/V tiles are masked whole for the last rows.
    "window to the left": {"seqlen_q": 150, "seqlen_k": 210, "window_left": 3, "causal": True},
    "window of one": {"seqlen_q": 70, "seqlen_k": 90, "window_left": 0, "window_right": 0},
    "window wider than the keys": {"window_left": 1000, "window_right": 2000},
    "softcap": {"softcap": 5.0, "causal": True, "seqlen_q": 70, "seqlen_k": 70},
    "grouped heads": {"heads_q": 6, "heads_k": 2, "seqlen_q": 33, "seqlen_k": 65},
    "one K/V head for 25": {"heads_q": 25, "heads_k": 1, "seqlen_q": 17, "seqlen_k": 31},
    "wide V": {"head_dim": 40, "head_dim_v": 120},
    "narrow V": {"head_dim": 192, "head_dim_v": 128},
    "scale of zero": {"softmax_scale": 0.0},
    "negative scale": {"softmax_scale": -0.2, "causal": True},
    "half precision": {"dtype": "float16", "causal": True, "seqlen_q": 90, "seqlen_k": 90},
}
NAMED_CASES: dict[str, Case] = {
    name: Case(name, _problem(**changes)) for name, changes in _NAMED.items()
}


def random_problems(
    count: int,
    seed: int,
    *,
    varlen: bool = False,
    max_seqlen: int = 150,
    max_heads: int = 4,
    max_batch: int = 2,
    head_dims: Sequence[int] = HEAD_DIMS + ODD_HEAD_DIMS,
    dtypes: Sequence[str] = ("float16", "bfloat16"),
    layouts: Sequence[str] = LAYOUTS,
) -> list[Case]:
    """``count`` cases over D × Dv × Sq/Sk × masks × GQA × dtype × strides × softcap × scale.

    The same seed gives the same cases, and a longer list begins with the shorter one. Sequence
    lengths lean towards tile borders; every size is at least 1.

    Args:
        varlen: packed sequences instead, up to ``max_batch + 3`` of them, with and without seqused.
            Some have no queries, no keys, or neither.
    """
    rng = random.Random(seed)
    cases = [
        _random_case(
            random.Random(rng.getrandbits(64)),
            f"random-{seed}-{index}",
            sizes=(max_batch, max_seqlen, max_heads),
            head_dims=head_dims,
            dtypes=dtypes,
            layouts=layouts,
        )
        for index in range(count)
    ]
    if not varlen:
        return cases
    return [_packed_case(case, max_seqlen, max_batch + 3) for case in cases]


def _packed_case(case: Case, max_seqlen: int, max_batch: int) -> Case:
    """The same heads, head dims, dtype, mask and layouts with packed sequences."""
    assert isinstance(case.problem, AttentionProblem)
    rng = random.Random(case.seed)
    batch = rng.randint(1, max_batch)
    lengths_q = [_packed_length(rng, max_seqlen) for _ in range(batch)]
    lengths_k = [_packed_length(rng, max_seqlen) for _ in range(batch)]
    if rng.random() < 0.3:
        lengths_k = lengths_q
    used_q, used_k = (
        [rng.choice([length, rng.randint(0, length)]) for length in lengths]
        if rng.random() < 0.4
        else None
        for lengths in (lengths_q, lengths_k)
    )
    packing = Packing.of_lengths(lengths_q, lengths_k, used_q, used_k)
    problem = VarlenProblem.of(case.problem, packing)
    return replace(case, name=case.name.replace("random", "varlen"), problem=problem)


def _packed_length(rng: random.Random, limit: int) -> int:
    return 0 if rng.random() < 0.15 else _seqlen(rng, limit)


def _random_case(
    rng: random.Random,
    name: str,
    *,
    sizes: tuple[int, int, int],
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
) -> Case:
    max_batch, max_seqlen, max_heads = sizes
    heads_k = rng.randint(1, max_heads)
    group = rng.randint(1, max(1, max_heads // heads_k))
    head_dim = rng.choice(head_dims)
    seqlen_q, seqlen_k = _seqlen(rng, max_seqlen), _seqlen(rng, max_seqlen)
    problem = AttentionProblem(
        batch=rng.randint(1, max_batch),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if rng.random() < 0.25 else seqlen_k,
        heads_q=heads_k * group,
        heads_k=heads_k,
        head_dim=head_dim,
        head_dim_v=rng.choice(head_dims) if rng.random() < 0.3 else head_dim,
        dtype=rng.choice(dtypes),
        softcap=rng.choice([0.0, 0.0, 0.0, 1.0, 15.0, 50.0]),
        softmax_scale=rng.choice([None, None, None, 0.125, 1.0, 0.0, -0.3]),
    )
    return Case(
        name=name,
        problem=replace(problem, **_random_mask(rng, max_seqlen)),
        seed=rng.getrandbits(31),
        layouts=(rng.choice(layouts), rng.choice(layouts), rng.choice(layouts)),
    )


def _seqlen(rng: random.Random, limit: int) -> int:
    border = rng.choice([1, 16, 32, 64, 128]) + rng.randint(-1, 1)
    return min(max(1, rng.choice([border, rng.randint(1, limit)])), limit)


def _random_mask(rng: random.Random, limit: int) -> dict[str, Any]:
    def bound() -> int | None:
        return rng.choice([None, 0, 1, rng.randint(0, limit), rng.randint(0, limit)])

    kind = rng.choice(["none", "causal", "causal", "window", "causal window"])
    if kind == "none":
        return {}
    if kind == "causal":
        return {"causal": True}
    if kind == "causal window":
        return {"causal": True, "window_left": bound()}
    return {"window_left": bound(), "window_right": bound()}
