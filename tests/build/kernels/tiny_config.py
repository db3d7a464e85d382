"""Config of the tests' own kernel, ``y = factor · x``; imports no DSL, as a rung's config."""

from __future__ import annotations

from dataclasses import dataclass

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant
from cute_fa.target import Target


@dataclass(frozen=True)
class TinyConfig:
    dtype: str
    head_dim: int
    num_threads: int = 128
    smem_bytes: int = 0
    factor: float = 2.0
    fault: str = ""
    log: str = ""

    def __post_init__(self) -> None:
        if self.num_threads % 32:
            raise InvalidArgumentError("num_threads is not whole warps", got=self.num_threads)


def pick_fwd(variant: KernelVariant, target: Target) -> TinyConfig:
    if variant.has_softcap:
        raise UnsupportedError("tiny has no softcap", alternatives=["fa2"])
    return TinyConfig(variant.dtype, variant.head_dim)


def pick_wide(variant: KernelVariant, target: Target) -> TinyConfig:
    """Serves head dim 128 only, as a rung that is better on a narrow field would."""
    if variant.head_dim != 128:
        raise UnsupportedError("only D 128")
    return TinyConfig(variant.dtype, variant.head_dim)
