"""Run one case the way ``flash_attn_func`` does, and keep what the run left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.errors import InvalidArgumentError, MissingToolError

if TYPE_CHECKING:
    from torch import Tensor

    from cute_fa.ops.checks import Call, Options
    from cute_fa.sim.device import Device
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
        CuteFAError: nothing serves the problem there, or it does not fit into memory.
    """
    from cute_fa.ops import checks, launch
    from cute_fa.testing import make_inputs
    from cute_fa.testing.cases import mask_arguments

    # Inputs are drawn in fp32 and rounded.
    require_memory("inputs and outputs", 3 * case.problem.ideal_hbm_bytes())
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
        **mask_arguments(case.problem),
        generation=settings.generation,
        backend=settings.backend,
        arch=settings.arch,
    )
    call, forward = _checked(case, (q, k, v), options, device)
    started = time.monotonic()
    if call.has_work:
        launch.kernel_of(call)
    compiled = time.monotonic()
    out, lse = forward()
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


def _checked(
    case: Case, tensors: tuple[Tensor, Tensor, Tensor], options: Options, device: Device | None
) -> tuple[Call, Callable[[], tuple[Tensor, Tensor]]]:
    """The checked call, and what runs it."""
    from cute_fa.ops import checks, launch, varlen_checks
    from cute_fa.testing import length_arguments
    from cute_fa.varlen import VarlenProblem

    if not isinstance(case.problem, VarlenProblem):
        call = checks.check_call(*tensors, options, device=device)
        return call, lambda: launch.forward(*tensors, call, device=device)
    place = tensors[0].device
    lengths = varlen_checks.Lengths(
        **{
            name: value.to(place) if hasattr(value, "to") else value
            for name, value in length_arguments(case.problem).items()
        }
    )
    call = varlen_checks.check_varlen_call(*tensors, lengths, options, device=device)
    return call, lambda: launch.forward(*tensors, call, lengths.tensors, device=device)


def require_memory(what: str, num_bytes: int) -> None:
    """That this machine could hold ``num_bytes``: an allocation that is refused, or that has the
    process killed, says less.

    Raises:
        InvalidArgumentError: it has less memory than that.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text.isdecimal():
        memory = min(memory, int(text))
    if num_bytes > memory:
        raise InvalidArgumentError(
            f"{what} do not fit into memory",
            got=f"about {num_bytes / 2**30:,.0f} GiB",
            expected=f"at most {memory / 2**30:,.0f} GiB",
            fix="use shorter sequences, fewer heads or a smaller batch",
        )


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MissingToolError(
            "there is no usable GPU",
            got=f"torch {torch.__version__} sees no CUDA device",
            expected="a CUDA device, its driver, and a torch built for CUDA",
            fix="--backend sim; cute-fa doctor says what is missing",
        )
