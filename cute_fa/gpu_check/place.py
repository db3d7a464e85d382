"""Where kernels run, and how one particular kernel of a bundle is run there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cute_fa.build.bundle import Bundle, BundleKernel
from cute_fa.errors import UnsupportedError
from cute_fa.gpu_check.grid import GridInputs
from cute_fa.ops import flash_attn_func, flash_attn_varlen_func, sources
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import Target, runs_on
from cute_fa.testing.cases import Case
from cute_fa.varlen import VarlenProblem


@dataclass(frozen=True)
class Place:
    """A GPU, or the simulator.

    Attributes:
        device: where tensors are, "cuda" or "cpu".
        target: what it is.
    """

    device: str
    target: Target

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def backend(self) -> str:
        return "cuda" if self.is_gpu else "sim"

    def runs(self, kernel: BundleKernel) -> bool:
        """Whether the machine code and the shared memory of a kernel fit."""
        fits = kernel.config.smem_bytes <= self.target.smem_per_block_bytes
        return fits and runs_on(kernel.arch, self.target)

    def synchronize(self) -> None:
        """Wait for everything that was launched; raises what became of it."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def complaint(self) -> str | None:
        """Why the device does nothing more for this process, or None: after an illegal access, for
        one, CUDA refuses everything."""
        try:
            self.synchronize()
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return None


class OneKernel:
    """A source of kernels that has just one, whatever is asked for; and the public functions with
    it, so that a candidate is called exactly as the default is.

    Attributes:
        only: the kernel.
        source_name: by which the public functions know it.
    """

    def __init__(self, only: BundleKernel) -> None:
        self.only = only
        self.source_name = f"{only.name} at {id(only):#x}"
        sources.register(self.source_name, self)

    def choose_generation(
        self, problem: AttentionProblem | VarlenProblem, target: Target, generation: str
    ) -> str:
        return self.only.generation

    def check_variant(self, generation: str, target: Target, variant: KernelVariant) -> None:
        """That the one kernel serves the variant.

        Raises:
            UnsupportedError: it does not.
        """
        if variant != self.only.variant:
            raise UnsupportedError(
                "the one kernel here serves another variant",
                got=str(variant),
                expected=str(self.only.variant),
            )

    def kernel(self, generation: str, arch: str, variant: KernelVariant) -> BundleKernel:
        return self.only

    def flash_attn_func(self, *args: Any, **kwargs: Any) -> Any:
        return flash_attn_func(*args, **kwargs, kernels=self)  # type: ignore[arg-type]

    def flash_attn_varlen_func(self, *args: Any, **kwargs: Any) -> Any:
        return flash_attn_varlen_func(*args, **kwargs, kernels=self)  # type: ignore[arg-type]

    def run(self, place: Place, case: Case, inputs: GridInputs) -> tuple[Tensor, Tensor]:
        """out and lse of a case, on the place's device."""
        return self.bind(place, case, inputs)()

    def bind(
        self, place: Place, case: Case, inputs: GridInputs
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """``run``, with everything brought to the place's device before it is called."""
        packed = isinstance(case.problem, VarlenProblem)
        function = self.flash_attn_varlen_func if packed else self.flash_attn_func
        arguments = {
            name: value.to(place.device) if isinstance(value, Tensor) else value
            for name, value in case.arguments.items()
        }
        there = inputs.to(place.device)
        arguments.update(there.descales.given())
        return functools.partial(
            function,
            *there[:3],
            **arguments,
            return_lse=True,
            pack_gqa=self.only.variant.packed_group > 1,
            generation=self.only.generation,
            backend=place.backend,
            arch=self.only.arch if place.backend == "sim" else None,
        )


def serving(bundle: Bundle, place: Place) -> list[BundleKernel]:
    """The kernels that a bundle's functions launch at a place: defaults, and what tuning chose."""
    tuned = set(bundle.tuned.values())
    return [k for k in runnable(bundle, place) if k.role == "default" or k.name in tuned]


def runnable(bundle: Bundle, place: Place) -> list[BundleKernel]:
    """All kernels of a bundle that run at a place, candidates too."""
    return [kernel for kernel in bundle.kernels if place.runs(kernel)]
