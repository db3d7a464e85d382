"""Host functions: from the object that was exported to something Python can call.

The DSL exports a kernel's launch code as a relocatable object that calls a small runtime
interface. It is linked once per backend, against the simulator's stand-in or against the DSL's
CUDA runtime, and loaded so that its symbols come from that library whatever else this process
has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cute_fa.build import toolchain
from cute_fa.errors import CompileError, InvalidArgumentError

# Every object exports the same name: each is looked up in its own library only.
HOST_NAME = "cute_fa_host"
BACKENDS = ("sim", "cuda")


def load_host(backend: str, host_object: bytes, directory: Path | None) -> Any:
    """The TVM-FFI function of an exported object, with its symbols from ``backend``'s runtime.

    ``directory`` keeps the linked library for the next process; None, or a directory that is gone,
    means a temporary one. Without a C compiler, "cuda" links in memory through the DSL instead.

    Raises:
        InvalidArgumentError: no such backend.
        MissingToolError: "sim" without a C compiler, or the DSL's runtime library is missing.
        CompileError: linking or loading failed.
    """
    if backend == "sim":
        from cute_fa.sim.runtime import runtime as simulated_runtime

        # The one that is loaded here, whatever the cache directory is by now.
        runtime = simulated_runtime().path
    elif backend == "cuda":
        runtime = toolchain.runtime_library()
        if toolchain.c_compiler() is None:
            return _link_in_memory(host_object, runtime)
    else:
        raise InvalidArgumentError(
            "unknown backend", got=repr(backend), expected=" or ".join(BACKENDS)
        )
    with contextlib.ExitStack() as stack:
        if directory is None or not directory.is_dir():
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cute_fa-")))
        return load_library(_linked(host_object, runtime, directory, backend), runtime)


def _linked(host_object: bytes, runtime: Path, directory: Path, backend: str) -> Path:
    """The linked library in ``directory``: the one there, if it is whole, or a new one.

    Its name carries what it was linked against and a checksum of its own bytes.
    """
    import tvm_ffi

    against = hashlib.sha256(str(runtime).encode()).hexdigest()[:12]
    prefix = f"host-{backend}-{against}-"
    for path in directory.glob(prefix + "*.so"):
        if path.name == prefix + _checksum(path) + ".so":
            return path
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".link-", dir=directory) as folder:
        source, output = Path(folder, "host.o"), Path(folder, "host.so")
        source.write_bytes(host_object)
        ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        toolchain.link_shared([source], [runtime, ffi], output)
        final = directory / f"{prefix}{_checksum(output)}.so"
        output.rename(final)
    return final


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load_library(library: Path, runtime: Path) -> Any:
    """The TVM-FFI function of a linked library whose runtime symbols come from ``runtime``.

    Raises:
        CompileError: it does not load, or holds no such function.
    """
    import tvm_ffi

    _preload(str(runtime))
    try:
        # DEEPBIND: the library's own dependencies come before whatever the process has loaded
        # globally. The real and the stand-in runtime define the same names, and other packages
        # load the real one with RTLD_GLOBAL.
        ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        return tvm_ffi.load_module(str(library))[HOST_NAME]
    except (OSError, RuntimeError, AttributeError) as error:
        raise CompileError(
            "a linked host function does not load",
            got=str(error),
            fix="cute-fa cache clear, or make the bundle again; cute-fa doctor says what is "
            "installed",
        ) from error


@cache
def _preload(runtime: str) -> ctypes.CDLL:
    # Loaded on its own first, so that DEEPBIND does not apply to the runtime library itself.
    return ctypes.CDLL(runtime)


def _link_in_memory(host_object: bytes, runtime: Path) -> Any:
    import tvm_ffi
    from cutlass._mlir._mlir_libs._cutlass_ir._execution_engine import BinaryExecutionEngine

    engine = BinaryExecutionEngine(host_object, [str(runtime)], True)
    address = engine.lookup("__tvm_ffi_" + HOST_NAME)
    return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=engine)
