"""``load_bundle``: the public functions with kernels that were compiled ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cute_fa.build.bundle import Bundle, check_driver
from cute_fa.errors import BundleError, InvalidTypeError, MissingToolError
from cute_fa.ops import sources
from cute_fa.ops.functional import flash_attn_func
from cute_fa.ops.varlen import flash_attn_varlen_func
from cute_fa.target import Target, runs_on, target_of_capability


class LoadedBundle(Bundle):
    """A bundle whose kernels can be called. Its files were checked when it was loaded.

    CUDA tensors run on their GPU, with nothing compiled; CPU tensors run the same kernels in the
    simulator, which needs numpy and a C compiler.

    Attributes:
        flash_attn_func, flash_attn_varlen_func: those of the package with ``kernels`` given.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder)
        sources.register(self.source_name, self)
        self.flash_attn_func = _with_kernels(flash_attn_func, self)
        self.flash_attn_varlen_func = _with_kernels(flash_attn_varlen_func, self)

    @property
    def source_name(self) -> str:
        """By which the ``kernels`` argument and torch's graphs know it."""
        return str(self.folder)

    def check_gpu(self) -> Target:
        """The current GPU's target, if kernels of this bundle run there.

        Raises:
            MissingToolError: there is no driver, or torch sees no GPU.
            BundleError: the driver is too old, or no kernel is for this GPU.
        """
        check_driver(self)
        if not torch.cuda.is_available():
            raise MissingToolError(
                "torch sees no GPU",
                got=f"torch {torch.__version__}",
                fix="install a torch that is built for CUDA, and check CUDA_VISIBLE_DEVICES",
            )
        target = target_of_capability(torch.cuda.get_device_capability())
        if not any(runs_on(kernel.arch, target) for kernel in self.kernels):
            raise BundleError(
                "no kernel of this bundle runs on this GPU",
                got=f"{torch.cuda.get_device_name()}, {target.arch}",
                expected=", ".join(self.archs),
                fix=f"make a bundle with cute-fa aot --arch {target.arch}",
            )
        return target


def load_bundle(folder: Path | str) -> LoadedBundle:
    """Load kernels that ``cute-fa aot`` compiled, to run without a compiler and without the DSL.

    Its ``flash_attn_func`` and ``flash_attn_varlen_func`` are those of the package with these
    kernels. Needs torch and apache-tvm-ffi. A bundle is code that runs in this process: load what
    you made or trust; the checksums show damage and nothing else.

    Raises:
        InvalidTypeError: no path.
        BundleError: it is damaged, or was made by or for other versions or another platform.
        MissingToolError: something that it needs is not installed.
    """
    if not isinstance(folder, (str, Path)):
        raise InvalidTypeError(
            "folder names no directory",
            got=f"{folder!r} ({type(folder).__name__})",
            expected="a str or a pathlib.Path",
            fix="pass the directory that cute-fa aot … -o DIR wrote",
        )
    return LoadedBundle(folder)


def _with_kernels(function: Callable[..., Any], bundle: LoadedBundle) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs, kernels=bundle)

    return call
