"""A CUDA runtime that keeps a record: what NVIDIA's launch code asks of it, and what it answers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cute_fa.build import Compiled, compile
from cute_fa.build.toolchain import c_compiler, runtime_library
from cute_fa.ops.sources import variant_features
from cute_fa.problem import KernelVariant
from cute_fa.sim.runtime import (
    MAX_DYNAMIC_SMEM,
    KernelHandle,
    LaunchRequest,
    device_attributes,
    image_digest_at,
    read_launch_config,
)
from cute_fa.target import Target, get_target

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "libcute_dsl_runtime.so"
DRIVER = "libcuda.so.1"
# What cuda_runtime.c defines itself: they do not return error codes.
WORDS = {"cudaGetErrorName", "cudaGetErrorString"}
STREAM = 0x5EA0
"""Handle of the stream that calls are made in."""

SUCCESS, INVALID_VALUE, NOT_FOUND = 0, 1, 500
DRIVER_VERSION = 13000


def kernel_for(generation: str, arch: str, variant: KernelVariant) -> Compiled:
    """The kernel, compiled or from the cache."""
    sizes = {"head_dim": variant.head_dim, "head_dim_v": variant.head_dim_v}
    features = variant_features(variant)
    return compile(generation, arch=arch, dtype=variant.dtype, **sizes, **features)


def build(folder: Path) -> Path:
    """The stand-in, under the name of the library that it stands for.

    A process that has it in LD_PRELOAD uses it wherever that library is needed.
    """
    real = runtime_library()
    layer = real.with_name("libcuda_dialect_runtime_static.a")
    # Names in its symbol tables, which share their ends: _cudaX, which it defines, calls cudaX.
    names = re.findall(rb"\0_?(cuda[A-Z]\w+)(?=\0)", layer.read_bytes())
    wanted = {name.decode() for name in names}
    forwards = " ".join(f"FORWARD({name})" for name in sorted(wanted - WORDS))
    return _link(
        folder / NAME,
        f"-DFORWARDS={forwards}",
        f'-DREAL_LIBRARY="{real}"',
        str(HERE / "cuda_runtime.c"),
        *("-Wl,--whole-archive", str(layer), "-Wl,--no-whole-archive", "-ldl"),
    )


def build_driver(folder: Path) -> Path:
    """A CUDA driver without a device; see its source. LD_LIBRARY_PATH may lead to it."""
    return _link(folder / DRIVER, str(HERE / "cuda_driver.c"))


def _link(output: Path, *arguments: str) -> Path:
    compiler = c_compiler()
    assert compiler is not None, "there is no C compiler"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{output.name}"]
    subprocess.run([*command, "-o", str(output), *arguments], check=True)
    return output


def in_a_process(folder: Path, what: str, argument: str) -> list[Any]:
    """What ``tests.build.cuda_calls`` finds with both stand-ins, which are made in ``folder``."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(build(folder)),
        "LD_LIBRARY_PATH": str(build_driver(folder).parent),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.build.cuda_calls", str(folder / NAME), what, argument]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found: list[Any] = json.loads(result.stdout)
    return found


def as_the_simulator_was_told(call: dict[str, Any]) -> bool:
    """Whether a call of ``tests.build.cuda_calls.both_ways`` made the same launch both ways, in the
    stream of the environment, and the simulator made the same of them."""
    [cuda], [sim] = call["cuda"], call["sim"]
    assert (cuda.pop("stream"), sim.pop("stream")) == (STREAM, 0)
    # What a bundle keeps for the simulator comes without the machine code.
    del cuda["image"], sim["image"]
    assert cuda == sim
    assert cuda["block"] == [call["num_threads"], 1, 1]
    assert cuda["smem_bytes"] == call["smem_bytes"]
    # What CUDA lets a kernel have without being asked is 48 KiB; a launch may take what was set.
    limit = cuda["kernel_attributes"][str(MAX_DYNAMIC_SMEM)]
    assert call["smem_bytes"] <= limit <= get_target(call["arch"]).smem_per_block_bytes
    return all(call["equal"])


def _signed(value: int) -> int:
    return ctypes.c_int32(value & 0xFFFFFFFF).value


@dataclass
class CudaRuntime:
    """The answers of a machine with GPUs of one kind; handles are small numbers.

    Attributes:
        calls: names of what was asked, and what is worth knowing of it.
        launches: what would have run.
        fails: by name, the error codes of the next calls.
        launch: is given each launch.
    """

    target: Target
    devices: int = 1
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    launches: list[LaunchRequest] = field(default_factory=list)
    fails: dict[str, list[int]] = field(default_factory=dict)
    launch: Callable[[LaunchRequest], None] = lambda request: None

    def __post_init__(self) -> None:
        self.device = 0
        self._images: dict[int, str] = {}
        self._kernels: dict[int, KernelHandle] = {}
        self.failure: BaseException | None = None
        by_int = ctypes.POINTER(ctypes.c_int)
        self._driver = {
            "cuDeviceGet": ctypes.CFUNCTYPE(ctypes.c_int, by_int, ctypes.c_int)(self._device_get),
            "cuKernelGetAttribute": ctypes.CFUNCTYPE(
                ctypes.c_int, by_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int
            )(self._kernel_attribute),
        }

    def install(self, library: Path) -> None:
        """Answer for a stand-in that ``build`` made."""
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
        self._answer = kind(self._guarded)
        ctypes.CDLL(str(library)).stand_in_answers(self._answer)

    def _guarded(self, name: bytes, arguments: Any) -> int:
        try:
            planned = self.fails.get(name.decode())
            if planned:
                return planned.pop(0)
            code: int = getattr(self, f"_{name.decode()}")(arguments)
            return code
        except BaseException as error:  # nothing may escape into C
            self.failure = error
            return NOT_FOUND

    def _cudaGetDeviceCount(self, a: Any) -> int:
        _write_int(a[0], self.devices)
        return SUCCESS

    def _cudaGetDevice(self, a: Any) -> int:
        _write_int(a[0], self.device)
        return SUCCESS

    def _cudaSetDevice(self, a: Any) -> int:
        self.calls.append(("set device", _signed(a[0])))
        self.device = _signed(a[0])
        return SUCCESS if 0 <= self.device < self.devices else 101

    def _cudaDriverGetVersion(self, a: Any) -> int:
        _write_int(a[0], DRIVER_VERSION)
        return SUCCESS

    def _cudaDeviceGetAttribute(self, a: Any) -> int:
        answer = device_attributes(self.target).get(_signed(a[1]))
        if answer is None:
            return INVALID_VALUE
        _write_int(a[0], answer)
        return SUCCESS

    def _cudaGetLastError(self, a: Any) -> int:
        return SUCCESS

    def _cudaLibraryLoadData(self, a: Any) -> int:
        digest = image_digest_at(a[1])
        handle = len(self._images) + 1
        self._images[handle] = digest
        ctypes.c_uint64.from_address(a[0]).value = handle
        self.calls.append(("load", digest))
        return SUCCESS

    def _cudaLibraryGetKernel(self, a: Any) -> int:
        name = ctypes.string_at(a[2]).decode()
        handle = 1000 + len(self._kernels)
        self._kernels[handle] = KernelHandle(self._images[a[1]], name)
        ctypes.c_uint64.from_address(a[0]).value = handle
        self.calls.append(("kernel", name))
        return SUCCESS

    def _cudaLibraryUnload(self, a: Any) -> int:
        self.calls.append(("unload", a[0]))
        return SUCCESS

    def _cudaKernelSetAttributeForDevice(self, a: Any) -> int:
        attribute, value, device = (_signed(a[i]) for i in (1, 2, 3))
        self._kernels[a[0]].attributes[attribute] = value
        self.calls.append(("set", attribute, value, device))
        return SUCCESS

    def _cudaGetDriverEntryPointByVersion(self, a: Any) -> int:
        name = ctypes.string_at(a[0]).decode()
        function = ctypes.cast(self._driver[name], ctypes.c_void_p).value
        ctypes.c_uint64.from_address(a[1]).value = function
        if a[4]:
            _write_int(a[4], 0)
        return SUCCESS

    def _cudaLaunchKernelExC(self, a: Any) -> int:
        parameters = ctypes.cast(a[2], ctypes.POINTER(ctypes.c_void_p))
        request = read_launch_config(a[0], self._kernels[a[1]], parameters)
        self.calls.append(("launch", self.device))
        self.launches.append(request)
        self.launch(request)
        return SUCCESS

    def _device_get(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal
        return SUCCESS

    def _kernel_attribute(self, value: Any, attribute: int, kernel: int, device: int) -> int:
        value[0] = self._kernels[kernel].attributes.get(attribute, 0)
        return SUCCESS


def _write_int(address: int, value: int) -> None:
    ctypes.c_int.from_address(address).value = value
