"""Random problems for asynchronous kernels, under every way that copies and products may complete.

Four seeds of each of ten kernels, which between them have all dtypes, every kind of mask, packed
sequences, packed heads, descales of heads and of blocks, and both schedules: 40 problems, 120 runs
on each rung, no hazard; and 16 seeds more that are slow. One to four SMs let persistent CTAs go
through several tiles.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import normal_inputs, quantized_inputs
from cute_fa.varlen import Packing, VarlenProblem
from tests.rungs.bench import Bench

RUNGS = {"fa3": 220, "fa4": 330}  # how long sequences are at most: longer than a tile
SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 20))]


def _base(head_dim: int, dtype: str, **features: Any) -> AttentionProblem:
    return AttentionProblem(1, 1, 1, 1, 1, head_dim, head_dim, dtype, **features)


# name → problem, whether packed sequences and with seqused, query heads that share a tile
KERNELS: dict[str, tuple[AttentionProblem, bool, bool, int]] = {
    "causal": (_base(64, "float16", causal=True), False, False, 1),
    "full": (_base(128, "bfloat16"), False, False, 1),
    "window": (_base(96, "bfloat16", window_left=40, window_right=15), False, False, 1),
    "packed heads": (_base(64, "bfloat16", causal=True), False, False, 4),
    "varlen": (_base(64, "bfloat16", softcap=20.0), True, False, 1),
    "varlen used": (_base(64, "float16", causal=True), True, True, 1),
    "varlen packed heads": (_base(72, "float16", window_left=25), True, True, 8),
    "fp8": (_base(96, "float8_e4m3fn", softcap=15.0), False, False, 1),
    "varlen fp8 packed heads": (_base(64, "float8_e4m3fn", causal=True), True, True, 2),
    "varlen fp8 blocks": (_base(96, "float8_e4m3fn", window_right=30), True, False, 1),
}


def _draw(
    name: str, seed: int, max_seqlen: int
) -> tuple[AttentionProblem | VarlenProblem, int, dict[str, Any]]:
    """A problem, the SMs of the device, and what of the plan is not as picked."""
    base, is_varlen, is_used, group = KERNELS[name]
    rng = random.Random(f"{name} {seed}")
    heads_k = rng.choice((1, 2))
    heads_q = heads_k * (group if group > 1 else rng.choice((1, 1, 2)))
    limit = max_seqlen // group

    def length() -> int:
        return rng.choice((0, 1, rng.randint(2, 40), rng.randint(2, limit + 10)))

    problem = replace(base, heads_q=heads_q, heads_k=heads_k)
    changes = {"packed_group": group} if group > 1 else {}
    sms = rng.randint(1, 4)
    if not is_varlen:
        lengths = {"seqlen_q": max(length(), 1), "seqlen_k": length() + rng.choice((0, 130))}
        return replace(problem, batch=rng.choice((1, 2)), **lengths), sms, changes
    lengths_q = [length() for _ in range(rng.randint(1, 3))]
    lengths_k = [length() for _ in lengths_q]
    lengths_q[-1] += 1
    lengths_k[0] += 1
    used: tuple = (None, None)
    if is_used:
        used = tuple([rng.randint(0, n) for n in sizes] for sizes in (lengths_q, lengths_k))
        used[0][-1] = lengths_q[-1]  # with no row to compute there is no launch
    return VarlenProblem.of(problem, Packing.of_lengths(lengths_q, lengths_k, *used)), sms, changes


@pytest.fixture(params=RUNGS)
def rung(request) -> Bench:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KERNELS)
def test_random_problem(rung, name, seed):
    """Right by the error budget when all completes as late as it may, and the same bits whether it
    does at once or at random."""
    problem, sms, changes = _draw(name, seed, RUNGS[rung.generation])
    if "fp8" in name:
        inputs = quantized_inputs(problem, seed=seed, by_block="blocks" in name)
    else:
        inputs = normal_inputs(problem, seed=seed)
    how = {"sms": sms, **changes}
    rung.check(problem, inputs, completion="late", seed=seed, **how)
    results = []
    for completion in ("eager", "random"):
        out, lse, launch = rung.run(problem, inputs, completion=completion, seed=seed, **how)
        assert launch.hazards == []
        results.append((out.nan_to_num(nan=7.0), lse.nan_to_num(nan=7.0)))
    (out, lse), (other_out, other_lse) = results
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)
