"""CPU tensors as device tensors: DLPack views that claim a CUDA device, and memory regions.

The simulated device's memory is the memory of this process, at the addresses that it has. What is
needed is that host code accepts a CPU tensor (its DLPack device must say CUDA, or the DSL gives it
the generic address space and TVM-FFI refuses it), and that the simulator knows which bytes belong
to a tensor, so that everything else is out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from cute_fa.sim.memory import GlobalMemory, Region
from cute_fa.sim.patching import Patches
from cute_fa.sim.runtime import runtime

Result = TypeVar("Result")

# DLPack: device types, and the place of DLDevice in a DLTensor {void *data; DLDevice device; …}.
_DL_CPU = 1
_DL_CUDA = 2
_DEVICE_OFFSET = 8
# DLPack: the code of float8_e4m3fn, and the place of DLDataType {uint8 code; uint8 bits; …}.
_DL_FLOAT8_E4M3FN = 10
_TYPE_OFFSET = 20

_API_NAME = b"dlpack_exchange_api"

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def plain_torch(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run ``function`` with torch telling the truth about its tensors' devices.

    Inside a device's block a torch function mode says that CPU tensors are on the GPU.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Result:
        torch = sys.modules.get("torch")
        if torch is None:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run


class DeviceView:
    """A CPU tensor that exports itself through DLPack as a tensor of CUDA device 0."""

    def __init__(self, source: Any) -> None:
        self.source = source

    @plain_torch
    def __dlpack__(self, **_: Any) -> Any:
        """The tensor's own capsule with another device written into it.

        Stream, version and copy requests do not matter: there is one stream, and nothing to copy.
        """
        source = self.source
        is_fp8 = str(source.dtype) == "torch.float8_e4m3fn"
        if is_fp8:  # which older versions of torch do not hand out
            source = source.view(sys.modules["torch"].uint8)
        capsule = (source.detach() if is_torch_tensor(source) else source).__dlpack__()
        tensor = _get_pointer(capsule, b"dltensor")
        if is_fp8:
            ctypes.c_uint8.from_address(tensor + _TYPE_OFFSET).value = _DL_FLOAT8_E4M3FN
        kind = ctypes.c_int32.from_address(tensor + _DEVICE_OFFSET)
        if kind.value == _DL_CPU:
            kind.value = _DL_CUDA
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DL_CUDA, 0)


def is_torch_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def wrap_exchange_api(patches: Patches) -> None:
    """Have compiled code that reads torch tensors through DLPack's C interface see CUDA tensors."""
    import torch

    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:  # versions of torch before the interface
        return
    table = _get_pointer(capsule, _API_NAME)
    runtime().set_cpu_is_cuda(table, True)
    patches.on_undo(lambda: runtime().set_cpu_is_cuda(table, False))


@plain_torch
def is_host_tensor(value: Any) -> bool:
    """Whether ``value`` is a CPU tensor or array that can stand for a device tensor."""
    if isinstance(value, np.ndarray):
        return True
    # Fake tensors have no memory to look at, sparse ones no single piece of it.
    return (
        is_torch_tensor(value)
        and value.device.type == "cpu"
        and str(value.layout) == "torch.strided"
        and not _is_fake(value)
    )


def _is_fake(tensor: Any) -> bool:
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(tensor, fake.FakeTensor)


def to_tvm_ffi(value: Any) -> Any:
    """``value`` as a TVM-FFI function takes it: CPU tensors, in containers too, as CUDA ones."""
    if is_host_tensor(value):
        import tvm_ffi

        return tvm_ffi.from_dlpack(DeviceView(value))
    if type(value) in (list, tuple):
        return type(value)(to_tvm_ffi(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_tvm_ffi(item) for item in value))
    return value


# --- Regions ---


class CallRegions:
    """The tensors of one call as regions of global memory, for as long as the call runs."""

    def __init__(self, memory: GlobalMemory) -> None:
        self._memory = memory
        self._regions: list[Region] = []
        self._owners: list[Any] = []  # what holds the regions' memory
        self._live: list[tuple[int, int, Any]] | None = None  # all tensors, once looked for

    def __enter__(self) -> CallRegions:
        self._outer_resolver = self._memory.resolver
        self._memory.resolver = self._resolve
        return self

    def __exit__(self, *_: Any) -> None:
        self._memory.resolver = self._outer_resolver
        for region in self._regions:
            self._memory.unregister(region)
        self._regions.clear()
        self._owners.clear()
        self._live = None

    @plain_torch
    def add_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Register the storage of every tensor among the arguments, named after its argument."""
        for position, value in enumerate(args):
            self._add_nested(value, f"argument {position}")
        for name, value in kwargs.items():
            self._add_nested(value, f"argument {name}")

    def _add_nested(self, value: Any, name: str) -> None:
        # cute.runtime tensors keep what they were made from under this name (see hosts.py).
        value = getattr(value, "_cute_fa_source", value)
        if isinstance(value, DeviceView):
            value = value.source
        if is_host_tensor(value):
            self._register(*_extent(value), name, keep_alive=value)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._add_nested(item, f"{name}[{index}]")

    def _register(self, base: int, nbytes: int, name: str, *, keep_alive: Any) -> Region | None:
        if nbytes == 0:
            return None
        known = self._memory.find(base, nbytes)
        if known is not None:
            return known
        raw: Any = (ctypes.c_uint8 * nbytes).from_address(base)
        region = self._memory.register(np.frombuffer(raw, np.uint8), name=name)
        self._regions.append(region)
        self._owners.append(keep_alive)
        return region

    @plain_torch
    def _resolve(self, address: int) -> Region | None:
        """The region of the live tensor that owns ``address``, if one does.

        Reached only by pointers that no argument explains: tensors made inside the called function,
        raw pointers. Looking at every object takes a while, so it is done once for a launch.
        """
        if self._live is None:
            self._live = [(*_extent(tensor), tensor) for tensor in live_tensors()]
        for base, nbytes, tensor in self._live:
            if base <= address < base + nbytes:
                name = f"a tensor {tuple(tensor.shape)} {tensor.dtype} that is no argument"
                return self._register(base, nbytes, name, keep_alive=tensor)
        return None

    def forget_live_tensors(self) -> None:
        """Look for tensors anew: the host code has run since."""
        self._live = None


def _extent(tensor: Any) -> tuple[int, int]:
    """Address and bytes of the tensor's whole storage: views share it, padding belongs to it."""
    if isinstance(tensor, np.ndarray):
        while isinstance(tensor.base, np.ndarray):
            tensor = tensor.base
        low, high = _byte_bounds(tensor)
        return low, high - low
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _byte_bounds(array: np.ndarray) -> tuple[int, int]:
    """First address and end of an array, whatever the signs of its strides."""
    low = high = int(array.__array_interface__["data"][0])
    if array.size == 0:
        return low, low
    for extent, stride in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * stride
        low, high = (low + reach, high) if reach < 0 else (low, high + reach)
    return low, high + array.itemsize


def live_tensors() -> Iterator[Any]:
    """Every CPU torch tensor that Python can reach (arrays are invisible to the collector).

    The types are looked at first, once each: properties of strange objects may run code.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    is_tensor: dict[type, bool] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in is_tensor:
            is_tensor[kind] = issubclass(kind, torch.Tensor)
        if is_tensor[kind] and is_host_tensor(thing):
            yield thing
