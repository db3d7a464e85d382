"""Where kernels run, and how one particular kernel of a bundle is run there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cute_fa.build.bundle import Bundle, BundleKernel
from cute_fa.errors import UnsupportedError
from cute_fa.ops import flash_attn_func, flash_attn_varlen_func, sources
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import Target, runs_on
from cute_fa.testing.cases import Case
from cute_fa.testing.inputs import Inputs
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
    def backend(self) -> str:
        return "sim" if self.device == "cpu" else "cuda"

    def runs(self, kernel: BundleKernel) -> bool:
        """Whether the machine code and the shared memory of a kernel fit."""
        fits = kernel.config.smem_bytes <= self.target.smem_per_block_bytes
        return fits and runs_on(kernel.arch, self.target)

    def synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


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

    def run(self, place: Place, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """out and lse of a case, on the place's device."""
        packed = isinstance(case.problem, VarlenProblem)
        function = self.flash_attn_varlen_func if packed else self.flash_attn_func
        arguments = {
            name: value.to(place.device) if isinstance(value, Tensor) else value
            for name, value in case.arguments.items()
        }
        q, k, v = (x.to(place.device) for x in inputs[:3])
        return function(
            *(q, k, v),
            **arguments,
            return_lse=True,
            pack_gqa=self.only.variant.packed_group > 1,
            generation=self.only.generation,
            backend=place.backend,
            arch=self.only.arch if place.backend == "sim" else None,
        )


def runnable(bundle: Bundle, place: Place, role: str | None = "default") -> list[BundleKernel]:
    """The kernels of a bundle that run at a place; of all roles if ``role`` is None."""
    return [k for k in bundle.kernels if place.runs(k) and role in (None, k.role)]
