"""Running the FA3 forward kernel's PTX in the simulator, with every hazard check on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from cute_fa import sim
from cute_fa.fa3.config import Fa3FwdConfig, pick_fwd
from cute_fa.fa3.fwd import Fa3Fwd, fake_arguments
from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target
from cute_fa.testing.compare import assert_attention_close, assert_bitwise_equal
from cute_fa.testing.inputs import Inputs, normal_inputs

ARCH = "sm_90a"


@cache
def _program(config: Fa3FwdConfig):
    arguments = fake_arguments(config)
    return sim.Device(ARCH, workers=1).compile(
        Fa3Fwd(config), *arguments, options="--enable-tvm-ffi"
    )


class Fa3Bench:
    """Compiles each variant once per test process and runs it on any problem."""

    def config(self, problem: AttentionProblem, **changes) -> Fa3FwdConfig:
        return replace(pick_fwd(problem.variant, get_target(ARCH)), **changes)

    def program(self, config: Fa3FwdConfig):
        return _program(config)

    def run(
        self,
        problem: AttentionProblem,
        inputs: Inputs,
        *,
        completion: str = "eager",
        seed: int = 0,
        strict: bool = True,
        ptx_transform: Callable[[str], str] | None = None,
        **changes: Any,
    ):
        """(out, lse, launch) of one call; outputs are NaN before it."""
        config = self.config(problem, **changes)
        program = self.program(config)
        ptx = program.ptx if ptx_transform is None else ptx_transform(program.ptx)
        device = sim.Device(ARCH, completion=completion, seed=seed, strict=strict, workers=1)
        rows = (problem.batch, problem.seqlen_q, problem.heads_q)
        out = torch.full((*rows, problem.head_dim_v), math.nan, dtype=inputs.q.dtype)
        lse = torch.full((rows[0], rows[2], rows[1]), math.nan)
        window = (-1 if b is None else b for b in (problem.window_left, problem.window_right))
        device.bind(program.compiled, ptx)(
            *(inputs.q, inputs.k, inputs.v, out, lse),
            *(problem.scale, problem.softcap, *window),
        )
        (launch,) = device.launches
        assert launch.smem_bytes == config.smem_bytes
        assert launch.block[0] == config.num_threads
        return out, lse, launch

    def check(self, problem: AttentionProblem, inputs: Inputs | None = None, **how: Any):
        """Run, hold the result to its error budget, and exactly where that is known; the launch."""
        inputs = inputs or normal_inputs(problem)
        out, lse, launch = self.run(problem, inputs, **how)
        assert launch.hazards == []
        assert_attention_close(out, lse, inputs.q, inputs.k, inputs.v, problem)
        if inputs.expected is not None:
            assert_bitwise_equal(out, inputs.expected, "out")
        return launch


@pytest.fixture(scope="session")
def fa3() -> Fa3Bench:
    return Fa3Bench()
