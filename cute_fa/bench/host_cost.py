"""What a call costs on the host, measured without a GPU.

The launch code of real kernels is linked against a CUDA runtime whose functions do nothing, so that
everything is timed but the driver. CPU tensors take the place of a GPU's: the first call of each
kind is checked and kept as on a GPU, and what follows is timed. The launch code gets prepared
arguments that say "cuda"; passing torch tensors to it is timed with a function that ignores them.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import cute_fa
from cute_fa.bench.timing import Timing
from cute_fa.build.host import load_library
from cute_fa.build.toolchain import INSTALL_CC, c_compiler, link_shared
from cute_fa.errors import CompileError, MissingToolError
from cute_fa.ops import checks, plans, sources
from cute_fa.sim.patching import Patches
from cute_fa.sim.tensors import to_tvm_ffi
from cute_fa.target import Target, get_target

# The functions that launch code calls, with their arguments left undeclared.
_NULL_RUNTIME = """
#define NOTHING(name) int name() { return 0; }
NOTHING(_cudaSetDevice) NOTHING(_cudaLibraryLoadData) NOTHING(_cudaLibraryGetKernel)
NOTHING(_cudaKernelSetAttributeForDevice) NOTHING(_cuKernelGetAttribute)
NOTHING(_cudaLaunchKernelEx) NOTHING(_cuTensorMapEncodeTiled)
NOTHING(cuda_dialect_init_library_once) NOTHING(cuda_dialect_unload_library_once)
NOTHING(CuteDSLRT_TVMFFISetRaisedCudaError) NOTHING(CuteDSLRT_TVMFFISetRaisedCudaLaunchError)
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
"""

# B, S, H, D: small, because the C library asks the kernel for large results, where a GPU's
# allocator takes them from what it has.
SIZES = (1, 4, 1, 128)
TARGET = get_target("sm_90a")
SAMPLES, CALLS = 60, 300

Action = Callable[[], Any]


def host_cost(*, samples: int = SAMPLES, calls: int = CALLS) -> dict[str, Timing]:
    """Seconds of CPU time per call of the public functions and of their parts.

    A sample is a mean over ``calls``; what is measured takes turns, so that all meet the same
    machine. CPU time, so that other programs matter little; the minimum is what they spoil least.

    Raises:
        MissingToolError: no C compiler, or the DSL is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="cute_fa-") as folder:
        launches = _Launches(Path(folder))
        with _gpu_stands_in(launches):
            return _time(_actions(launches), samples, calls)


def _actions(launches: _Launches) -> dict[str, Action]:
    """What is measured, by what it is called; the first calls have been made."""
    batch, seqlen, heads, dim = SIZES
    q, k, v = (torch.zeros(batch, seqlen, heads, dim, dtype=torch.bfloat16) for _ in range(3))
    packed = [x[0] for x in (q, k, v)]
    borders = torch.tensor([0, seqlen], dtype=torch.int32)
    fp8 = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    descales = torch.ones(3, batch, heads)
    lengths: dict[str, Any] = {
        "cu_seqlens_q": borders,
        "cu_seqlens_k": borders,
        "max_seqlen_q": seqlen,
        "max_seqlen_k": seqlen,
    }
    scales = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    public: dict[str, Action] = {
        "flash_attn_func": lambda: cute_fa.flash_attn_func(q, k, v, causal=True),
        "flash_attn_varlen_func": lambda: cute_fa.flash_attn_varlen_func(
            *packed, **lengths, causal=True
        ),
        "flash_attn_func, FP8": lambda: cute_fa.flash_attn_func(*fp8, causal=True),
        "flash_attn_func, FP8 with descales": lambda: cute_fa.flash_attn_func(
            *fp8, causal=True, **scales
        ),
    }
    for action in public.values():
        action()
    out, lse = torch.empty_like(q), torch.empty(batch, heads, seqlen)
    options = checks.Options(causal=True)
    return {
        **public,
        "launch code alone": launches.latest,
        "two results allocated": lambda: (torch.empty_like(out), torch.empty_like(lse)),
        "checks of a call of a new kind": lambda: checks.check_call(q, k, v, options),
    }


class _Launches:
    """Kernels whose launch code runs to its end, but for the driver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runtime = _runtime_that_does_nothing(folder)
        self._ignore = _function_that_ignores_its_arguments()
        self.latest: Action = lambda: None

    def kernel(self, *of: Any) -> Any:
        """Instead of ``sources.kernel``: the same kernel, linked to a runtime that does nothing."""
        kernel = sources.source(None).kernel(*of[:-1])
        code, ignore = self._linked(kernel), self._ignore
        prepared: tuple[Any, ...] = ()

        def host(backend: str) -> Callable[..., None]:
            def launch(*arguments: Any) -> None:
                nonlocal prepared
                if not prepared:
                    prepared = tuple(map(to_tvm_ffi, arguments))
                    self.latest = lambda: code(*prepared)
                ignore(*arguments)
                code(*prepared)

            return launch

        return SimpleNamespace(host=host, config=kernel.config)

    def _linked(self, kernel: Any) -> Any:
        import tvm_ffi

        launch_object = self._folder / f"kernel-{len(list(self._folder.iterdir()))}.o"
        library = launch_object.with_suffix(".so")
        launch_object.write_bytes(kernel.host_object)
        ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        link_shared([launch_object], [self._runtime, ffi], library)
        return load_library(library, self._runtime)


@contextlib.contextmanager
def _gpu_stands_in(launches: _Launches) -> Iterator[None]:
    """Take CPU tensors for those of a GPU, while the block runs."""

    def on_gpu(*_: Any) -> str:
        return "cuda"

    def target(*_: Any) -> Target:
        return TARGET

    patches = Patches()
    plans.forget()
    try:
        patches.set(checks, "choose_backend", on_gpu)
        patches.set(checks, "choose_target", target)
        patches.set(sources, "kernel", launches.kernel)
        patches.set(plans, "_empty_on_gpu", plans._empty_on_cpu)
        patches.set(torch._C, "_cuda_getDevice", itertools.repeat(None).__next__)
        yield
    finally:
        patches.undo()
        plans.forget()


def _time(actions: Mapping[str, Action], samples: int, calls: int) -> dict[str, Timing]:
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(samples):
        for name, action in actions.items():
            action()
            started = time.thread_time()
            for _ in range(calls):
                action()
            found[name].append((time.thread_time() - started) / calls)
    return {name: Timing.of(times) for name, times in found.items()}


def _runtime_that_does_nothing(folder: Path) -> Path:
    compiler = c_compiler()
    if compiler is None:
        raise MissingToolError("measuring the host's cost needs a C compiler", fix=INSTALL_CC)
    source, runtime = folder / "null.c", folder / "libcute_fa_null_runtime.so"
    source.write_text(_NULL_RUNTIME)
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(runtime), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError("the runtime that does nothing cannot be built", got=result.stderr)
    return runtime


def _function_that_ignores_its_arguments() -> Callable[..., Any]:
    import tvm_ffi

    def ignore(*arguments: Any) -> None:
        """Stands in where TVM-FFI has no such function; costs a little more."""

    return tvm_ffi.get_global_func("testing.nop", allow_missing=True) or ignore
