"""The C side of the seam: build the stand-in for the CUDA runtime and receive what it is asked.

``runtime.c`` is compiled on first use with the system's C compiler into the cache directory and
loaded once per process. Its callbacks arrive here and go to the `Call` that is in progress on this
thread; an exception of a callback cannot cross the compiled host code, so it is kept and raised
again when the host code has returned.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from cute_fa import env
from cute_fa.errors import (
    CacheError,
    CompileError,
    InvalidArgumentError,
    MissingToolError,
    UnsupportedError,
)
from cute_fa.sim.tensor_map_request import TensorMapRequest, encode_request
from cute_fa.target import Target

SOURCE = Path(__file__).with_name("runtime.c")
NAME_PREFIX = "cute_fa_sim_"
"""Before the names of the second library that ``runtime.c`` is compiled to; see there."""

# cudaError_t
SUCCESS = 0
INVALID_VALUE = 1
NOT_INITIALIZED = 3
INVALID_CONFIGURATION = 9
INVALID_HANDLE = 400
LAUNCH_FAILURE = 719

# cudaLaunchAttributeID
LAUNCH_CLUSTER_DIMENSION = 4

# cudaFuncAttribute
MAX_DYNAMIC_SMEM = 8

KIB = 1024
DEFAULT_SMEM_BYTES = 48 * KIB
MAX_THREADS_PER_BLOCK = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass
class KernelHandle:
    """One kernel of a loaded device image, with the attributes that the host code set on it."""

    image_digest: str
    name: str
    attributes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchRequest:
    """A ``cudaLaunchKernelEx`` as the host code made it; sizes in bytes, dimensions (x, y, z)."""

    kernel: KernelHandle
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    stream: int
    cluster: tuple[int, int, int]
    attributes: dict[int, int]  # cudaLaunchAttributeID → its first word, the cluster left out
    parameters: Any  # C array of pointers, one per kernel parameter

    def parameter(self, index: int, nbytes: int) -> bytes:
        """The bytes of one kernel parameter; the host code passes their address."""
        return ctypes.string_at(self.parameters[index], nbytes)


class Call(Protocol):
    """Host code running on this thread for a simulated device."""

    target: Target

    def launch(self, request: LaunchRequest) -> None:
        """Run the kernel to completion or raise."""


# --- Building the library ---


def stub_library(*, is_prefixed: bool = False) -> Path:
    """Path of the compiled stand-in, built on the first call for this source.

    Args:
        is_prefixed: the library whose names carry ``NAME_PREFIX``, for code linked in memory.

    Raises:
        MissingToolError: there is no C compiler.
        CompileError: the compiler failed.
    """
    return _build_stub(str(env.cache_dir()), is_prefixed)


@cache
def _build_stub(cache_dir: str, is_prefixed: bool) -> Path:
    source = SOURCE.read_bytes()
    compiler = _find_compiler()
    identity = hashlib.sha256(source + b"\0" + compiler.encode()).hexdigest()[:20]
    directory = Path(cache_dir) / "sim" / identity
    library = directory / f"libcute_fa_sim_runtime{'_prefixed' if is_prefixed else ''}.so"
    checksum = library.with_suffix(".sha256")
    if _is_whole(library, checksum):
        return library
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            "the simulator's runtime library cannot be kept",
            got=f"{directory}: {error.strerror}",
            expected="a directory that this user may write",
            fix="set CUTE_FA_CACHE_DIR to one",
        ) from error
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / library.name
        command = [compiler, "-shared", "-fPIC", "-O1", "-std=gnu11", "-w"]
        if is_prefixed:
            command.append(f"-DNAME_PREFIX={NAME_PREFIX}")
        command += ["-o", str(built), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompileError(
                "the simulator's runtime library could not be compiled",
                got=result.stderr.strip() or f"exit code {result.returncode}",
                expected=f"{compiler} to build {SOURCE}",
                fix="check that the C compiler and the C library's headers are installed",
            )
        digest = Path(scratch) / checksum.name
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(built, library)
        os.replace(digest, checksum)
    return library


def _is_whole(library: Path, checksum: Path) -> bool:
    """Whether the library is there as it was built: loading a damaged one kills the process."""
    try:
        return checksum.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


def _find_compiler() -> str:
    asked = env.c_compiler()
    names = [asked] if asked else ["cc", "gcc", "clang"]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise MissingToolError(
        "the simulator needs a C compiler, once, to build its runtime library",
        got=f"CC={asked}, which is not found" if asked else "none of cc, gcc, clang on the PATH",
        expected="any C compiler",
        fix="install one (Debian/Ubuntu: apt-get install gcc; Fedora: dnf install gcc), or set CC",
    )


# --- Device properties ---


def device_attributes(target: Target) -> dict[int, int]:
    """cudaDeviceAttr (equal to CUdevice_attribute) → value, for what programs ask."""
    return {
        1: MAX_THREADS_PER_BLOCK,
        **dict(zip((2, 3, 4), MAX_BLOCK, strict=True)),
        **dict(zip((5, 6, 7), MAX_GRID, strict=True)),
        8: DEFAULT_SMEM_BYTES,
        9: 64 * KIB,  # constant memory
        10: 32,  # warp size
        12: target.registers_per_sm,  # per block
        16: target.sm_count,
        31: 1,  # concurrent kernels
        38: L2_BYTES.get(target.compute_capability, 40 * KIB * KIB),
        39: target.max_threads_per_sm,
        41: 1,  # unified addressing
        75: target.compute_capability[0],
        76: target.compute_capability[1],
        81: target.smem_per_sm_bytes,
        82: target.registers_per_sm,
        95: 1,  # cooperative launch
        97: target.smem_per_block_bytes,  # opt-in
        106: target.max_threads_per_sm // 64 if target.major != 8 else 32,  # blocks per SM
        111: target.smem_reserved_per_block_bytes,
        120: int(target.major >= 9),  # cluster launch
    }


# L2 cache of the part that stands for the architecture (vendor data sheets).
L2_BYTES = {
    (8, 0): 40 * KIB * KIB,
    (8, 6): 6 * KIB * KIB,
    (8, 7): 4 * KIB * KIB,
    (8, 9): 72 * KIB * KIB,
    (9, 0): 50 * KIB * KIB,
    (10, 0): 126 * KIB * KIB,
    (10, 3): 126 * KIB * KIB,
    (12, 0): 96 * KIB * KIB,
    (12, 1): 24 * KIB * KIB,
}


# --- Receiving the callbacks ---

_INT = ctypes.c_int
_HANDLE = ctypes.c_uint64
_INT_OUT = ctypes.POINTER(ctypes.c_int)
_HANDLE_OUT = ctypes.POINTER(ctypes.c_uint64)
_SIGNATURES: dict[str, Any] = {  # in the order of the C structure
    "load_library": ctypes.CFUNCTYPE(_INT, ctypes.c_void_p, _HANDLE_OUT),
    "unload_library": ctypes.CFUNCTYPE(_INT, _HANDLE),
    "get_kernel": ctypes.CFUNCTYPE(_INT, _HANDLE, ctypes.c_char_p, _HANDLE_OUT),
    "set_kernel_attribute": ctypes.CFUNCTYPE(_INT, _HANDLE, _INT, _INT),
    "get_kernel_attribute": ctypes.CFUNCTYPE(_INT, _HANDLE, _INT, _INT_OUT),
    "device_attribute": ctypes.CFUNCTYPE(_INT, _INT, _INT_OUT),
    "launch": ctypes.CFUNCTYPE(_INT, _HANDLE, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
    "occupancy": ctypes.CFUNCTYPE(_INT, _HANDLE, _INT, ctypes.c_uint64, _INT_OUT),
    "describe_failure": ctypes.CFUNCTYPE(_INT, ctypes.c_void_p, _INT),
    "encode_tensor_map": ctypes.CFUNCTYPE(_INT, ctypes.POINTER(TensorMapRequest)),
}


class _Refused(Exception):
    """What a callback raises to return an error code of CUDA."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Callbacks(ctypes.Structure):
    _fields_ = list(_SIGNATURES.items())


class Runtime:
    """The loaded stand-in: its handles, and the calls in progress on each thread.

    Attributes:
        path: the loaded library, which host functions of this process must be linked against.
        prefixed_path: the same with ``NAME_PREFIX``, for those that the DSL links in memory.
        ambient: gives the call that receives what host code asks outside of every `running` block
            (compiled code that other compiled code calls); None where nothing is simulated.
    """

    def __init__(self) -> None:
        self.ambient: Callable[[], Call] | None = None
        self._images: dict[int, str] = {}  # library handle → digest
        self._kernels: dict[int, KernelHandle] = {}
        self._next_handle = 1
        self._thread = threading.local()
        self._lock = threading.Lock()
        self.path = stub_library()
        self.prefixed_path = stub_library(is_prefixed=True)
        self._library = ctypes.CDLL(str(self.path))
        self._callbacks = _Callbacks(
            **{name: kind(self._guarded(name)) for name, kind in _SIGNATURES.items()}
        )
        for library in (self._library, ctypes.CDLL(str(self.prefixed_path))):
            library.cute_fa_sim_install(ctypes.byref(self._callbacks))

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """Send what host code on this thread asks to ``call``; re-raise what a callback raised.

        The exception of a callback wins over the error that the host code made of its error code.
        """
        calls = self._calls()
        calls.append(call)
        outer = getattr(self._thread, "failure", None)
        self._thread.failure = None
        try:
            yield
        except Exception:
            if self._thread.failure is None:
                raise
        finally:
            calls.pop()
            failure, self._thread.failure = self._thread.failure, outer
        if failure is not None:
            # Without the context: what the host code made of the error code says nothing more.
            raise failure from failure.__cause__

    def take_failure(self) -> BaseException | None:
        """What a callback raised for host code that no Python call announced, once."""
        if self.is_running():
            return None  # `running` raises it
        failure, self._thread.failure = getattr(self._thread, "failure", None), None
        return failure

    def is_running(self) -> bool:
        """Whether host code is running on this thread."""
        return bool(self._calls())

    def _calls(self) -> list[Call]:
        if not hasattr(self._thread, "calls"):
            self._thread.calls = []
        calls: list[Call] = self._thread.calls
        return calls

    def _current(self) -> Call | None:
        calls = self._calls()
        if calls:
            return calls[-1]
        return None if self.ambient is None else self.ambient()

    def set_cpu_is_cuda(self, exchange_api: int, yes: bool) -> None:
        """Whether the DLPackExchangeAPI at this address says that CPU tensors are on device 0."""
        change = self._library.cute_fa_sim_cpu_is_cuda
        change.argtypes = [ctypes.c_void_p, ctypes.c_int]
        error = change(exchange_api, int(yes))
        if error:
            raise UnsupportedError(
                "the table of torch's DLPack interface cannot be changed",
                got=os.strerror(error),
                expected="memory that this process may write",
            )

    def _guarded(self, name: str) -> Callable[..., int]:
        method = getattr(self, f"_{name}")

        def callback(*args: Any) -> int:
            try:
                code: int = method(*args)
                return code
            except _Refused as refusal:
                return refusal.code
            except BaseException as error:  # nothing may escape into C
                self._thread.failure = error
                return LAUNCH_FAILURE

        return callback

    def _kernel(self, handle: int) -> KernelHandle:
        kernel = self._kernels.get(handle)
        if kernel is None:
            raise _Refused(INVALID_HANDLE)
        return kernel

    def _call(self) -> Call:
        call = self._current()
        if call is None:
            raise _Refused(NOT_INITIALIZED)
        return call

    def _new_handle(self) -> int:
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
        return handle

    def _load_library(self, image: int, library: Any) -> int:
        handle = self._new_handle()
        self._images[handle] = image_digest_at(image)
        library[0] = handle
        return SUCCESS

    def _unload_library(self, library: int) -> int:
        return SUCCESS if self._images.pop(library, None) else INVALID_HANDLE

    def _get_kernel(self, library: int, name: bytes, kernel: Any) -> int:
        digest = self._images.get(library)
        if digest is None:
            return INVALID_HANDLE
        handle = self._new_handle()
        self._kernels[handle] = KernelHandle(digest, name.decode())
        kernel[0] = handle
        return SUCCESS

    def _set_kernel_attribute(self, kernel: int, attribute: int, value: int) -> int:
        handle, call = self._kernel(kernel), self._call()
        if attribute == MAX_DYNAMIC_SMEM and not 0 <= value <= call.target.smem_per_block_bytes:
            return INVALID_VALUE
        handle.attributes[attribute] = value
        return SUCCESS

    def _get_kernel_attribute(self, kernel: int, attribute: int, value: Any) -> int:
        handle = self._kernel(kernel)
        value[0] = handle.attributes.get(attribute, 0)
        return SUCCESS

    def _device_attribute(self, attribute: int, value: Any) -> int:
        call = self._call()
        answer = device_attributes(call.target).get(attribute)
        if answer is None:
            return INVALID_VALUE
        value[0] = answer
        return SUCCESS

    def _occupancy(self, kernel: int, block_threads: int, smem_bytes: int, blocks: Any) -> int:
        call = self._call()
        if not 0 < block_threads <= MAX_THREADS_PER_BLOCK:
            return INVALID_VALUE
        target = call.target
        by_threads = target.max_threads_per_sm // block_threads
        by_smem = target.smem_per_sm_bytes // (smem_bytes + target.smem_reserved_per_block_bytes)
        blocks[0] = min(by_threads, by_smem, device_attributes(target)[106])
        return SUCCESS

    def _describe_failure(self, text: int, size: int) -> int:
        failure = getattr(self._thread, "failure", None)
        message = "" if failure is None else f"{type(failure).__name__}: {failure}"
        encoded = message.encode(errors="replace")[: size - 1] + b"\0"
        ctypes.memmove(text, encoded, len(encoded))
        return SUCCESS

    def _encode_tensor_map(self, request: Any) -> int:
        self._call()
        try:
            data = encode_request(request.contents)
        except InvalidArgumentError:
            return INVALID_VALUE
        ctypes.memmove(request.contents.map, data, len(data))
        return SUCCESS

    def _launch(self, kernel: int, config: int, parameters: Any) -> int:
        handle, call = self._kernel(kernel), self._call()
        request = read_launch_config(config, handle, parameters)
        if not _is_legal(request, call.target):
            return INVALID_CONFIGURATION
        allowed = max(DEFAULT_SMEM_BYTES, handle.attributes.get(MAX_DYNAMIC_SMEM, 0))
        if request.smem_bytes > allowed:
            return INVALID_VALUE
        call.launch(request)
        return SUCCESS


@cache
def runtime() -> Runtime:
    """The stand-in of this process."""
    return Runtime()


def read_launch_config(config: int, kernel: KernelHandle, parameters: Any) -> LaunchRequest:
    """Decode a ``cudaLaunchConfig_t`` (CUDA runtime API, "Data types").

    gridDim and blockDim are three uint32 each at bytes 0 and 12, dynamicSmemBytes a uint64 at 24,
    stream at 32, attrs a pointer at 40, numAttrs a uint32 at 48. An attribute record has 72 bytes:
    its id at 0 and a 64-byte value at 8.
    """
    raw = ctypes.string_at(config, 52)
    gx, gy, gz, bx, by, bz, smem_bytes, stream, records, count = struct.unpack("<6IQQQI", raw)
    attributes = {}
    cluster = (1, 1, 1)
    for index in range(count):
        record = ctypes.string_at(records + 72 * index, 72)
        identifier, x, y, z = struct.unpack_from("<I4x3I", record)
        if identifier == LAUNCH_CLUSTER_DIMENSION:
            cluster = (x, y, z)
        else:
            attributes[identifier] = x
    return LaunchRequest(
        kernel, (gx, gy, gz), (bx, by, bz), smem_bytes, stream, cluster, attributes, parameters
    )


def _is_legal(request: LaunchRequest, target: Target) -> bool:
    (bx, by, bz), cluster = request.block, request.cluster
    return (
        all(0 < got <= most for got, most in zip(request.grid, MAX_GRID, strict=True))
        and all(0 < got <= most for got, most in zip(request.block, MAX_BLOCK, strict=True))
        and bx * by * bz <= MAX_THREADS_PER_BLOCK
        and all(c > 0 and g % c == 0 for g, c in zip(request.grid, cluster, strict=True))
        and (cluster == (1, 1, 1) or target.major >= 9)
        and cluster[0] * cluster[1] * cluster[2] <= 16
    )


# --- Device images ---

_FATBIN_MAGIC = 0xBA55ED50
_FATBIN_ELF = 2


def image_digest(image: bytes) -> str:
    """What a device image is known by: the digest of its ELF bytes."""
    return hashlib.sha256(image).hexdigest()


def image_digest_at(address: int) -> str:
    """Digest of the ELF image inside the fat binary that lies at ``address``.

    The host code carries a fat binary: a header (magic, version, header bytes as uint16, payload
    bytes as uint64), then entries, each with its own header (kind as uint16, header bytes as uint32
    at 4, payload bytes as uint64 at 8).
    """
    magic, _, header_bytes, total = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _FATBIN_MAGIC:
        raise CompileError(
            "the host function loads a device image of an unknown kind",
            got=f"magic number {magic:#x}",
            expected=f"a fat binary ({_FATBIN_MAGIC:#x})",
        )
    payload = ctypes.string_at(address + header_bytes, total)
    position = 0
    while position < total:
        kind, _, entry_header, entry_bytes = struct.unpack_from("<HHIQ", payload, position)
        start = position + entry_header
        position = start + entry_bytes
        image = payload[start:position]
        if kind == _FATBIN_ELF and image.startswith(b"\x7fELF"):
            return image_digest(image)
    raise CompileError(
        "the fat binary that the host function loads holds no plain ELF image",
        expected="one uncompressed cubin",
    )
