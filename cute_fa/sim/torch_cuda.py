"""What ``torch`` says about CUDA while a simulated device is entered.

Programs ask ``torch.cuda`` for the device's properties and streams, check ``tensor.is_cuda`` and
``tensor.device``, and create tensors with ``device="cuda"``. All of it is answered as if every CPU
tensor were on device 0:

- ``torch.cuda`` functions are replaced;
- a torch function mode answers ``is_cuda`` and ``device``, and puts the CPU for every CUDA device
  that is asked for. ``.cuda()`` returns the tensor itself and ``.cpu()`` a copy, as on a GPU;
- an operator registered for CUDA only (``torch.library``) is called with its CUDA kernel.

Not covered: code in C++ that looks at the device, CUDA events and graphs, ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cute_fa.sim.cuda_driver import TOTAL_MEMORY, device_name
from cute_fa.sim.patching import Patches
from cute_fa.sim.runtime import L2_BYTES
from cute_fa.target import Target


class Stream:
    """The one stream, in which everything has already happened."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 0)

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def query(self) -> bool:
        return True

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _DeviceGuard:
    """``with torch.cuda.device(0)``: there is no other device to change to."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _DeviceGuard:
        return self

    def __exit__(self, *_: Any) -> None: ...


def install(patches: Patches, target: Callable[[], Target]) -> None:
    """Replace the functions and enter the mode; ``target()`` is the device that answers."""
    import torch

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: target().compute_capability,
        "get_device_name": lambda device=None: device_name(target()),
        "get_device_properties": lambda device=None: properties(target()),
        "get_arch_list": lambda: [target().arch],
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "Stream": Stream,
        "device": _DeviceGuard,
        "stream": lambda stream: _DeviceGuard(),
    }
    for name, answer in answers.items():
        patches.set(torch.cuda, name, answer)
    mode = _make_mode()
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:  # torch leaves the mode while it handles what the mode has intercepted
            return run_backward(*args, **kwargs)

    patches.set(torch.autograd, "_engine_run_backward", run_backward_in_mode)
    mode.__enter__()
    patches.on_undo(lambda: mode.__exit__(None, None, None))


def properties(target: Target) -> SimpleNamespace:
    """As ``torch.cuda.get_device_properties``."""
    return SimpleNamespace(
        name=device_name(target),
        major=target.compute_capability[0],
        minor=target.compute_capability[1],
        multi_processor_count=target.sm_count,
        total_memory=TOTAL_MEMORY,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=target.max_threads_per_sm,
        regs_per_multiprocessor=target.registers_per_sm,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=target.smem_per_block_bytes,
        shared_memory_per_multiprocessor=target.smem_per_sm_bytes,
        L2_cache_size=L2_BYTES.get(target.compute_capability, 40 * 2**20),
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName=target.arch,
    )


def _is_cuda(device: Any) -> bool:
    import torch

    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _is_cpu(device: Any) -> bool:
    import torch

    return (isinstance(device, torch.device) and device.type == "cpu") or (
        isinstance(device, str) and device == "cpu"
    )


def _make_mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    tensor: Any = torch.Tensor
    real_device = tensor.device.__get__
    simulated = torch.device("cuda", 0)

    def device(self: Any) -> Any:
        real = real_device(self)
        return simulated if real.type == "cpu" else real

    # Getters arrive as new but equal objects, so they are looked up, not compared by identity.
    answers: dict[Any, Callable[..., Any]] = {
        tensor.is_cuda.__get__: lambda self: device(self).type == "cuda",
        tensor.is_cpu.__get__: lambda self: False,
        tensor.device.__get__: device,
        tensor.get_device: lambda self: 0,
        tensor.cuda: lambda self, *_, **__: self,
        tensor.cpu: lambda self, *_, **__: self.clone(),
    }

    class CpuTensorsAreCuda(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            answer = answers.get(func)
            if answer is not None:
                return answer(*args[:1])
            if func is torch.device:
                return func(*args, **(kwargs or {}))
            args, kwargs = _on_cpu(func, args, kwargs or {})
            kernel = _cuda_kernel(func)
            if kernel is None:
                return func(*args, **kwargs)
            with self:
                return kernel(*args, **kwargs)

    return CpuTensorsAreCuda()


def _on_cpu(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a torch function with the CPU for every CUDA device that is asked for."""
    import torch

    if func is torch.Tensor.to and any(map(_is_cpu, (*args[1:2], kwargs.get("device")))):
        kwargs = {**kwargs, "copy": True}  # from the GPU to the host
    if any(map(_is_cuda, args)):
        args = tuple("cpu" if _is_cuda(value) else value for value in args)
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": "cpu"}
    return args, kwargs


def _cuda_kernel(operator: Any) -> Callable[..., Any] | None:
    """The CUDA kernel of an operator that has none for the CPU, with its autograd formula."""
    import torch
    from torch._C import DispatchKey, DispatchKeySet, _dispatch_has_kernel_for_dispatch_key

    if not isinstance(operator, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
        return None
    if isinstance(operator, torch._ops.OpOverloadPacket):
        overloads = operator.overloads()
        if len(overloads) != 1:
            return None
        operator = getattr(operator, overloads[0])
    name = operator.name()
    for key in ("CPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd"):
        if _dispatch_has_kernel_for_dispatch_key(name, key):
            return None
    if not _dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return None
    keys = DispatchKeySet(DispatchKey.CUDA)
    if torch.is_grad_enabled():
        keys = keys.add(DispatchKey.AutogradCUDA)

    def call(*args: Any, **kwargs: Any) -> Any:
        return operator.redispatch(keys, *args, **kwargs)

    return call
