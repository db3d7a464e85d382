"""Host functions: linked once, loaded without the DSL, their symbols from the runtime asked for."""

from __future__ import annotations

import contextlib
import ctypes
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cute_fa import sim
from cute_fa.build import Compiled, KernelEntry, compile
from cute_fa.build import host as host_module
from cute_fa.build.host import load_host
from cute_fa.build.toolchain import runtime_library
from cute_fa.errors import CompileError, InvalidArgumentError, MissingToolError
from cute_fa.sim import tensors
from cute_fa.sim.runtime import LaunchRequest, runtime
from cute_fa.target import TARGETS, Target


class Recorder:
    """Receives launches in the simulator's place."""

    target: Target = TARGETS["sm_80"]

    def __init__(self) -> None:
        self.requests: list[LaunchRequest] = []
        self.pointers: list[int] = []

    def launch(self, request: LaunchRequest) -> None:
        self.requests.append(request)
        self.pointers.append(int.from_bytes(request.parameter(0, 8), "little"))

    def call(self, function, *args) -> None:
        with runtime().running(self):
            function(*map(tensors.to_tvm_ffi, args))


@pytest.fixture
def compiled(tiny: KernelEntry) -> Compiled:
    return compile("tiny", arch="sm_80", dtype="half", head_dim=64)


def test_a_launch_reaches_the_simulator_for_any_size(compiled: Compiled) -> None:
    recorder = Recorder()
    for size in (1, 128, 129, 5000):
        x, y = torch.zeros(size), torch.zeros(size)
        recorder.call(compiled.host("sim"), x, y)
        request = recorder.requests[-1]
        assert request.grid == (math.ceil(size / 128), 1, 1) and request.block == (128, 1, 1)
        assert request.kernel.name == compiled.kernel_name
        assert recorder.pointers[-1] == x.data_ptr()


def test_the_simulator_runs_it(compiled: Compiled) -> None:
    device = sim.Device("sm_80")
    run = device.bind(compiled.host("sim"), compiled.ptx)
    x = torch.arange(300.0)
    y = torch.full_like(x, torch.nan)
    run(x, y)
    assert torch.equal(y, 2 * x)
    assert [launch.hazards for launch in device.launches] == [[]]


def test_the_host_function_checks_its_arguments(compiled: Compiled) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="expected dtype=float32"):
        recorder.call(compiled.host("sim"), torch.zeros(8), torch.zeros(8, dtype=torch.int32))
    assert recorder.requests == []


def test_the_linked_library_is_kept_and_used_again(compiled: Compiled) -> None:
    assert compiled.directory is not None
    assert compiled.host("sim") is compiled.host("sim")
    [library] = compiled.directory.glob("*.so")
    written = library.stat().st_mtime_ns
    load_host("sim", compiled.host_object, compiled.directory)
    assert library.stat().st_mtime_ns == written


def test_a_damaged_library_is_linked_again(compiled: Compiled) -> None:
    assert compiled.directory is not None
    load_host("sim", compiled.host_object, compiled.directory)
    [library] = compiled.directory.glob("*.so")
    good = library.read_bytes()
    library.unlink()
    library.write_bytes(good[: len(good) // 2])
    recorder = Recorder()
    recorder.call(load_host("sim", compiled.host_object, compiled.directory), *torch.zeros(2, 8))
    assert len(recorder.requests) == 1
    [library] = compiled.directory.glob("*.so")
    assert library.read_bytes() == good


@pytest.mark.parametrize("directory", [None, Path("/nonexistent/cute_fa")])
def test_without_a_directory_it_is_linked_in_a_temporary_one(
    compiled: Compiled, directory: Path | None
) -> None:
    recorder = Recorder()
    recorder.call(load_host("sim", compiled.host_object, directory), *torch.zeros(2, 8))
    assert len(recorder.requests) == 1


def test_an_unknown_backend(compiled: Compiled) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown backend"):
        compiled.host("opencl")


def test_a_symbol_that_the_runtime_lacks_is_named(tiny: KernelEntry, tmp_path: Path) -> None:
    source = tmp_path / "host.c"
    source.write_text("int _cudaNoSuchThing(void); int f(void) { return _cudaNoSuchThing(); }\n")
    subprocess.run(["cc", "-c", "-fPIC", str(source), "-o", str(tmp_path / "host.o")], check=True)
    with pytest.raises(CompileError, match="_cudaNoSuchThing"):
        load_host("sim", (tmp_path / "host.o").read_bytes(), None)


def test_no_compiler_is_an_error_that_says_what_to_install(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingToolError, match="install gcc or clang"):
        load_host("sim", compiled.host_object, None)


@contextlib.contextmanager
def no_gpu() -> Iterator[None]:
    """What a launch through the real runtime says on a machine without a usable GPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="cudaError"):
        yield


@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler"])
def test_cuda_and_sim_side_by_side(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    """Each has its own runtime, even with the real one in the global namespace of the process."""
    ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    simulated = load_host("sim", compiled.host_object, None)
    monkeypatch.setenv("CC", compiler)
    real = load_host("cuda", compiled.host_object, None)
    recorder = Recorder()
    arguments = [tensors.to_tvm_ffi(x) for x in torch.zeros(2, 8)]
    with no_gpu():
        real(*arguments)
    assert recorder.requests == []
    recorder.call(simulated, *torch.zeros(2, 8))
    assert len(recorder.requests) == 1


LOAD = """
import sys
from pathlib import Path
from cute_fa.build.host import load_host
for backend in ("sim", "cuda"):
    load_host(backend, Path(sys.argv[1], "host.o").read_bytes(), Path(sys.argv[1]))
print("cutlass" in sys.modules)
"""


def test_loading_needs_no_dsl(compiled: Compiled) -> None:
    command = [sys.executable, "-c", LOAD, str(compiled.directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_library_that_does_not_load_is_an_error(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.so"
    bad.write_bytes(b"not a library")
    monkeypatch.setattr(host_module, "_linked", lambda *arguments: bad)
    with pytest.raises(CompileError, match="does not load"):
        load_host("sim", compiled.host_object, tmp_path)


def test_a_kernel_compiled_on_a_simulated_device_is_like_any_other(tiny: KernelEntry) -> None:
    """Its artefacts are the same, and on "cuda" it goes to the real runtime."""
    with sim.Device("sm_80"):
        inside = compile("tiny", arch="sm_80", dtype="half", head_dim=64, use_cache=False)
    outside = compile("tiny", arch="sm_80", dtype="half", head_dim=64, use_cache=False)
    assert (inside.ptx, inside.cubin) == (outside.ptx, outside.cubin)
    assert inside.host_object == outside.host_object
    recorder = Recorder()
    with runtime().running(recorder), no_gpu():
        inside.host("cuda")(*[tensors.to_tvm_ffi(x) for x in torch.zeros(2, 8)])
    assert recorder.requests == []
    recorder.call(inside.host("sim"), *torch.zeros(2, 8))
    assert len(recorder.requests) == 1
