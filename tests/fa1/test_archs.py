"""FA1 compiles for and runs on every architecture of the target table."""

from __future__ import annotations

import math

import pytest
import torch

from cute_fa import sim
from cute_fa.fa1.config import pick_fwd
from cute_fa.fa1.fwd import Fa1Fwd, fake_arguments
from cute_fa.problem import AttentionProblem
from cute_fa.target import TARGETS
from cute_fa.testing.compare import assert_attention_close
from cute_fa.testing.inputs import normal_inputs


@pytest.mark.parametrize("arch", TARGETS)
def test_runs_on(arch):
    problem = AttentionProblem(1, 40, 100, 1, 1, 32, 32, "bfloat16", causal=True)
    # Small tiles: this is about the architecture's PTX, not about its memory.
    config = pick_fwd(problem.variant, TARGETS[arch]).with_tiles(32, 64)
    device = sim.Device(arch, workers=1)
    arguments = fake_arguments(config)
    program = device.compile(Fa1Fwd(config), *arguments, options="--enable-tvm-ffi")
    assert f".target {arch}" in program.ptx
    q, k, v = normal_inputs(problem)[:3]
    out, lse = torch.full_like(q, math.nan), torch.full((1, 1, 40), math.nan)
    workspace = [torch.full(w.shape, math.nan) for w in config.workspace(1, 40, 1)]
    program(q, k, v, out, lse, *workspace, problem.scale, 0.0, -1, -1)
    assert device.launches[0].hazards == []
    assert_attention_close(out, lse, q, k, v, problem)
