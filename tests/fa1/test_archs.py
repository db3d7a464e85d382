"""FA1 compiles for and runs on every architecture that kernels are built for."""

from __future__ import annotations

import pytest

from cute_fa.build.registry import COMPILED
from cute_fa.problem import AttentionProblem

PROBLEM = AttentionProblem(1, 40, 100, 1, 1, 32, 32, "bfloat16", causal=True)
# Small tiles: this is about the architecture's PTX, not about its memory.
SMALL = {"tile_m": 32, "tile_n": 64, "tile_dv": 32}


@pytest.mark.parametrize("arch", COMPILED)
def test_runs_on(fa1, arch):
    config = fa1.config(PROBLEM, arch, **SMALL)
    assert f".target {arch}\n" in fa1.program(config, arch).ptx
    fa1.check(PROBLEM, arch=arch, **SMALL)
