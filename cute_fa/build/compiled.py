"""A compiled kernel: what was asked for, what came out, and the function that launches it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cute_fa.build.host import load_host
from cute_fa.build.resources import KernelResources, kernel_resources
from cute_fa.problem import KernelVariant
from cute_fa.target import Target, get_target


@dataclass(frozen=True, eq=False)
class LaunchableKernel:
    """What a compiled kernel is, wherever it comes from, and the functions that launch it.

    Attributes:
        generation, direction: the rung, "fwd" or "bwd".
        arch: the architecture, e.g. "sm_80"; the PTX's ``.target`` is this.
        variant: what the kernel is specialised for (dtype, head dims, masks).
        config: the kernel's own frozen config (tiles, stages, threads, …).
        kernel_name: the entry symbol in the PTX and the cubin.
        options: the options that the DSL compiled with.
        key: content key: equal keys mean equal artefacts.
    """

    generation: str
    direction: str
    arch: str
    variant: KernelVariant
    config: Any
    kernel_name: str
    options: str
    key: str
    _hosts: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def target(self) -> Target:
        """What it was compiled for."""
        return get_target(self.arch)

    @property
    def label(self) -> str:
        """One line that tells it from its neighbours, e.g. "fa2 fwd sm_80 bfloat16 d128 causal"."""
        return label(self.generation, self.direction, self.arch, self.variant)

    def host(self, backend: str) -> Any:
        """The launch function for "sim" or "cuda": a TVM-FFI function of the kernel's arguments.

        "sim" runs inside ``cute_fa.sim.Device`` (``Device.bind``), "cuda" on the current device
        and stream. Linked or loaded on first use.

        Raises:
            MissingToolError: "cuda" without a CUDA driver; "sim" without a C compiler.
            BundleError: the driver is too old for the bundle's runtime library.
        """
        with self._lock:
            if backend not in self._hosts:
                self._hosts[backend] = self._load_host(backend)
            return self._hosts[backend]

    def _load_host(self, backend: str) -> Any:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Compiled(LaunchableKernel):
    """One kernel compiled for one architecture.

    Attributes:
        ptx: PTX text.
        cubin: ELF bytes for ``arch``.
        toolchain: versions of everything that compiled it.
        host_object: relocatable object with the TVM-FFI launch function.
        directory: where the cache keeps it; None if it is not cached.
    """

    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    toolchain: Mapping[str, str] = field(repr=False)
    host_object: bytes = field(repr=False)
    directory: Path | None = field(default=None, repr=False)

    @cached_property
    def sass(self) -> str:
        """SASS text of the cubin.

        Raises:
            MissingToolError: nvdisasm is not installed.
        """
        from cute_fa.asm import disassemble

        return disassemble(self.cubin)

    @cached_property
    def resources(self) -> KernelResources:
        """Registers, spills, shared memory, threads and occupancy, read from the cubin."""
        return kernel_resources(self.cubin, self.kernel_name, self.config, self.target)

    def _load_host(self, backend: str) -> Any:
        return load_host(backend, self.host_object, self.directory)


def label(generation: str, direction: str, arch: str, variant: KernelVariant) -> str:
    """A kernel's name for people: what, where, dtype, head dims and masks."""
    dims = f"d{variant.head_dim}"
    if variant.head_dim_v != variant.head_dim:
        dims += f"/{variant.head_dim_v}"
    words = [generation, direction, arch, variant.dtype, dims]
    words += [
        word
        for word, present in (
            ("causal", variant.causal),
            ("window-left", variant.has_window_left),
            ("window-right", variant.has_window_right),
            ("softcap", variant.has_softcap),
            ("varlen", variant.is_varlen),
            ("used-q", variant.has_seqused_q),
            ("used-k", variant.has_seqused_k),
            ("block-descales", variant.has_block_descales),
        )
        if present
    ]
    if variant.packed_group > 1:
        words.append(f"packed-{variant.packed_group}")
    return " ".join(words)
