"""Run one case the way ``flash_attn_func`` does, and keep what the run left behind."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cute_fa.errors import MissingToolError

if TYPE_CHECKING:
    from torch import Tensor

    from cute_fa.sim.execute import Launch
    from cute_fa.testing import Case


@dataclass(frozen=True)
class Settings:
    """Where and how a problem runs.

    Attributes:
        generation: "fa1", … or "auto".
        arch: the simulated architecture; on a GPU None.
        backend: "sim" or "cuda".
        completion, checks: as of ``sim.Device``, for "sim".
        seed: of the simulation.
    """

    generation: str = "auto"
    arch: str | None = "sm_80"
    backend: str = "sim"
    completion: str = "eager"
    checks: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What ran and what came out.

    Attributes:
        inputs: q, k, v.
        out, lse: as of ``flash_attn_func``.
        generation, arch: what served the problem.
        compile_seconds: until the kernel was there, compiled or from the cache.
        seconds: of the call, without compiling.
        launches: of the simulation.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    lse: Tensor
    generation: str
    arch: str
    compile_seconds: float
    seconds: float
    launches: list[Launch] = field(default_factory=list)

    @property
    def hazards(self) -> list[Any]:
        return [hazard for launch in self.launches for hazard in launch.hazards]

    def counter(self, name: str) -> int:
        """A counter's sum over the launches."""
        return sum(launch.counters[name] for launch in self.launches)


def run_case(case: Case, settings: Settings) -> Result:
    """Run a case on its own inputs. Hazards are collected, not raised.

    Raises:
        CuteFAError: nothing serves the problem there.
    """
    from cute_fa.ops import checks, launch
    from cute_fa.testing import make_inputs

    q, k, v, _ = make_inputs(case)
    device = None
    if settings.backend == "cuda":
        _require_gpu()
        q, k, v = (x.cuda() for x in (q, k, v))
    else:
        from cute_fa import sim

        assert settings.arch is not None, "the simulator needs an architecture"

        device = sim.Device(
            settings.arch,
            seed=settings.seed,
            completion=settings.completion,
            checks=settings.checks,
            strict=False,
        )
    options = checks.Options(
        **case.arguments,
        generation=settings.generation,
        backend=settings.backend,
        arch=settings.arch,
    )
    call = checks.check_call(q, k, v, options, device=device)
    started = time.monotonic()
    if call.has_work:
        launch.kernel_of(call)
    compiled = time.monotonic()
    out, lse = launch.forward(q, k, v, call, device=device)
    if device is None:
        import torch

        torch.cuda.synchronize()
    return Result(
        inputs=(q, k, v),
        out=out,
        lse=lse,
        generation=call.generation,
        arch=call.target.arch,
        compile_seconds=compiled - started,
        seconds=time.monotonic() - compiled,
        launches=list(device.launches) if device is not None else [],
    )


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MissingToolError(
            "there is no usable GPU",
            got=f"torch {torch.__version__} sees no CUDA device",
            fix="--backend sim; cute-fa doctor says what is missing",
        )
