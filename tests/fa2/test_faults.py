"""Every barrier, every cp.async group and every wait of FA2 is needed: taking one out shows."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.testing.inputs import Inputs, normal_inputs

SYNCHRONISATION = re.compile(r"\s*(bar\.sync|cp\.async\.(commit|wait)_group)")
# Two row tiles; masked and unmasked blocks in both, more of each than the rings have slots; and a
# negative scale, because only then is Q changed in shared memory before the first barrier.
PROBLEM = AttentionProblem(1, 200, 600, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2)
# Prologue: Q, K, V, K (a ring of two slots) and the wait for Q. Each of the two loop bodies: the
# table of the kernel's docstring. Epilogue: the barrier between staging O and storing it.
PROLOGUE = ["commit", "commit", "commit", "commit", "wait"]
LOOP = ["wait", "bar", "commit", "wait", "bar", "commit"]
EXPECTED = [*PROLOGUE, *LOOP, *LOOP, "bar"]


def _kind(line: str) -> str:
    return re.search(r"bar|commit|wait", line)[0]


def _positions(ptx: str) -> list[int]:
    return [i for i, line in enumerate(ptx.splitlines()) if SYNCHRONISATION.match(line)]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return normal_inputs(PROBLEM)


def test_synchronisation_is_as_documented(fa2):
    ptx = fa2.program(fa2.config(PROBLEM)).ptx
    lines = ptx.splitlines()
    assert [_kind(lines[i]) for i in _positions(ptx)] == EXPECTED


def test_every_deletion_is_reported(fa2, inputs):
    """Under copies that complete late, and under copies that complete at once, by kind.

    Late: all 18 of 18. At once: no copy can be read too early, so only the five barriers remain,
    and they are all reported as races between warps.
    """
    clean = fa2.check(PROBLEM, inputs)
    out, lse, _ = fa2.run(PROBLEM, inputs)
    found = {"eager": Counter(), "late": Counter()}
    rules: dict[str, set[str]] = {"bar": set(), "commit": set(), "wait": set()}
    for index in range(len(EXPECTED)):

        def delete(ptx: str, index: int = index) -> str:
            lines = ptx.splitlines()
            lines[_positions(ptx)[index]] = ""
            return "\n".join(lines)

        for completion, counts in found.items():
            got, got_lse, launch = fa2.run(
                PROBLEM, inputs, completion=completion, strict=False, ptx_transform=delete
            )
            is_wrong = not (torch.equal(got, out) and torch.equal(got_lse, lse))
            counts[EXPECTED[index]] += bool(launch.hazards) or is_wrong
            rules[EXPECTED[index]] |= {hazard.rule for hazard in launch.hazards}
    assert clean.hazards == []
    assert found["late"] == Counter(EXPECTED), (found, rules)
    assert found["eager"]["bar"] == EXPECTED.count("bar"), (found, rules)
