"""What the CUDA driver and runtime bindings say while a simulated device is entered.

Host code asks them about the device, its context and its streams; there may be no driver on this
machine to answer. Functions that are not listed here stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cute_fa.sim.patching import Patches
from cute_fa.sim.runtime import device_attributes
from cute_fa.target import Target

DRIVER_VERSION = 12090  # of the CUDA version whose PTX the DSL writes
TOTAL_MEMORY = 16 * 2**30
_CONTEXT = 1  # the handle of the only context


def device_name(target: Target) -> str:
    return f"cute_fa simulator of {target.part} ({target.arch})"


def install(patches: Patches, target: Callable[[], Target]) -> None:
    """Replace the functions; ``target()`` is the device that answers."""
    from cuda.bindings import driver, runtime
    from cutlass.utils import hardware_info

    for name, answer in _driver_answers(driver, target).items():
        patches.set(driver, name, answer)
    for name, answer in _runtime_answers(runtime, target).items():
        patches.set(runtime, name, answer)

    def max_active_clusters(self: Any, cluster_size: int, stream: Any = None) -> int:
        """One CTA on every SM, in whole clusters."""
        return target().sm_count // cluster_size

    patches.set(hardware_info.HardwareInfo, "get_max_active_clusters", max_active_clusters)


def _driver_answers(
    driver: Any, target: Callable[[], Target]
) -> dict[str, Callable[..., tuple[Any, ...]]]:
    success = driver.CUresult.CUDA_SUCCESS
    invalid = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    device, context = driver.CUdevice(0), driver.CUcontext(_CONTEXT)

    def get_attribute(attribute: Any, device: Any) -> tuple[Any, Any]:
        value = device_attributes(target()).get(int(attribute))
        return (invalid, None) if value is None else (success, value)

    def capability(device: Any) -> tuple[Any, int, int]:
        return (success, *target().compute_capability)

    return {
        "cuInit": lambda flags: (success,),
        "cuDriverGetVersion": lambda: (success, DRIVER_VERSION),
        "cuDeviceGetCount": lambda: (success, 1),
        "cuDeviceGet": lambda ordinal: (invalid, None) if int(ordinal) else (success, device),
        "cuDeviceGetName": lambda length, device: (success, device_name(target()).encode()),
        "cuDeviceGetAttribute": get_attribute,
        "cuDeviceComputeCapability": capability,
        "cuDeviceTotalMem": lambda device: (success, TOTAL_MEMORY),
        "cuDevicePrimaryCtxRetain": lambda device: (success, context),
        "cuDevicePrimaryCtxRelease": lambda device: (success,),
        "cuCtxGetDevice": lambda *context: (success, device),
        "cuCtxGetCurrent": lambda: (success, context),
        "cuCtxSetCurrent": lambda context: (success,),
        "cuCtxPushCurrent": lambda context: (success,),
        "cuCtxPopCurrent": lambda: (success, context),
        "cuCtxSynchronize": lambda *context: (success,),
        "cuStreamGetCtx": lambda stream: (success, context),
        "cuStreamSynchronize": lambda stream: (success,),
    }


def _runtime_answers(
    runtime: Any, target: Callable[[], Target]
) -> dict[str, Callable[..., tuple[Any, ...]]]:
    success = runtime.cudaError_t.cudaSuccess
    invalid = runtime.cudaError_t.cudaErrorInvalidValue

    def get_attribute(attribute: Any, device: int) -> tuple[Any, Any]:
        value = device_attributes(target()).get(int(attribute))
        return (invalid, None) if value is None else (success, value)

    return {
        "cudaGetDeviceCount": lambda: (success, 1),
        "cudaGetDevice": lambda: (success, 0),
        "cudaSetDevice": lambda device: (success,) if device == 0 else (invalid,),
        "cudaDeviceGetAttribute": get_attribute,
        "cudaDeviceSynchronize": lambda: (success,),
        "cudaStreamSynchronize": lambda stream: (success,),
        "cudaDriverGetVersion": lambda: (success, DRIVER_VERSION),
    }
