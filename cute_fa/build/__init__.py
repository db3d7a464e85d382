"""From a problem to a compiled kernel: registry, compiler, cache and host functions."""

from cute_fa.build.cache import KernelCache
from cute_fa.build.compile import compile
from cute_fa.build.compiled import Compiled
from cute_fa.build.parallel import compile_many
from cute_fa.build.registry import KERNELS, KernelEntry, Support, can_run, choose_generation

__all__ = [
    "KERNELS",
    "Compiled",
    "KernelCache",
    "KernelEntry",
    "Support",
    "can_run",
    "choose_generation",
    "compile",
    "compile_many",
]
