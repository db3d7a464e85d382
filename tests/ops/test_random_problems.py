"""Twenty problems drawn at random on FA2, five of them on FA1: within the error budget, without a
hazard.

Compiling dominates: nearly every problem is a variant of its own, at two seconds each.
"""

from __future__ import annotations

import pytest

from cute_fa import flash_attn_func
from cute_fa.ops import last_launches
from cute_fa.testing import assert_attention_close, make_inputs, random_problems

CASES = random_problems(20, 2026, max_seqlen=140, max_heads=4, max_batch=2)


@pytest.mark.parametrize(
    ("generation", "case"),
    [*(("fa2", case) for case in CASES), *(("fa1", case) for case in CASES[::4])],
    ids=str,
)
def test_random_problem(generation, case):
    q, k, v, _ = make_inputs(case)
    out, lse = flash_attn_func(q, k, v, return_lse=True, generation=generation, **case.arguments)
    repro = case.repro_with(generation=generation)
    report = assert_attention_close(out, lse, q, k, v, case.problem, repro=repro)
    assert report.bound_ratio <= 1.0, report
    (launch,) = last_launches()
    assert launch.hazards == []
