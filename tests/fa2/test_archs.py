"""FA2 compiles for and runs on every architecture that kernels are built for."""

from __future__ import annotations

import pytest

from cute_fa.build.registry import COMPILED
from cute_fa.problem import AttentionProblem

PROBLEM = AttentionProblem(1, 40, 100, 1, 1, 32, 32, "bfloat16", causal=True)


@pytest.mark.parametrize("arch", COMPILED)
def test_runs_on(fa2, arch):
    """Other architectures get other instructions, such as three-way maxima."""
    assert f".target {arch}\n" in fa2.program(fa2.config(PROBLEM, arch), arch).ptx
    fa2.check(PROBLEM, arch=arch)
