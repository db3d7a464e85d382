"""A simulated GPU: ``with sim.Device("sm_80") as dev`` runs CuTe DSL programs on CPU tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cute_fa import env, ptx
from cute_fa.errors import CompileError, CuteFAError, InvalidTypeError, UnsupportedError
from cute_fa.sim import hosts, tensors
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.runtime import LaunchRequest, runtime
from cute_fa.sim.wave import LaunchConfig, SimOptions
from cute_fa.target import Target, get_target, runs_on

if TYPE_CHECKING:
    from cute_fa.sim.execute import Launch

# One host function runs at a time: the DSL's loaders are not thread-safe, and a launch uses the
# machine's cores by itself.
_one_call = threading.RLock()


class Device:
    """One simulated GPU of an architecture.

    Inside ``with Device(...) as dev`` the DSL compiles for its architecture, compiled functions
    that are called launch on it, CPU tensors pass for device tensors, and ``torch.cuda`` and the
    CUDA driver answer for it. Blocks may nest (the inner device counts) and follow each other with
    different architectures; everything is put back at the end. The hooks are the process's: other
    threads see them too, all but the answers of ``tensor.is_cuda`` and ``tensor.device``.

    What a program compiled inside the block stays linked to the simulator. Programs that remember
    the device's properties (``functools.lru_cache``) see one architecture per process.

    Args:
        arch: what ``cute_fa.target.get_target`` takes, e.g. "sm_80".
        seed: of every random choice of the simulation.
        completion: when asynchronous work completes: "eager", "late" or "random".
        strict: raise ``HazardError`` on the first error-severity hazard, out of the call.
        checks: True for all hazard rules, False for none, or the names of the rules to check.
        workers: processes that a launch may use; None for ``CUTE_FA_SIM_WORKERS`` or every core.
        trace: keep what every warp did in order, as ``Launch.trace``; such launches run in one
            process.

    Attributes:
        launches: what ran, in order (``Launch``: counters, hazards, grid, …).
        memory: the device's global memory; tensors are in it while a call runs.
    """

    def __init__(
        self,
        arch: str | Target,
        *,
        seed: int = 0,
        completion: str = "eager",
        strict: bool = True,
        checks: bool | Sequence[str] = True,
        workers: int | None = None,
        trace: bool = False,
    ) -> None:
        self.target = get_target(arch)
        self.options = SimOptions(
            arch=self.target.arch,
            completion=completion,
            seed=seed,
            strict=strict,
            checks=_rule_names(checks),
            workers=env.sim_workers() if workers is None else workers,
            trace=trace,
        )
        self.launches: list[Launch] = []
        self.memory = GlobalMemory()

    def __repr__(self) -> str:
        return f"Device({self.target.arch!r}, {len(self.launches)} launches)"

    def __enter__(self) -> Device:
        hosts.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        hosts.leave(self)

    def compile(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ptx_transform: Callable[[str], str] | None = None,
        **kwargs: Any,
    ) -> Program:
        """As ``cute.compile(fn, *args, **kwargs)``, for this device.

        Args:
            fn: a ``@cute.jit`` function.
            ptx_transform: what runs is ``ptx_transform(ptx)`` instead of the compiled PTX.

        Returns:
            a function of the runtime arguments, as the DSL's own; it may be called after the
            ``with`` block too.
        """
        with self:
            compiled, texts = hosts.compile(fn, *args, **kwargs)
        if ptx_transform is not None:
            texts = [_transformed(text, ptx_transform) for text in texts]
        return Program(self, compiled, texts)

    def bind(self, host_function: Any, ptx_text: str | Sequence[str]) -> Callable[..., Any]:
        """Let a host function that was built elsewhere launch on this device.

        Args:
            host_function: a ``tvm_ffi.Function`` whose CUDA symbols resolve to
                ``sim.runtime.stub_library()``.
            ptx_text: the PTX of its kernels; they are found by name.

        Returns:
            a function of the same positional arguments, CPU tensors in place of CUDA tensors.
        """
        texts = [ptx_text] if isinstance(ptx_text, str) else list(ptx_text)
        modules = parse_all(texts)

        def run(*args: Any) -> Any:
            with self.running(args, {}, modules):
                return host_function(*map(tensors.to_tvm_ffi, args))

        return run

    def running(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modules: Sequence[ptx.Module] | None = None,
    ) -> AbstractContextManager[Any]:
        """Context in which host code may run: its launches come here, its tensors are in memory.

        Inside another call on this thread it does nothing: the outer one knows what to run.
        """
        if runtime().is_running():
            return nullcontext()
        return DeviceCall(self, args, kwargs, modules)

    def ambient_call(self) -> AmbientCall:
        """What receives launches of compiled code that other compiled code calls."""
        return AmbientCall(self)


def _rule_names(checks: object) -> bool | frozenset[str]:
    if isinstance(checks, bool):
        return checks
    if isinstance(checks, Iterable) and not isinstance(checks, str):
        return frozenset(checks)
    raise InvalidTypeError(
        "checks does not name rules",
        got=f"{checks!r} ({type(checks).__name__})",
        expected="True, False, or a list of rule names",
    )


def _transformed(text: str, transform: Callable[[str], str]) -> str:
    """The PTX that a transformation gives, if it is one."""
    replaced = transform(text)
    if not isinstance(replaced, str):
        raise InvalidTypeError(
            "ptx_transform must return the PTX that shall run",
            got=repr(replaced),
            expected="a string",
            fix="return the text unchanged where there is nothing to replace",
        )
    return replaced


class AmbientCall:
    """Launches that no Python call announced: their tensors are found among all live ones."""

    def __init__(self, device: Device) -> None:
        self.target = device.target
        self._device = device

    def launch(self, request: LaunchRequest) -> None:
        call = DeviceCall(self._device, (), {}, None)
        with call:
            call.launch(request)


class Program:
    """What ``Device.compile`` returns: the compiled function, tied to its device.

    Attributes:
        compiled: the DSL's compiled function (``.artifacts`` etc.).
        ptx: the PTX that runs; several texts are joined if the function made several modules.
    """

    def __init__(self, device: Device, compiled: Any, texts: Sequence[str]) -> None:
        self.compiled = compiled
        self._device = device
        self._texts = tuple(texts)
        self._modules = parse_all(texts)

    @property
    def ptx(self) -> str:
        return "\n".join(self._texts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._device as device, device.running(args, kwargs, self._modules):
            return self.compiled(*args, **kwargs)


class DeviceCall:
    """One call of a host function: its tensors are in memory, its launches run on the device."""

    def __init__(
        self,
        device: Device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modules: Sequence[ptx.Module] | None,
    ) -> None:
        self.target = device.target
        self._device = device
        self._modules = modules
        self._arguments = args, kwargs
        self._regions = tensors.CallRegions(device.memory)
        self._exit = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(_one_call)
            stack.enter_context(self._regions)
            self._regions.add_arguments(*self._arguments)
            stack.enter_context(runtime().running(self))
            self._exit = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._exit.__exit__(kind, error, traceback)

    def launch(self, request: LaunchRequest) -> None:
        """Run the kernel that the host code launches, and keep the record of it."""
        from cute_fa.sim.execute import execute

        self._regions.forget_live_tensors()
        module = self._module_of(request)
        kernel = module.kernels[request.kernel.name]
        params = bytearray(kernel.param_bytes)
        for index, param in enumerate(kernel.params):
            end = param.offset + param.nbytes
            params[param.offset : end] = request.parameter(index, param.nbytes)
        config = LaunchConfig(
            kernel=kernel.name,
            grid=request.grid,
            block=request.block,
            cluster=request.cluster,
            smem_bytes=request.smem_bytes,
            params=bytes(params),
            attributes=request.attributes,
        )
        device = self._device
        try:
            launch = execute(module, config, device.memory, device.options)
        except CuteFAError as error:
            partial = getattr(error, "launch", None)
            if partial is not None:
                device.launches.append(partial)
            raise
        device.launches.append(launch)

    def _module_of(self, request: LaunchRequest) -> ptx.Module:
        """The PTX module of the launched kernel: the call's own, else by the loaded image."""
        name = request.kernel.name
        modules = self._modules
        if modules is None:
            text = hosts.captured_ptx(request.kernel.image_digest)
            if text is None:
                raise UnsupportedError(
                    f"the PTX of kernel {name} is not known",
                    got="a host function that was not compiled for a simulated device here",
                    expected="one compiled inside the `with sim.Device(...)` block",
                    fix="compile it there (switch off the program's own cache of compiled kernels)"
                    ", or use Device.bind(host_function, ptx)",
                )
            modules = parse_all([text])
        for module in modules:
            if name in module.kernels:
                _check_runs_on(module, self.target)
                return module
        raise CompileError(
            f"the PTX has no kernel {name}",
            got=", ".join(kernel for module in modules for kernel in module.kernels) or "none",
            expected="an .entry of that name",
        )


def current_device() -> Device | None:
    """The innermost device whose ``with`` block is running, if there is one."""
    return hosts.current() if hosts.is_entered() else None


def parse_all(texts: Sequence[str]) -> tuple[ptx.Module, ...]:
    """Parse PTX texts; a text that was parsed before is not parsed again."""
    return tuple(_parse(text) for text in texts)


@lru_cache(maxsize=64)
def _parse(text: str) -> ptx.Module:
    return ptx.parse(text)


def _check_runs_on(module: ptx.Module, target: Target) -> None:
    if not runs_on(module.target, target):
        raise CompileError(
            "the kernel was built for another architecture than the simulated device",
            got=f".target {module.target}",
            expected=target.arch,
            fix=f"compile it for {target.arch} (drop --gpu-arch), "
            f"or simulate sim.Device({module.target!r})",
        )
