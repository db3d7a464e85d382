"""What a call costs on the host, measured without a GPU.

The launch code of real kernels is linked against a CUDA runtime whose functions do nothing, so that
everything is timed but the driver. CPU tensors take the place of a GPU's: the first call of each
kind is checked and kept as on a GPU, and what follows is timed. The launch code gets the torch
tensors of the call, as TVM-FFI passes them, and a few instructions before it write into each that
it is on a GPU.
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
from cute_fa.build.host import HOST_NAME, load_library
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

# Runs before launch code: tensors that say they are on the CPU shall say they are on a GPU. Those
# of torch come as TVM-FFI objects that are made for the call.
_LAUNCH_NAME = "cute_fa_on_gpu"
_CLAIM_GPU = f"""
#include <tvm/ffi/c_api.h>
int __tvm_ffi_{HOST_NAME}(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
int __tvm_ffi_{_LAUNCH_NAME}(
    void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {{
    for (int32_t i = 0; i < count; ++i) {{
        if (arguments[i].type_index != kTVMFFITensor) continue;
        DLTensor *tensor = (DLTensor *)((char *)arguments[i].v_obj + sizeof(TVMFFIObject));
        tensor->device.device_type = kDLCUDA;
    }}
    return __tvm_ffi_{HOST_NAME}(self, arguments, count, result);
}}
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
            return _time(_actions(), samples, calls)


def _actions() -> dict[str, Action]:
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
    shapes = [tuple(torch.cat([x] * count) for x in (q, k, v)) for count in range(1, 9)]
    turn = itertools.cycle(shapes)
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
        "flash_attn_func, eight shapes in turn": lambda: cute_fa.flash_attn_func(
            *next(turn), causal=True
        ),
    }
    for action in public.values():
        for _ in shapes:
            action()
    plan = next(iter(plans._plans.values()))  # of the first call
    results = [plans._empty_on_cpu(*layout) for layout in plan.outputs]
    prepared = [*map(to_tvm_ffi, (q, k, v, *results)), *plan.scalars]
    out, lse = torch.empty_like(q), torch.empty(batch, heads, seqlen)
    options = checks.Options(causal=True)
    return {
        **public,
        "launch code alone": lambda: plan.launch(*prepared),
        "two results allocated": lambda: (torch.empty_like(out), torch.empty_like(lse)),
        "checks of a call of a new kind": lambda: checks.check_call(q, k, v, options),
    }


class _Launches:
    """Kernels whose launch code runs to its end, but for the driver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runtime = _compiled(_NULL_RUNTIME, folder / "libcute_fa_null_runtime.so", "-shared")
        self._claim = _compiled(_CLAIM_GPU, folder / "claim.o", "-c")

    def kernel(self, *of: Any) -> Any:
        """Instead of ``sources.kernel``: the same kernel, linked to a runtime that does nothing."""
        kernel = sources.source(None).kernel(*of[:-1])
        launch = self._linked(kernel)
        return SimpleNamespace(host=lambda backend: launch, config=kernel.config)

    def _linked(self, kernel: Any) -> Any:
        import tvm_ffi

        launch_object = self._folder / f"kernel-{len(list(self._folder.iterdir()))}.o"
        library = launch_object.with_suffix(".so")
        launch_object.write_bytes(kernel.host_object)
        ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        link_shared([launch_object, self._claim], [self._runtime, ffi], library)
        load_library(library, self._runtime)
        return tvm_ffi.load_module(str(library))[_LAUNCH_NAME]


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


def _compiled(text: str, output: Path, kind: str) -> Path:
    import tvm_ffi

    compiler = c_compiler()
    if compiler is None:
        raise MissingToolError("measuring the host's cost needs a C compiler", fix=INSTALL_CC)
    source = output.with_suffix(".c")
    source.write_text(text)
    headers = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    command = [compiler, kind, "-fPIC", "-O1", "-w", *headers, "-o", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError("code for the measurement cannot be built", got=result.stderr)
    return output
