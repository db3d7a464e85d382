"""Hooks into the CuTe DSL and the CUDA bindings while a simulated device is entered.

The DSL reads its environment once and keeps the answers on its singletons, so the architecture and
the runtime library are set there, not in variables. What is replaced, and why:

- each DSL's ``envar``: architecture, runtime library, no cache on disk (its entries hold no PTX);
- what links a compiled module: see ``linking``;
- ``CompileOptions.apply_envar_settings``: ask for PTX and cubin, into a private directory;
- ``Compiler.compile``: take the PTX, known from then on by the digest of its cubin, which the host
  code hands to the runtime when it loads its kernels;
- ``runtime._Tensor``: CPU tensors become CUDA tensors (DLPack);
- the calls of compiled functions: their launches go to the device;
- the CUDA driver bindings and ``HardwareInfo``: answer for the simulated device.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa import env
from cute_fa.errors import CompileError, UnsupportedError
from cute_fa.sim import cuda_driver, linking, tensors, torch_cuda
from cute_fa.sim.patching import Patches
from cute_fa.sim.runtime import image_digest, runtime
from cute_fa.target import Target

if TYPE_CHECKING:
    from cute_fa.sim.device import Device

# cute.compile is not thread-safe, and fails silently: the DSL keeps the state of the compilation on
# its singleton. Whoever compiles in this process holds this lock.
compile_lock = threading.RLock()

_devices: list[Device] = []  # entered, the innermost last
_settings: list[Patches] = []  # what each of them changed on the DSL
_hooks: Patches | None = None
_state_lock = threading.RLock()
_captured: dict[str, str] = {}  # digest of a cubin → its PTX


def enter(device: Device) -> None:
    """Make ``device`` the one that the DSL and torch.cuda speak of."""
    global _hooks
    with _state_lock:
        if _hooks is None:
            hooks = Patches()
            with ExitStack() as undo:
                undo.callback(hooks.undo)
                _install(hooks)
                undo.pop_all()
            _hooks = hooks
        settings = Patches()
        _set_architecture(settings, device.target)
        _settings.append(settings)
        _devices.append(device)


def leave(device: Device) -> None:
    """Undo the latest `enter` of ``device``; the last one out removes every hook."""
    global _hooks
    with _state_lock:
        if not _devices or _devices[-1] is not device:
            raise UnsupportedError(
                "simulated devices must be left in the reverse order of entering",
                got=repr(device),
                expected=repr(_devices[-1]) if _devices else "no device to leave",
            )
        _devices.pop()
        _settings.pop().undo()
        if not _devices and _hooks is not None:
            _hooks.undo()
            _hooks = None


def is_entered() -> bool:
    return bool(_devices)


def current() -> Device:
    """The innermost entered device; hooks exist only while there is one."""
    return _devices[-1]


def captured_ptx(digest: str) -> str | None:
    """PTX of the cubin with this digest, if it was compiled for a simulated device.

    Programs that keep compiled kernels on disk run them in later processes, so PTX is kept there
    too (under the cache directory, unless ``CUTE_FA_CACHE`` switches it off).
    """
    text = _captured.get(digest)
    if text is None and env.cache_enabled():
        path = _ptx_path(digest)
        if path.exists():
            text = _captured[digest] = path.read_text()
    return text


def _keep_ptx(digest: str, text: str) -> None:
    _captured[digest] = text
    path = _ptx_path(digest)
    if not env.cache_enabled() or path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(scratch, path)


def _ptx_path(digest: str) -> Path:
    return env.cache_dir() / "sim" / "ptx" / f"{digest}.ptx"


_capturing: list[list[str]] = []


def compile(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """``cute.compile`` for the entered device; returns the compiled function and its PTX texts."""
    import cutlass.cute as cute

    with compile_lock:
        texts: list[str] = []
        _capturing.append(texts)
        try:
            return cute.compile(fn, *args, **kwargs), texts
        finally:
            _capturing.pop()


# --- Settings of one device ---


def _set_architecture(patches: Patches, target: Target) -> None:
    for dsl in _dsl_singletons():
        patches.set(dsl.envar, "_arch", target.arch)


def _dsl_singletons() -> list[Any]:
    import cutlass.cute  # noqa: F401  (creates the singletons)
    from cutlass.base_dsl.dsl import DSLSingletonMeta

    return [dsl for dsl in DSLSingletonMeta._instances.values() if hasattr(dsl, "envar")]


# --- Hooks ---


def _install(patches: Patches) -> None:
    for dsl in _dsl_singletons():
        patches.set(dsl.envar, "shared_libs", str(runtime().prefixed_path))
        patches.set(dsl.envar, "disable_file_caching", True)
    linking.install(patches)
    _hook_compiler(patches)
    _hook_tensors(patches)
    _hook_calls(patches)
    patches.set(runtime(), "ambient", lambda: current().ambient_call())
    cuda_driver.install(patches, lambda: current().target)
    torch_cuda.install(patches, lambda: current().target)


@functools.cache
def _dump_directory() -> tempfile.TemporaryDirectory[str]:
    """Where the DSL writes PTX and cubins, removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cute-fa-sim-")


def _hook_compiler(patches: Patches) -> None:
    from cutlass.base_dsl import compiler

    options_class: Any = compiler.CompileOptions
    wanted = threading.local()
    # The DSL keeps the options of a compilation for the next one: take back what is asked for here.
    asked_for: list[Any] = []
    apply_settings = options_class.apply_envar_settings

    def take_back() -> None:
        while asked_for:
            asked_for.pop().value = False

    @functools.wraps(apply_settings)
    def apply_envar_settings(self: Any, envar: Any, function_name: str) -> None:
        take_back()
        apply_settings(self, envar, function_name)
        # Mangled names can be longer than a file name may be.
        short_name = hashlib.sha256(function_name.encode()).hexdigest()[:24]
        arch = self.gpu_arch or envar.arch
        for kind, extension in ((compiler.KeepPTX, "ptx"), (compiler.KeepCUBIN, "cubin")):
            option = self.options[kind]
            if not option.value:
                option.value = True
                asked_for.append(option)
                self._set_artifact_dump_paths(
                    option,
                    _dump_directory().name,
                    short_name,
                    arch,
                    extension,
                    f"full_{extension}_path",
                )
        wanted.name = short_name

    run_passes = compiler.Compiler.compile

    @functools.wraps(run_passes)
    def compile_module(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(wanted, "name", None)
        for path in _dumps(name):
            path.unlink()
        module = run_passes(self, *args, **kwargs)
        _capture(_dumps(name))
        return module

    patches.on_undo(take_back)
    patches.set(options_class, "apply_envar_settings", apply_envar_settings)
    patches.set(compiler.Compiler, "compile", compile_module)


def _dumps(name: str | None) -> list[Path]:
    """What the DSL has written of a function. The names go on with the architecture, for which the
    toolkit may have another name than the one asked for (sm_101a is sm_110a)."""
    return [] if name is None else sorted(Path(_dump_directory().name).glob(f"{name}.*"))


def _capture(paths: Sequence[Path]) -> None:
    """Keep the PTX that the compiler has just written; a host-only function has none."""
    if not paths:
        return
    text = "".join(path.read_text() for path in paths if path.suffix == ".ptx")
    cubin = b"".join(path.read_bytes() for path in paths if path.suffix == ".cubin")
    if ".version" not in text or not cubin.startswith(b"\x7fELF"):
        raise CompileError(
            "the compiler did not hand out the PTX and cubin of a kernel",
            got=f"PTX of {len(text)} characters, cubin of {len(cubin)} bytes",
            expected="PTX text with .version, and an ELF file",
        )
    _keep_ptx(image_digest(cubin), text)
    if _capturing:
        _capturing[-1].append(text)


def _hook_tensors(patches: Patches) -> None:
    from cutlass.cute import runtime as cute_runtime

    tensors.wrap_exchange_api(patches)
    make = cute_runtime._Tensor.__init__

    @functools.wraps(make)
    def __init__(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> None:
        source = tensor
        if tensors.is_host_tensor(tensor):
            tensor = tensors.DeviceView(tensor)
        make(self, tensor, *args, **kwargs)
        self._cute_fa_source = source

    patches.set(cute_runtime._Tensor, "__init__", __init__)


def _hook_calls(patches: Patches) -> None:
    from cutlass.base_dsl import jit_executor
    from cutlass.base_dsl.dsl import BaseDSL
    from cutlass.cutlass_dsl import cuda_jit_executor

    legacy: Any = cuda_jit_executor.CudaDialectJitCompiledFunction
    patches.set(legacy, "num_devices", 1)
    load_library = legacy._load_cuda_library

    @functools.wraps(load_library)
    def _load_cuda_library(self: Any) -> list[Any]:
        load_library(self)
        return []  # the handles are ours: the CUDA runtime must not be asked to unload them

    patches.set(legacy, "_load_cuda_library", _load_cuda_library)
    for owner in (legacy, jit_executor.JitExecutor):
        patches.set(owner, "__call__", _on_device(owner.__call__))
    patches.set(BaseDSL, "_func", _direct_calls_on_device(BaseDSL._func))
    try:
        from cutlass.cutlass_dsl import tvm_ffi_provider
    except ImportError:  # apache-tvm-ffi is not installed: there are no such functions
        return
    for owner in (
        tvm_ffi_provider.TVMFFIJitCompiledFunction,
        tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs,
    ):
        patches.set(owner, "__call__", _on_device(owner.__call__, tensors.to_tvm_ffi))
    _hook_errors(patches)


def _hook_errors(patches: Patches) -> None:
    """Host code that C++ starts fails with what the simulator raised, not with its error code."""
    from tvm_ffi import core

    kinds: dict[str, Any] = core.ERROR_NAME_TO_TYPE
    kind = "CUDADialectError"
    original = kinds.get(kind, RuntimeError)

    class Raised:
        """Stands for the kind; making one gives the exception itself, of whatever type."""

        def __new__(cls, message: str) -> Any:
            failure = runtime().take_failure()
            return original(message) if failure is None else failure

    kinds[kind] = Raised
    patches.on_undo(lambda: kinds.update({kind: original}))


def _on_device(
    call: Callable[..., Any], convert: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """``call`` with its launches going to the current device, and its arguments in its memory."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with current().running(args, kwargs):
            if convert is not None:
                args = tuple(map(convert, args))
                kwargs = {name: convert(value) for name, value in kwargs.items()}
            return call(self, *args, **kwargs)

    return __call__


def _direct_calls_on_device(trace: Callable[..., Any]) -> Callable[..., Any]:
    """A ``@cute.jit`` function called like a function is compiled and run by the DSL at once."""
    from cutlass._mlir import ir

    mlir: Any = ir  # its classes come from a binary module without type information

    @functools.wraps(trace)
    def _func(self: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
        inside_a_trace = (
            mlir.Context.current is not None and mlir.InsertionPoint.current is not None
        )
        if inside_a_trace or kwargs.get("compile_only"):
            return trace(self, body, *args, **kwargs)
        with compile_lock, current().running(args, kwargs):
            return trace(self, body, *args, **kwargs)

    return _func
