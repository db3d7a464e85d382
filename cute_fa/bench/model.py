"""A rung's forward, traced in the simulator and replayed on the machine model of its GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cute_fa import sim
from cute_fa.build import compile as compile_kernel
from cute_fa.errors import InvalidArgumentError
from cute_fa.ops.functional import flash_attn_func
from cute_fa.problem import AttentionProblem
from cute_fa.sim.timeline import Timeline, machine_of, replay
from cute_fa.sim.timeline.lanes import role_intervals
from cute_fa.sim.timeline.picture import draw
from cute_fa.testing.inputs import normal_inputs

if TYPE_CHECKING:
    from cute_fa.build import Compiled
    from cute_fa.sim.execute import Launch


@dataclass(frozen=True)
class ModelledForward:
    """What was run, and what the model makes of it.

    Attributes:
        kernel: with its config and resources; launch: with counters and trace.
        roles: warps of a CTA by name; all of them under "all" for kernels without roles.
        ctas: blockIdx of the CTAs whose replay the timeline is: as many as share an SM.
    """

    problem: AttentionProblem
    kernel: Compiled
    launch: Launch
    roles: Mapping[str, range]
    ctas: tuple[tuple[int, int, int], ...]
    timeline: Timeline

    @property
    def machine(self) -> str:
        return self.timeline.model.name

    def picture(self, window: tuple[float, float] | None = None) -> str:
        """The timeline as an SVG, one row per role and engine."""
        p = self.problem
        mask = ", causal" if p.causal else ""
        title = (
            f"{self.kernel.generation.upper()} forward, one CTA: {p.seqlen_q} queries, "
            f"{p.seqlen_k} keys, D = {p.head_dim}, {p.dtype}{mask}"
        )
        note = (
            "Modelled, not measured: a simulator trace, replayed with the constants of "
            f"{self.machine} in cute_fa/sim/timeline/machines.py"
        )
        lanes = role_intervals(self.timeline.intervals, self.roles)
        return draw(lanes, title=title, note=note, window=window)


def model_forward(problem: AttentionProblem, generation: str, arch: str) -> ModelledForward:
    """Run one forward with a trace, and replay the CTAs that share the first SM.

    Raises:
        InvalidArgumentError: no machine model of ``arch``.
        UnsupportedError: the generation cannot run the problem on ``arch``.
    """
    model = machine_of(arch)
    kernel = compile_kernel(
        generation,
        arch=arch,
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        causal=problem.causal,
        window_size=(problem.window_left, problem.window_right),
        softcap=problem.softcap,
    )
    device = sim.Device(arch, trace=True, checks=False, workers=1)
    q, k, v = normal_inputs(problem)[:3]
    with device:
        flash_attn_func(
            q,
            k,
            v,
            softmax_scale=problem.softmax_scale,
            causal=problem.causal,
            window_size=(problem.window_left, problem.window_right),
            softcap=problem.softcap,
            generation=generation,
        )
    (launch,) = device.launches
    if launch.trace is None:
        raise InvalidArgumentError("the launch left no trace", got=launch.kernel)
    resident = max(1, kernel.resources.ctas_per_sm)
    first = launch.trace.waves[0]
    if first.cluster_size > 1:
        resident = first.cluster_size
    ctas = tuple(launch.trace.ctas()[: min(resident, len(first.cta_ids))])
    everyone = {"all": range(first.num_warps)}
    roles = getattr(kernel.config, "roles", everyone)
    return ModelledForward(problem, kernel, launch, roles, ctas, replay(launch.trace, ctas, model))
