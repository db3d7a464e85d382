"""Calls through NVIDIA's launch code, in a process that has the stand-in of ``cuda_runtime``.

    python -m tests.build.cuda_calls STAND_IN WHAT ARGUMENT    (writes JSON)

WHAT is "bundle" (ARGUMENT: its folder), "compiled" (JSON list of [generation, arch, variant]), or
"failures" (the same with one entry).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tvm_ffi

from cute_fa import ptx
from cute_fa.gpu_check.grid import grid
from cute_fa.gpu_check.place import OneKernel, Place
from cute_fa.ops import launch
from cute_fa.ops.bundle import load_bundle
from cute_fa.problem import KernelVariant
from cute_fa.sim import Device, tensors
from cute_fa.sim.device import DeviceCall, parse_all
from cute_fa.sim.runtime import LaunchRequest, runtime
from tests.build.cuda_runtime import STREAM, CudaRuntime, kernel_for

TENSOR_MAP_BYTES = 128


class OnDevice1(tensors.DeviceView):
    """A CPU tensor that passes for one of CUDA device 1."""

    def __dlpack__(self, **_: Any) -> Any:
        capsule = super().__dlpack__()
        kind, number = ctypes.c_int32, tensors._DEVICE_OFFSET + 4
        kind.from_address(tensors._get_pointer(capsule, b"dltensor") + number).value = 1
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 1)


def described(request: LaunchRequest, kernel: ptx.Kernel) -> dict[str, Any]:
    """What a launch asks for; its parameters can be read only while it is made."""
    # What lies behind these bytes may be padding, which holds whatever was on the host's stack.
    known = [64 if p.nbytes == TENSOR_MAP_BYTES else min(p.nbytes, 8) for p in kernel.params]
    return {
        "image": request.kernel.image_digest,
        "name": request.kernel.name,
        "kernel_attributes": {str(k): v for k, v in request.kernel.attributes.items()},
        "grid": request.grid,
        "block": request.block,
        "cluster": request.cluster,
        "smem_bytes": request.smem_bytes,
        "attributes": {str(k): v for k, v in request.attributes.items()},
        "stream": request.stream,
        "parameters": [request.parameter(index, n).hex() for index, n in enumerate(known)],
    }


class Recorder:
    """Receives what the simulator's stand-in is asked to launch."""

    def __init__(self, kernel: Any) -> None:
        self.target = kernel.target
        self.kernel = ptx.parse(kernel.ptx)
        self.found: list[dict[str, Any]] = []

    def launch(self, request: LaunchRequest) -> None:
        self.found.append(described(request, self.kernel.kernels[request.kernel.name]))


def outputs(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """q, k, v, out, lse, and what else the kernel writes, are the tensors in front."""
    count = next(i for i, each in enumerate(arguments) if not isinstance(each, torch.Tensor))
    return list(arguments[3:count])


def both_ways(cuda: CudaRuntime, kernel: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """One call through NVIDIA's launch code, which launches in the simulator, beside the same one
    through the simulator's own."""
    converted = [tensors.to_tvm_ffi(each) for each in arguments]
    recorder = Recorder(kernel)
    with runtime().running(recorder):
        kernel.host("sim")(*converted)
    simulated = outputs(arguments)
    wanted = [x.clone() for x in simulated]
    for x in simulated:
        x.fill_(torch.nan)
    device = Device(kernel.arch)
    call = DeviceCall(device, arguments, {}, parse_all([kernel.ptx]))
    found: list[dict[str, Any]] = []

    def run(request: LaunchRequest) -> None:
        found.append(described(request, recorder.kernel.kernels[request.kernel.name]))
        call.launch(request)

    cuda.target, cuda.launch, cuda.calls = kernel.target, run, []
    cuda_device = tvm_ffi.device("cuda", 0)
    with call, tvm_ffi.use_raw_stream(cuda_device, STREAM):
        kernel.host("cuda")(*converted)
    if cuda.failure is not None:
        raise cuda.failure
    return {
        "label": kernel.label,
        "arch": kernel.arch,
        "smem_bytes": kernel.config.smem_bytes,
        "num_threads": kernel.config.num_threads,
        "calls": cuda.calls,
        "cuda": found,
        "sim": recorder.found,
        "equal": [bool((a == b).all()) for a, b in zip(simulated[:2], wanted[:2], strict=True)],
    }


@contextlib.contextmanager
def each_call_given_to(function: Any) -> Iterator[None]:
    """After each call that ran in the simulator, ``function(kernel, its arguments)`` is called."""
    simulate = launch.run_sim

    def both(kernel: Any, device: Any, arguments: tuple[Any, ...]) -> None:
        simulate(kernel, device, arguments)
        function(kernel, arguments)

    with patch.object(launch, "run_sim", both):
        yield


def call_once(kernel: Any) -> None:
    """The public function with one small problem that needs the kernel."""
    case = next(case for case in grid(kernel.variant, tiny=True) if case.kind != "one hot")
    OneKernel(kernel).run(Place("cpu", kernel.target), case.case, case.inputs())


def compiled(wishes: list[list[Any]]) -> Iterator[Any]:
    """Kernels of the disk cache."""
    for generation, arch, fields in wishes:
        kernel = kernel_for(generation, arch, KernelVariant(**fields))
        object.__setattr__(kernel, "name", kernel.label)  # as kernels of bundles have one
        yield kernel


def after_failures(cuda: CudaRuntime, kernel: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What is raised when the CUDA runtime refuses something, by what it refused."""
    converted = [tensors.to_tvm_ffi(each) for each in arguments]
    found: dict[str, Any] = {}
    cuda.target, host = kernel.target, kernel.host("cuda")

    def call(name: str, *tensors_and_numbers: Any) -> None:
        launched = len(cuda.launches)
        try:
            host(*tensors_and_numbers)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = f"{len(cuda.launches) - launched} launched"

    for name, code in (
        ("cudaGetDeviceCount", 100),
        ("cudaLibraryLoadData", 209),
        ("cudaLibraryGetKernel", 500),
        ("cudaKernelSetAttributeForDevice", 1),
    ):
        cuda.fails = {name: [code] * 4}  # the launch code asks again for the message
        call(name, *converted)
        cuda.fails = {}
    call("nothing", *converted)
    for name, code in (("cudaGetDevice", 101), ("cudaLaunchKernelExC", 719)):
        cuda.fails = {name: [code]}
        call(name, *converted)
    cuda.fails = {}
    call("nothing again", *converted)
    cuda.devices, cuda.calls = 2, []
    elsewhere = [
        tvm_ffi.from_dlpack(OnDevice1(each)) if isinstance(each, torch.Tensor) else each
        for each in arguments
    ]
    call("device 1", *elsewhere)
    found["calls for device 1"] = cuda.calls
    found["device behind them"] = cuda.device
    return found


def main() -> None:
    stand_in, what, argument = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    cuda = CudaRuntime(target=None, devices=1)  # type: ignore[arg-type]
    cuda.install(stand_in)
    # Launch code unloads its kernels when the process ends, after Python.
    atexit.register(ctypes.CDLL(str(stand_in)).stand_in_answers, None)
    found: list[Any] = []
    act = after_failures if what == "failures" else both_ways
    kernels = load_bundle(argument).kernels if what == "bundle" else compiled(json.loads(argument))
    with each_call_given_to(lambda kernel, args: found.append(act(cuda, kernel, args))):
        for kernel in kernels:
            call_once(kernel)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
