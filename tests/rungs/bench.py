"""Any rung's forward kernel, its PTX run in the simulator with every hazard check on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from cute_fa import sim
from cute_fa.build.compile import Request, compile_request
from cute_fa.build.registry import find
from cute_fa.problem import AttentionProblem, KernelVariant, out_dtype
from cute_fa.quant import QuantizedQKV
from cute_fa.target import get_target
from cute_fa.testing.compare import assert_bitwise_equal, check_attention
from cute_fa.testing.inputs import TORCH_DTYPES, Inputs, length_arguments, normal_inputs
from cute_fa.varlen import VarlenProblem
from tests.rungs.spills import assert_no_spills

Problem = AttentionProblem | VarlenProblem


@dataclass(frozen=True)
class Program:
    """A compiled kernel.

    Attributes:
        compiled: its host function, as ``sim.Device.bind`` takes it.
        ptx: its PTX.
    """

    compiled: Any
    ptx: str


@cache
def _program(generation: str, config: Any, arch: str) -> Program:
    own = asdict(config)
    own["causal"] = config.is_causal
    features = {field.name: own[field.name] for field in fields(KernelVariant) if field.name in own}
    entry, variant, target = find(generation), KernelVariant(**features), get_target(arch)
    request = Request(entry, variant, target, asdict(config))
    assert request.config == config
    kernel = compile_request(request)
    if config == entry.config(variant, target, {}):
        assert_no_spills(kernel)
    return Program(kernel.host("sim"), kernel.ptx)


class Bench:
    """Compiles each plan of a rung once, spilling nothing, and runs it on any problem."""

    def __init__(self, generation: str, arch: str) -> None:
        self.generation = generation
        self.arch = arch

    def config(self, problem: Problem, arch: str | None = None, **changes: Any) -> Any:
        """The rung's plan for a problem, with some of its fields changed."""
        target = get_target(arch or self.arch)
        variant = problem.variant
        if changes.pop("has_block_descales", False):
            variant = replace(variant, has_block_descales=True)
        return find(self.generation).config(variant, target, changes)

    def program(self, config: Any, arch: str | None = None) -> Program:
        return _program(self.generation, config, arch or self.arch)

    def run(
        self,
        problem: Problem,
        inputs: Inputs | QuantizedQKV,
        *,
        arch: str | None = None,
        completion: str = "eager",
        seed: int = 0,
        strict: bool = True,
        sms: int | None = None,
        checks: bool | Collection[str] = True,
        ptx_transform: Callable[[str], str] | None = None,
        **changes: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """(out, lse, launch) of one call; outputs and workspace are NaN before it.

        Args:
            inputs: in FP8 with descales, or those are 1.
            sms: SMs of the simulated device, if not those of the architecture's best-known part;
                persistent kernels launch as many CTAs.
            checks: hazard rules, as ``sim.Device`` takes them.
        """
        descales = _descales(problem, inputs)
        if isinstance(inputs, QuantizedQKV) and inputs.q_descale.ndim == 3:
            changes["has_block_descales"] = True
        config = self.config(problem, arch, **changes)
        program = self.program(config, arch)
        ptx = program.ptx if ptx_transform is None else ptx_transform(program.ptx)
        target = get_target(arch or self.arch)
        if sms is not None:
            target = replace(target, sm_count=sms)
        device = sim.Device(
            target, completion=completion, seed=seed, strict=strict, checks=checks, workers=1
        )
        if isinstance(problem, VarlenProblem):
            p, outer, rows = problem.padded, (), problem.total_q
            lengths = list(length_arguments(problem).values())
            of_sequences = (*lengths[:2], *lengths[4:], lengths[2])
        else:
            p, outer, rows, of_sequences = problem, (problem.batch,), problem.seqlen_q, ()
        of_out = TORCH_DTYPES[out_dtype(p.dtype)]
        out = torch.full((*outer, rows, p.heads_q, p.head_dim_v), math.nan, dtype=of_out)
        lse = torch.full((*outer, p.heads_q, rows), math.nan)
        shapes = [w.shape for w in config.workspace(p.batch, rows, p.heads_q)]
        window = (-1 if b is None else b for b in (p.window_left, p.window_right))
        device.bind(program.compiled, ptx)(
            *(*inputs[:3], out, lse, *(torch.full(shape, math.nan) for shape in shapes)),
            *(p.scale, p.softcap, *window, *descales, *of_sequences),
        )
        (launch,) = device.launches
        assert launch.smem_bytes == config.smem_bytes
        assert launch.block[0] == config.num_threads
        return out, lse, launch

    def check(
        self, problem: Problem, inputs: Inputs | QuantizedQKV | None = None, **how: Any
    ) -> Any:
        """Run and ``assert_right``; the launch."""
        inputs = inputs or normal_inputs(problem)
        out, lse, launch = self.run(problem, inputs, **how)
        self.assert_right(problem, inputs, out, lse, launch)
        return launch

    def assert_right(
        self,
        problem: Problem,
        inputs: Inputs | QuantizedQKV,
        out: torch.Tensor,
        lse: torch.Tensor,
        launch: Any,
    ) -> None:
        """No hazard; the result within its error budget, and exact where that is known.

        Rows of packed tensors that do not count must have been left alone.
        """
        assert launch.hazards == []
        if isinstance(problem, VarlenProblem):
            idle = _idle_rows(problem)
            assert out[idle].isnan().all() and lse[:, idle].isnan().all()
            out[idle], lse[:, idle] = 0.0, -math.inf
        is_quantized = isinstance(inputs, QuantizedQKV)
        report = check_attention(
            *(out, lse, *inputs[:3], problem),
            descales=inputs[3:] if is_quantized else None,
            exp2_error=find(self.generation).exp2_error,
        )
        assert report.ok, str(report)
        if not is_quantized and inputs.expected is not None:
            assert_bitwise_equal(out, inputs.expected, "out")


def _descales(problem: Problem, inputs: Inputs | QuantizedQKV) -> tuple[torch.Tensor, ...]:
    """What a kernel takes beside FP8 inputs; nothing for others."""
    p = problem.padded if isinstance(problem, VarlenProblem) else problem
    if p.dtype != "float8_e4m3fn":
        return ()
    if isinstance(inputs, QuantizedQKV):
        return tuple(inputs[3:])
    return (torch.ones(p.batch, p.heads_k),) * 3


def _idle_rows(problem: VarlenProblem) -> torch.Tensor:
    """(Tq) bool, True in rows of q that do not count."""
    idle = torch.ones(problem.total_q, dtype=torch.bool)
    for rows in problem.require_packing().rows_q:
        idle[rows.start : rows.stop] = False
    return idle
