"""What a call costs on the host, measured without a GPU.

The launch code of a real kernel is linked against a CUDA runtime whose functions do nothing, so
that everything is timed but the driver. CPU tensors take the place of a GPU's: the launch code
gets prepared arguments that say "cuda", and passing torch tensors to it is timed with a function
that ignores them.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cute_fa
from cute_fa.bench.timing import Timing
from cute_fa.build.compile import compile
from cute_fa.build.host import load_library
from cute_fa.build.toolchain import INSTALL_CC, c_compiler, link_shared
from cute_fa.errors import CompileError, MissingToolError
from cute_fa.ops import checks, plans
from cute_fa.sim.tensors import to_tvm_ffi

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
SAMPLES, CALLS = 30, 500


def host_cost(*, samples: int = SAMPLES, calls: int = CALLS) -> dict[str, Timing]:
    """Seconds of CPU time per call of ``flash_attn_func`` and of its parts.

    A sample is a mean over ``calls``. CPU time, so that other programs matter little.

    Raises:
        MissingToolError: no C compiler, or the DSL is not installed.
    """
    batch, seqlen, heads, dim = SIZES
    q, k, v = (torch.zeros(batch, seqlen, heads, dim, dtype=torch.bfloat16) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(batch, heads, seqlen)
    scalars = (dim**-0.5, 0.0, 2 * seqlen, 2 * seqlen)
    prepared = (*map(to_tvm_ffi, (q, k, v, out, lse)), *scalars)
    ignore = _function_that_ignores_its_arguments()
    with tempfile.TemporaryDirectory(prefix="cute_fa-") as folder:
        launch_code = _linked_to_nothing(Path(folder))

        def launch(*arguments: Any) -> None:
            ignore(*arguments)
            launch_code(*prepared)

        options = checks.Options(causal=True, backend="sim", arch="sm_80")
        outputs = tuple(plans.pattern(x.shape, x.dtype, x.device) for x in (out, lse))
        with _known(q, k, v, plans.Plan(launch, q.device, outputs, scalars)):
            found = {
                "flash_attn_func, the driver left out": _time(
                    lambda: cute_fa.flash_attn_func(q, k, v, causal=True), samples, calls
                ),
                "launch code alone": _time(lambda: launch_code(*prepared), samples, calls),
                "two results allocated": _time(
                    lambda: [torch.empty_like(x) for x in (out, lse)],
                    samples,
                    calls,
                ),
                "checks of a call of a new kind": _time(
                    lambda: checks.check_call(q, k, v, options), samples, calls
                ),
            }
    return found


@contextlib.contextmanager
def _known(q: Tensor, k: Tensor, v: Tensor, plan: plans.Plan) -> Iterator[None]:
    """Take a causal call with these CPU tensors for known, while the block runs."""
    plans.remember(plans.key_for(q, k, v, causal=True), plan)
    try:
        yield
    finally:
        plans.forget()


def _time(action: Callable[[], Any], samples: int, calls: int) -> Timing:
    for _ in range(calls // 10 + 1):
        action()
    found = []
    for _ in range(samples):
        started = time.thread_time()
        for _ in range(calls):
            action()
        found.append((time.thread_time() - started) / calls)
    return Timing.of(found)


def _linked_to_nothing(folder: Path) -> Any:
    """The host function of FA2's forward, linked to a runtime that does nothing."""
    import tvm_ffi

    compiler = c_compiler()
    if compiler is None:
        raise MissingToolError("measuring the host's cost needs a C compiler", fix=INSTALL_CC)
    source, runtime = folder / "null.c", folder / "libcute_fa_null_runtime.so"
    source.write_text(_NULL_RUNTIME)
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(runtime), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError("the runtime that does nothing cannot be built", got=result.stderr)
    kernel = compile("fa2", arch="sm_80", dtype="bfloat16", head_dim=SIZES[-1], causal=True)
    launch_object, library = folder / "host.o", folder / "host.so"
    launch_object.write_bytes(kernel.host_object)
    ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    link_shared([launch_object], [runtime, ffi], library)
    return load_library(library, runtime)


def _function_that_ignores_its_arguments() -> Callable[..., Any]:
    import tvm_ffi

    def ignore(*arguments: Any) -> None:
        """Stands in where TVM-FFI has no such function; costs a little more."""

    return tvm_ffi.get_global_func("testing.nop", allow_missing=True) or ignore
