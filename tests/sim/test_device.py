"""A simulated device runs what the DSL compiled: arguments, architectures, launches, errors."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
import numpy as np
import pytest
import torch
from cuda.bindings import driver
from cutlass.cute.runtime import from_dlpack, make_ptr

from cute_fa.errors import (
    CompileError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from cute_fa.sim import hosts
from cute_fa.sim.device import Device, current_device
from cute_fa.target import TARGETS, get_target, runs_on
from tests.processes import run_python
from tests.sim import dsl_programs as programs

STREAM = driver.CUstream(0)
FFI = "--enable-tvm-ffi"


def vectors(count: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, dtype=torch.float32), torch.full((count,), float("nan"))


def dynamic(tensor: torch.Tensor) -> Any:
    return from_dlpack(tensor, assumed_align=16).mark_layout_dynamic()


@pytest.fixture
def quiet() -> dict[str, Any]:
    """Options that leave the numbers of processes alone: these launches are tiny."""
    return {"workers": 1}


# --- Ways to hand over arguments ---


def test_legacy_host_function_takes_cute_tensors(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
        run(dynamic(x), dynamic(y), 3.0, STREAM)
    assert torch.equal(y, 3 * x)
    (launch,) = dev.launches
    assert (launch.grid, launch.block, launch.cluster) == ((2, 1, 1), (128, 1, 1), (1, 1, 1))
    assert launch.hazards == []


def test_legacy_host_function_takes_torch_tensors_and_arrays(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
        run(x, y, 3.0, STREAM)
        assert torch.equal(y, 3 * x)
        source, out = x.numpy().copy(), np.zeros(250, np.float32)
        run(source, out, 4.0, STREAM)
    assert np.array_equal(out, 4 * source)


def test_compiling_again_leaves_no_files_behind(
    quiet: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The DSL keeps compile options from one compilation to the next, in the block and after it."""
    monkeypatch.chdir(tmp_path)
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        dev.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
        dev.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
    with Device("sm_80", **quiet) as dev:
        dev.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
    assert list(tmp_path.iterdir()) == []


def test_tvm_ffi_host_function_takes_torch_tensors(quiet: dict[str, Any]) -> None:
    x, y = vectors(300)
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        run(x, y, 3.0)
    assert torch.equal(y, 3 * x)
    assert dev.launches[0].grid == (3, 1, 1)


def test_a_compiled_function_may_run_after_the_block(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
    run(x, y, 5.0)
    assert torch.equal(y, 5 * x)
    assert len(dev.launches) == 1


def test_views_share_their_storage_and_keep_out_of_the_rest(quiet: dict[str, Any]) -> None:
    storage = torch.full((300,), -1.0)
    x = torch.arange(100, dtype=torch.float32)
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        run(x, storage[100:200], 2.0)
    assert torch.equal(storage[100:200], 2 * x)
    assert (storage[:100] == -1).all() and (storage[200:] == -1).all()


def test_pointers_find_the_tensor_that_owns_them(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    space = cute.AddressSpace.gmem
    source, out = (make_ptr(cutlass.Float32, t.data_ptr(), space) for t in (x, y))
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale_pointers, source, out, 1, STREAM)
        run(source, out, 250, STREAM)
    assert torch.equal(y, 2 * x)


def test_cp_async_accepts_cpu_tensors_as_global_memory(quiet: dict[str, Any]) -> None:
    x, y = torch.randn(128), torch.zeros(128)
    with Device("sm_80", **quiet) as dev:
        arguments = [from_dlpack(t, assumed_align=16) for t in (x, y)]
        run = dev.compile(programs.reverse, *arguments, STREAM)
        run(*arguments, STREAM)
    assert torch.equal(y, x.flip(0))
    assert dev.launches[0].smem_bytes >= 512


def test_gradient_tracking_tensors_are_accepted(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    x.requires_grad_()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        run(x, y, 3.0)
    assert torch.equal(y, 3 * x.detach())


# --- Other people's programs: plain cute.compile, plain calls ---


def test_plain_compile_and_call_go_to_the_device(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        compiled = cute.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
        compiled(dynamic(x), dynamic(y), 2.0, STREAM)
        assert torch.equal(y, 2 * x)
        ffi = cute.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        ffi(x, y, 3.0)
    assert torch.equal(y, 3 * x)
    assert len(dev.launches) == 2


def test_jit_functions_may_be_called_directly(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        for factor in (2.0, 3.0):  # the second call finds the first one's code in the DSL's cache
            programs.scale(dynamic(x), dynamic(y), factor, STREAM)
            assert torch.equal(y, factor * x)
        programs.scale_without_stream(dynamic(x), dynamic(y), 4.0)
    assert torch.equal(y, 4 * x)
    assert len(dev.launches) == 3


def test_executors_launch_on_the_device(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        executor = cute.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM).to(None)
        executor(dynamic(x), dynamic(y), 2.0, STREAM)
    assert torch.equal(y, 2 * x)
    assert len(dev.launches) == 1


def test_launches_of_compiled_callers_arrive_without_an_announcement(quiet: dict[str, Any]) -> None:
    import tvm_ffi

    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        compiled = cute.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        # As C++ would: by the function's handle, not by the Python class that is hooked.
        native = tvm_ffi.convert(lambda *args: compiled.__tvm_ffi_object__()(*args))
        native(x, y, 3.0)
    assert torch.equal(y, 3 * x)
    assert len(dev.launches) == 1


# --- Architectures ---


@pytest.mark.parametrize("arch", TARGETS)
def test_every_architecture_follows_every_other_in_one_process(
    arch: str, quiet: dict[str, Any]
) -> None:
    x, y = vectors()
    with Device(arch, **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        run(x, y, 3.0)
        (target,) = re.findall(r"\.target (\w+)", run.ptx)
    assert runs_on(target, get_target(arch))  # by its name, or by an older one of the same
    assert torch.equal(y, 3 * x)


def test_devices_nest_and_the_inner_one_counts(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    arguments = programs.symbolic_scale_arguments()
    assert current_device() is None
    with Device("sm_80", **quiet) as outer:
        assert current_device() is outer
        with Device("sm_90a", **quiet) as inner:
            assert current_device() is inner
            run = inner.compile(programs.scale, *arguments, options=FFI)
            run(x, y, 2.0)
            assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_capability() == (8, 0)
        again = outer.compile(programs.scale, *arguments, options=FFI)
        run(x, y, 3.0)  # stays with its device
        again(x, y, 4.0)
    assert torch.equal(y, 4 * x)
    assert (len(inner.launches), len(outer.launches)) == (2, 1)
    assert ".target sm_90a" in run.ptx and ".target sm_80" in again.ptx


def test_devices_are_left_in_order(quiet: dict[str, Any]) -> None:
    first, second = Device("sm_80", **quiet), Device("sm_90a", **quiet)
    with first, pytest.raises(UnsupportedError, match="reverse order"):
        hosts.leave(second)


def test_code_of_another_architecture_is_refused_with_both_names(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_90a", **quiet):
        compiled = cute.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
    refusal = pytest.raises(CompileError, match=r"(?s)\.target sm_90a.*sm_80")
    with Device("sm_80", **quiet) as dev, refusal:
        compiled(x, y, 2.0)
    assert torch.isnan(y).all() and not dev.launches


# --- What is put back ---


def test_everything_is_as_before_after_the_block(quiet: dict[str, Any]) -> None:
    from cutlass.base_dsl import compiler, dsl, env_manager
    from cutlass.cutlass_dsl import cuda_jit_executor, tvm_ffi_provider

    watched = [
        torch.cuda,
        torch.Tensor,
        driver,
        compiler.CompileOptions,
        compiler.Compiler,
        dsl.BaseDSL,
        env_manager,
        cuda_jit_executor.CudaDialectJitCompiledFunction,
        tvm_ffi_provider.TVMFFIJitCompiledFunction,
        tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs,
        type(from_dlpack(torch.zeros(1))),
        cutlass.utils.HardwareInfo,
        *(singleton.envar for singleton in hosts._dsl_singletons()),
    ]
    before = [dict(vars(owner)) for owner in watched]
    x = torch.zeros(4)
    with pytest.raises(ZeroDivisionError), Device("sm_80", **quiet):
        assert torch.cuda.is_available() and x.is_cuda
        raise ZeroDivisionError
    for owner, was in zip(watched, before, strict=True):
        now = vars(owner)
        changed = {n for n in {*was, *now} if was.get(n, None) is not now.get(n, None)}
        assert not changed, f"{owner} keeps {changed}"
    assert not x.is_cuda and x.device.type == "cpu"


def test_no_variable_and_no_import_order_is_needed() -> None:
    program = """
        import sys
        from cute_fa.sim.device import Device
        assert "cutlass" not in sys.modules and "torch" not in sys.modules
        with Device("sm_86", workers=1) as dev:
            import torch
            from tests.sim import dsl_programs as programs
            x, y = torch.arange(10.0), torch.zeros(10)
            run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(),
                              options="--enable-tvm-ffi")
            run(x, y, 3.0)
        assert torch.equal(y, 3 * x), y
        print("ran", len(dev.launches))
    """
    assert run_python(program).stdout.strip() == "ran 1"


# --- Questions about the device ---


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_100a"])
def test_torch_and_the_driver_answer_for_the_device(arch: str, quiet: dict[str, Any]) -> None:
    target = get_target(arch)
    with Device(arch, **quiet):
        properties = torch.cuda.get_device_properties(0)
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == target.compute_capability
        assert (properties.major, properties.minor) == target.compute_capability
        assert properties.multi_processor_count == target.sm_count
        assert properties.shared_memory_per_block_optin == target.smem_per_block_bytes
        assert driver.CUstream(torch.cuda.current_stream().cuda_stream) is not None
        torch.cuda.synchronize()
        hardware = cutlass.utils.HardwareInfo()
        assert hardware.get_device_multiprocessor_count() == target.sm_count
        assert hardware.get_max_active_clusters(2) == target.sm_count // 2


def test_cpu_tensors_pass_for_cuda_tensors(quiet: dict[str, Any]) -> None:
    with Device("sm_80", **quiet):
        x = torch.arange(4.0, device="cuda")
        assert x.is_cuda and not x.is_cpu
        assert x.device == torch.device("cuda", 0) and x.get_device() == 0
        assert torch.empty_like(x).device.type == "cuda"
        assert torch.zeros(3, device=x.device).is_cuda
        assert x.cuda() is x and x.to("cuda") is x and x.to(device=x.device) is x
        host = x.cpu()
        x += 1
        assert host.tolist() == [0, 1, 2, 3]  # what went to the host is a copy
        assert x.to("cpu", torch.float64).tolist() == [1, 2, 3, 4]
        with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
            torch.testing.assert_close(x * 2, x + x)
    assert x.device.type == "cpu"


def test_operators_that_exist_for_cuda_only_are_called(quiet: dict[str, Any]) -> None:
    @torch.library.custom_op("cute_fa_test::double", mutates_args=(), device_types="cuda")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_autograd(lambda ctx, grad: grad * 2)
    x = torch.arange(3.0, requires_grad=True)
    with pytest.raises(NotImplementedError):
        double(x)
    with Device("sm_80", **quiet):
        out = double(x)
        out.sum().backward()
    assert out.tolist() == [0, 2, 4]
    assert x.grad.tolist() == [2, 2, 2]


# --- Compiled code from elsewhere, other PTX ---


def test_ptx_transform_decides_what_runs(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    arguments = programs.symbolic_scale_arguments()
    seen: list[str] = []

    def add_instead(text: str) -> str:
        seen.append(text)
        assert text.count("mul.f32") == 1
        return text.replace("mul.f32", "add.f32")

    with Device("sm_80", **quiet) as dev:
        plain = dev.compile(programs.scale, *arguments, options=FFI)
        changed = dev.compile(programs.scale, *arguments, options=FFI, ptx_transform=add_instead)
        changed(x, y, 3.0)
        assert torch.equal(y, x + 3)
        plain(x, y, 3.0)
        assert torch.equal(y, x * 3)
        changed(x, y, 4.0)
        assert torch.equal(y, x + 4)
    assert seen == [plain.ptx] and "add.f32" in changed.ptx


def export(compiled: Any, directory: Any, linked: bool) -> Any:
    """Export the function; link it against the stand-in runtime, or have the DSL load it."""
    from cute_fa.sim.runtime import runtime

    compiled.export_to_c(str(directory / "scale.o"), function_name="scale")
    if not linked:
        module = cute.runtime.load_module(str(directory / "scale.o"), enable_tvm_ffi=True)
        return module.scale
    import tvm_ffi

    command = ["cc", "-shared", "-o", str(directory / "scale.so"), str(directory / "scale.o")]
    subprocess.run([*command, str(runtime().path)], check=True)
    # Another runtime may have been loaded globally by now: its own libraries come first.
    ctypes.CDLL(str(directory / "scale.so"), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)
    return tvm_ffi.load_module(str(directory / "scale.so"))["scale"]


def test_bind_runs_an_exported_function_without_the_dsl_hooks(
    quiet: dict[str, Any], tmp_path: Any
) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        function = export(run.compiled, tmp_path, linked=True)
    other = Device("sm_80", **quiet)
    bound = other.bind(function, run.ptx)
    bound(x, y, 3.0)
    assert torch.equal(y, 3 * x)
    assert (len(dev.launches), len(other.launches)) == (0, 1)
    changed = other.bind(function, [run.ptx.replace("mul.f32", "add.f32")])
    changed(x, y, 3.0)
    assert torch.equal(y, x + 3)


def test_functions_that_a_program_kept_on_disk_still_run(
    quiet: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        compiled = cute.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        monkeypatch.setattr(hosts, "_captured", {})  # as a later process would find it
        export(compiled, tmp_path, linked=False)(x, y, 3.0)
    assert torch.equal(y, 3 * x)
    assert len(dev.launches) == 1


def test_unknown_compiled_code_is_an_error_in_words(
    quiet: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors()
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    with Device("sm_80", **quiet):
        compiled = cute.compile(programs.scale, dynamic(x), dynamic(y), 2.0, STREAM)
        monkeypatch.setattr(hosts, "_captured", {})
        with pytest.raises(UnsupportedError, match=r"(?s)PTX of kernel .*scale.* is not known"):
            compiled(x, y, 3.0, STREAM)


def test_bound_ptx_without_the_kernel_is_an_error(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(
            programs.scale,
            *programs.symbolic_scale_arguments(),
            options=FFI,
            ptx_transform=lambda text: text.replace("scale_kernel", "other_kernel"),
        )
        with pytest.raises(CompileError, match=r"the PTX has no kernel .*scale_kernel"):
            run(x, y, 3.0)


# --- Errors ---


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown architecture"):
        Device("sm_79")
    with pytest.raises(InvalidArgumentError, match=r"eager \| late \| random"):
        Device("sm_80", completion="never")


def test_too_much_shared_memory_is_refused_with_cudas_name(quiet: dict[str, Any]) -> None:
    out = torch.zeros(128)
    count = get_target("sm_80").smem_per_block_bytes // 4
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.wide_shared, from_dlpack(out), count, STREAM)
        run(from_dlpack(out), STREAM)
    assert (out == 1).all() and dev.launches[0].smem_bytes == 4 * count
    refusal = pytest.raises(Exception, match="cudaErrorInvalidValue")
    with Device("sm_86", **quiet) as small, refusal:
        run = small.compile(programs.wide_shared, from_dlpack(out), count, STREAM)
        run(from_dlpack(out), STREAM)
    assert not small.launches


@pytest.mark.parametrize("ffi", [False, True], ids=["legacy", "tvm-ffi"])
def test_hazards_are_raised_out_of_the_call(ffi: bool, quiet: dict[str, Any]) -> None:
    from cute_fa.sim.hazards import HazardError

    def ignore_the_end(text: str) -> str:
        assert re.search(r"@%p\d+ bra", text)
        return re.sub(r"@%p\d+ bra.*;", "", text)

    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        if ffi:
            arguments: tuple[Any, ...] = (*programs.symbolic_scale_arguments(),)
            call: tuple[Any, ...] = (x, y, 3.0)
        else:
            arguments = (dynamic(x), dynamic(y), 2.0, STREAM)
            call = (x, y, 3.0, STREAM)
        options = {"options": FFI} if ffi else {}
        run = dev.compile(programs.scale, *arguments, ptx_transform=ignore_the_end, **options)
        with pytest.raises(HazardError, match=r"(?i)out.of.bounds"):
            run(*call)


def test_hazards_are_raised_out_of_host_code_that_no_python_call_started(
    quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As programs do whose own C++ calls compiled functions."""
    import tvm_ffi

    from cute_fa.sim import hosts, tensors
    from cute_fa.sim.hazards import HazardError

    captured = hosts.captured_ptx

    def ignore_the_end(digest: str) -> str:
        return re.sub(r"@%p\d+ bra.*;", "", captured(digest) or "")

    arguments = tuple(map(tensors.to_tvm_ffi, (*vectors(), 3.0)))
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        function = run.compiled._tvm_ffi_function
        monkeypatch.setattr(hosts, "captured_ptx", ignore_the_end)
        with pytest.raises(HazardError, match=r"(?i)out.of.bounds") as raised:
            function(*arguments)
        assert raised.value.hazard.rule == "global-out-of-bounds"
        assert raised.value.launch is dev.launches[-1]
        monkeypatch.undo()
        function(*arguments)
    kept = tvm_ffi.core.ERROR_NAME_TO_TYPE["CUDADialectError"]
    assert isinstance(kept, type) and kept.__name__ == "CUDADialectError"


@pytest.mark.parametrize("result", [None, 3])
def test_a_ptx_transformation_has_to_return_ptx(result: object, quiet: dict[str, Any]) -> None:
    with Device("sm_80", **quiet) as dev, pytest.raises(InvalidTypeError, match=str(result)):
        dev.compile(
            programs.scale,
            *programs.symbolic_scale_arguments(),
            options=FFI,
            ptx_transform=lambda text: result,  # type: ignore[arg-type, return-value]
        )


def test_reports_instead_of_raising_where_not_strict(quiet: dict[str, Any]) -> None:
    x, short = torch.arange(250.0), torch.zeros(100)
    with Device("sm_80", strict=False, **quiet) as dev:
        run = dev.compile(programs.scale, dynamic(x), dynamic(short), 2.0, STREAM)
        run(x, short, 3.0, STREAM)
    assert torch.equal(short, 3 * x[:100])
    assert dev.launches[0].hazards


def test_memory_forgets_the_tensors_after_the_call(quiet: dict[str, Any]) -> None:
    x, y = vectors()
    with Device("sm_80", **quiet) as dev:
        run = dev.compile(programs.scale, *programs.symbolic_scale_arguments(), options=FFI)
        run(x, y, 3.0)
        assert dev.memory.regions == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"completion": "lazy"}, "completion"),
        ({"seed": "x"}, "seed is not an integer"),
        ({"seed": -1}, "seed is too small"),
        ({"workers": 0}, "workers is too small"),
        ({"workers": True}, "workers is not an integer"),
        ({"strict": 1}, "strict is not a bool"),
        ({"trace": "yes"}, "trace is not a bool"),
        ({"checks": "shared-race"}, "checks does not name rules"),
        ({"checks": 3}, "checks does not name rules"),
        ({"checks": ["rice"]}, "unknown hazard rule"),
    ],
)
def test_a_device_refuses_options_that_mean_nothing(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        Device("sm_80", **wrong)
