"""The stand-in for the CUDA runtime, called as compiled host code calls it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cute_fa.errors import CacheError, CompileError, MissingToolError
from cute_fa.sim import runtime as rt
from cute_fa.sim.tensor_map import TensorMap, decode
from cute_fa.target import TARGETS, Target, get_target


class RecordingCall:
    """A call that keeps its launches, or fails them."""

    def __init__(self, target: Target, failure: BaseException | None = None) -> None:
        self.target = target
        self.failure = failure
        self.requests: list[rt.LaunchRequest] = []

    def launch(self, request: rt.LaunchRequest) -> None:
        if self.failure is not None:
            raise self.failure
        self.requests.append(request)


@pytest.fixture
def stub() -> ctypes.CDLL:
    # The one this process loaded: a test before may have had another cache directory.
    return ctypes.CDLL(str(rt.runtime().path))


@pytest.fixture
def call() -> Iterator[RecordingCall]:
    recording = RecordingCall(get_target("sm_80"))
    with rt.runtime().running(recording):
        yield recording


def fatbin(*images: bytes) -> bytes:
    """A fat binary of the layout that the DSL embeds (checked against one by test_device)."""
    entries = b"".join(
        struct.pack("<HHIQ", 2, 0x101, 72, len(image)).ljust(72, b"\0") + image for image in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


ELF = b"\x7fELF" + bytes(range(200))


def load_kernel(stub: ctypes.CDLL, name: bytes, image: bytes = ELF) -> ctypes.c_void_p:
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    assert stub._cudaLibraryLoadData(ctypes.byref(library), fatbin(image), *[None] * 6) == 0
    assert stub._cudaLibraryGetKernel(ctypes.byref(kernel), library, name) == 0
    return kernel


def launch_config(
    grid: tuple[int, int, int] = (2, 3, 4),
    block: tuple[int, int, int] = (64, 2, 1),
    smem_bytes: int = 0,
    attributes: bytes = b"",
) -> ctypes.Array[ctypes.c_char]:
    records = ctypes.create_string_buffer(attributes, max(len(attributes), 1))
    packed = struct.pack(
        "<6IQQQI",
        *grid,
        *block,
        smem_bytes,
        0,
        ctypes.addressof(records),
        len(attributes) // 72,
    )
    config = ctypes.create_string_buffer(packed, 56)
    config.records = records  # keeps them alive
    return config


def attribute(identifier: int, *words: int) -> bytes:
    return struct.pack(f"<I4x{len(words)}I", identifier, *words).ljust(72, b"\0")


def test_library_is_built_once_into_a_private_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "cache"))
    first = rt.stub_library()
    assert first.parent.parent == tmp_path / "cache" / "sim"
    assert first.parent.stat().st_mode & 0o777 == 0o700
    kept = {first.name, first.with_suffix(".sha256").name}  # nothing left over beside them
    assert {path.name for path in first.parent.iterdir()} == kept
    built = first.stat().st_mtime_ns
    rt._build_stub.cache_clear()
    assert rt.stub_library() == first
    assert first.stat().st_mtime_ns == built


def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    library = rt.stub_library()
    good = library.read_bytes()
    library.write_bytes(good[: len(good) // 2])
    rt._build_stub.cache_clear()
    assert rt.stub_library().read_bytes() == good


def test_an_unusable_cache_directory_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match="set CUTE_FA_CACHE_DIR"):
        rt.stub_library()


def test_no_compiler_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingToolError, match="apt-get install gcc"):
        rt.stub_library()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingToolError, match="CC=no-such-compiler, which is not found"):
        rt.stub_library()


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'stdint: no such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(CompileError, match="stdint: no such file"):
        rt.stub_library()
    assert not list((tmp_path / "sim").rglob("*.so"))


def test_launch_arrives_with_all_that_the_host_asked_for(
    stub: ctypes.CDLL, call: RecordingCall
) -> None:
    kernel = load_kernel(stub, b"scale")
    value = ctypes.c_uint64(0x1122334455667788)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(value))
    # Only the first word of an integer attribute means something; the host leaves the rest as is.
    config = launch_config(smem_bytes=1000, attributes=attribute(6, 1, 0xDEAD) + attribute(2, 0))
    assert stub._cudaLaunchKernelEx(config, kernel, parameters) == 0
    (request,) = call.requests
    assert request.kernel.name == "scale"
    assert request.kernel.image_digest == rt.image_digest(ELF)
    assert (request.grid, request.block, request.cluster) == ((2, 3, 4), (64, 2, 1), (1, 1, 1))
    assert request.smem_bytes == 1000
    assert request.attributes == {6: 1, 2: 0}
    assert request.parameter(0, 8) == struct.pack("<Q", value.value)


def test_same_kernel_name_in_two_images_stays_apart(stub: ctypes.CDLL, call: RecordingCall) -> None:
    other = ELF + b"other"
    for image in (ELF, other):
        kernel = load_kernel(stub, b"same", image)
        assert stub._cudaLaunchKernelEx(launch_config(), kernel, None) == 0
    assert [r.kernel.image_digest for r in call.requests] == [
        rt.image_digest(ELF),
        rt.image_digest(other),
    ]


def test_clusters_are_read_and_need_hopper(stub: ctypes.CDLL) -> None:
    config = launch_config(grid=(4, 2, 1), attributes=attribute(4, 2, 2, 1))
    for arch, code in (("sm_90a", 0), ("sm_80", rt.INVALID_CONFIGURATION)):
        recording = RecordingCall(get_target(arch))
        with rt.runtime().running(recording):
            kernel = load_kernel(stub, b"clustered")
            assert stub._cudaLaunchKernelEx(config, kernel, None) == code
        assert [r.cluster for r in recording.requests] == ([(2, 2, 1)] if code == 0 else [])


@pytest.mark.parametrize(
    ("grid", "block"),
    [((0, 1, 1), (32, 1, 1)), ((1, 70000, 1), (32, 1, 1)), ((1, 1, 1), (1024, 2, 1))],
)
def test_impossible_extents_are_refused(
    stub: ctypes.CDLL,
    call: RecordingCall,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
) -> None:
    kernel = load_kernel(stub, b"k")
    config = launch_config(grid=grid, block=block)
    assert stub._cudaLaunchKernelEx(config, kernel, None) == rt.INVALID_CONFIGURATION
    assert not call.requests


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90a", "sm_120a"])
def test_dynamic_shared_memory_needs_the_attribute_and_has_the_targets_limit(
    stub: ctypes.CDLL, arch: str
) -> None:
    target = get_target(arch)
    limit = target.smem_per_block_bytes
    recording = RecordingCall(target)
    config = launch_config(smem_bytes=limit)
    with rt.runtime().running(recording):
        kernel = load_kernel(stub, b"big")
        assert stub._cudaLaunchKernelEx(config, kernel, None) == rt.INVALID_VALUE
        assert stub._cudaFuncSetAttribute(kernel, 8, limit + 1) == rt.INVALID_VALUE
        assert stub._cudaFuncSetAttribute(kernel, 8, limit) == 0
        assert stub._cudaLaunchKernelEx(config, kernel, None) == 0
    assert [r.smem_bytes for r in recording.requests] == [limit]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.arch)
def test_device_attributes_are_the_targets(stub: ctypes.CDLL, target: Target) -> None:
    value = ctypes.c_int()
    expected = {
        16: target.sm_count,
        39: target.max_threads_per_sm,
        75: target.compute_capability[0],
        76: target.compute_capability[1],
        81: target.smem_per_sm_bytes,
        97: target.smem_per_block_bytes,
    }
    with rt.runtime().running(RecordingCall(target)):
        for number, want in expected.items():
            assert stub._cudaDeviceGetAttribute(ctypes.byref(value), number, 0) == 0
            assert value.value == want
        assert stub._cudaDeviceGetAttribute(ctypes.byref(value), 16, 1) == 101
        assert stub._cudaDeviceGetAttribute(ctypes.byref(value), 9999, 0) == rt.INVALID_VALUE


def test_occupancy_counts_threads_and_shared_memory(stub: ctypes.CDLL, call: RecordingCall) -> None:
    kernel = load_kernel(stub, b"k")
    blocks = ctypes.c_int()
    query = stub._cudaOccupancyMaxActiveBlocksPerMultiprocessor
    for threads, smem_bytes, want in ((128, 0, 16), (1024, 0, 2), (128, 80 * 1024, 2)):
        assert query(ctypes.byref(blocks), kernel, threads, ctypes.c_size_t(smem_bytes)) == 0
        assert blocks.value == want


def test_exception_of_a_launch_is_raised_where_the_host_code_was_called(
    stub: ctypes.CDLL,
) -> None:
    failing = RecordingCall(get_target("sm_80"), KeyError("a hazard"))
    with (
        pytest.raises(KeyError, match="a hazard") as caught,
        rt.runtime().running(failing),
    ):
        code = stub._cudaLaunchKernelEx(launch_config(), load_kernel(stub, b"k"), None)
        assert code == rt.LAUNCH_FAILURE
        raise RuntimeError("what the host code makes of the error code")
    assert caught.value is failing.failure
    with rt.runtime().running(RecordingCall(get_target("sm_80"))):  # nothing is left over
        pass


def test_outside_of_a_call_host_code_is_told_that_there_is_no_device(stub: ctypes.CDLL) -> None:
    kernel = load_kernel(stub, b"k")
    assert stub._cudaLaunchKernelEx(launch_config(), kernel, None) == rt.NOT_INITIALIZED
    value = ctypes.c_int()
    assert stub._cudaDeviceGetAttribute(ctypes.byref(value), 16, 0) == rt.NOT_INITIALIZED


def test_unknown_handles_are_refused(stub: ctypes.CDLL, call: RecordingCall) -> None:
    nobody = ctypes.c_void_p(2**40)
    assert stub._cudaLaunchKernelEx(launch_config(), nobody, None) == rt.INVALID_HANDLE
    assert stub._cudaLibraryUnload(nobody) == rt.INVALID_HANDLE
    kernel = ctypes.c_void_p()
    assert stub._cudaLibraryGetKernel(ctypes.byref(kernel), nobody, b"k") == rt.INVALID_HANDLE


def test_an_image_of_another_kind_is_an_error_in_words(
    stub: ctypes.CDLL, call: RecordingCall
) -> None:
    library = ctypes.c_void_p()
    with (
        pytest.raises(CompileError, match="unknown kind"),
        rt.runtime().running(call),
    ):
        stub._cudaLibraryLoadData(
            ctypes.byref(library), b"//\n.version 8.8" + bytes(64), *[None] * 6
        )


def test_error_names_are_those_of_the_cuda_runtime(stub: ctypes.CDLL) -> None:
    stub.cuda_dialect_get_error_name.restype = ctypes.c_char_p
    for code, name in (
        (0, b"cudaSuccess"),
        (rt.INVALID_VALUE, b"cudaErrorInvalidValue"),
        (rt.INVALID_CONFIGURATION, b"cudaErrorInvalidConfiguration"),
        (rt.LAUNCH_FAILURE, b"cudaErrorLaunchFailure"),
    ):
        assert stub.cuda_dialect_get_error_name(code) == name


def test_tvm_ffi_errors_carry_the_code_and_what_went_wrong(stub: ctypes.CDLL) -> None:
    heard: list[tuple[bytes, bytes]] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p), ctypes.c_int32)
    set_error = kind(lambda name, parts, count: heard.append((name, b"".join(parts[:count]))))
    failing = RecordingCall(get_target("sm_80"), KeyError("a hazard"))
    with pytest.raises(KeyError), rt.runtime().running(failing):
        stub._cudaLaunchKernelEx(launch_config(), load_kernel(stub, b"k"), None)
        stub.CuteDSLRT_TVMFFISetRaisedCudaError(set_error, rt.LAUNCH_FAILURE)
    assert heard == [(b"CUDADialectError", b"CUDA Error Code: 719\nKeyError: 'a hazard'")]


def test_device_memory_is_host_memory(stub: ctypes.CDLL) -> None:
    source, target = ctypes.create_string_buffer(b"abcdefg"), ctypes.create_string_buffer(8)
    stub._cudaMemcpyAsync(target, source, ctypes.c_size_t(4), 4, None)
    assert target.raw[:5] == b"abcd\0"
    stub._cudaMemset(target, ord("z"), ctypes.c_size_t(2))
    assert target.raw[:5] == b"zzcd\0"


@pytest.mark.parametrize("swizzle", [0, 3, 4, 5])
def test_tensor_maps_are_encoded_for_programs_that_ask_the_driver(
    stub: ctypes.CDLL, call: RecordingCall, swizzle: int
) -> None:
    """A 2-D bf16 tensor (CUtensorMapDataType 9); swizzles that are not simulated are refused."""
    out = ctypes.create_string_buffer(128)
    extents, strides = (ctypes.c_uint64 * 2)(100, 40), (ctypes.c_uint64 * 1)(208)
    box, steps = (ctypes.c_uint32 * 2)(64, 8), (ctypes.c_uint32 * 2)(1, 2)
    address = ctypes.c_void_p(0x7F00_0000_1000)
    shape = extents, strides, box, steps
    error = stub._cuTensorMapEncodeTiled(out, 9, 2, address, *shape, 0, swizzle, 2, 1)
    if swizzle == 5:
        assert error == 1
        return
    assert error == 0
    span, atom = {0: (0, 16), 3: (128, 16), 4: (128, 32)}[swizzle]
    assert decode(out.raw) == TensorMap(
        0x7F00_0000_1000, "bf16", 2, (100, 40), (2, 208), (64, 8), (1, 2), span, True, atom
    )


def test_interleaved_tensor_maps_are_refused(stub: ctypes.CDLL, call: RecordingCall) -> None:
    assert stub._cuTensorMapEncodeTiled(*[None] * 8, 1, 0, 0, 0) == 801
