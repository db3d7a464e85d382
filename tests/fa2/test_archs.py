"""FA2 compiles for and runs on every architecture of the target table."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.target import TARGETS

PROBLEM = AttentionProblem(1, 40, 100, 1, 1, 32, 32, "bfloat16", causal=True)


@pytest.mark.parametrize("arch", TARGETS)
def test_runs_on(fa2, arch):
    """Other architectures get other instructions, such as three-way maxima."""
    assert f".target {arch}\n" in fa2.program(fa2.config(PROBLEM, arch), arch).ptx
    fa2.check(PROBLEM, arch=arch)
