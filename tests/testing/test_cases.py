"""Random problems: seeded, varied, and reproducible from their printed form."""

from __future__ import annotations

from cute_fa.problem import AttentionProblem
from cute_fa.testing import NAMED_CASES, Case, random_problems


def test_the_same_seed_gives_the_same_cases_and_prefixes():
    assert random_problems(30, 7) == random_problems(30, 7)
    assert random_problems(30, 7)[:10] == random_problems(10, 7)
    assert random_problems(10, 7) != random_problems(10, 8)


def test_two_hundred_cases_cover_every_feature():
    cases = random_problems(200, 0)
    problems = [case.problem for case in cases]
    for what, present in {
        "causal": [p.causal for p in problems],
        "left window": [p.window_left is not None for p in problems],
        "right window": [p.window_right is not None for p in problems],
        "softcap": [p.softcap > 0 for p in problems],
        "GQA": [p.heads_q > p.heads_k > 1 for p in problems],
        "MQA": [p.heads_q > p.heads_k == 1 for p in problems],
        "Dv != D": [p.head_dim != p.head_dim_v for p in problems],
        "Sq > Sk, causal": [p.causal and p.seqlen_q > p.seqlen_k for p in problems],
        "Sq < Sk, causal": [p.causal and p.seqlen_q < p.seqlen_k for p in problems],
        "one row": [p.seqlen_q == 1 for p in problems],
        "scale": [p.softmax_scale is not None for p in problems],
        "rows that see nothing": [p.visible_columns(0) == (0, 0) for p in problems],
    }.items():
        assert any(present) and not all(present), what
    assert len({p.head_dim for p in problems}) == 14
    assert {p.dtype for p in problems} == {"float16", "bfloat16"}
    assert len({case.layouts for case in cases}) > 50


def test_limits_are_kept():
    for case in random_problems(100, 1, max_seqlen=20, max_heads=2, max_batch=1, head_dims=(64,)):
        p = case.problem
        assert 1 <= p.seqlen_q <= 20 and 1 <= p.seqlen_k <= 20
        assert p.heads_q <= 2 and p.batch == 1 and p.head_dim == p.head_dim_v == 64


def test_a_case_can_be_rebuilt_from_its_repro_line():
    for case in (*random_problems(5, 2), *NAMED_CASES.values()):
        assert eval(repr(case), {"Case": Case, "AttentionProblem": AttentionProblem}) == case
        assert repr(case) in case.repro and "\n" not in case.repro
        compile(case.repro, "repro", "exec")
    assert ", generation='fa1', arch='sm_89')" in case.repro_with(generation="fa1", arch="sm_89")


def test_arguments_are_the_problem():
    case = Case("x", random_problems(1, 3)[0].problem)
    assert case.arguments["window_size"] == (case.problem.window_left, case.problem.window_right)
    assert case.arguments["causal"] is case.problem.causal
