"""Simulated and real programs in one process, whichever runtime was loaded first."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys
import cutlass, torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from cute_fa import sim
from cute_fa.build.toolchain import runtime_library

order, options, kept_path = sys.argv[1:]
if order == "real-first":
    ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)

@cute.kernel
def add_one(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = x[thread] + 1.0

@cute.jit
def launch(x: cute.Tensor):
    add_one(x).launch(grid=(1, 1, 1), block=(32, 1, 1))

def compiled(x):
    return cute.compile(launch, from_dlpack(x), **({"options": options} if options else {}))

def call(run, x):
    run(x if options else from_dlpack(x))

with sim.Device("sm_80") as device:
    x = torch.zeros(32)
    simulated = compiled(x)
    call(simulated, x)
    assert x.eq(1).all() and len(device.launches) == 1

# Outside the block this is NVIDIA's runtime, which finds no driver here.
real = compiled(x)
try:
    call(real, x)
except Exception as error:
    print("cuda" in str(error).lower())
else:
    print("ran")
assert len(device.launches) == 1

with device:
    call(simulated, x)
    assert x.eq(2).all() and len(device.launches) == 2
    if options:
        # What the program exports calls the plain names, and is linked like the rest here.
        simulated.export_to_c(kept_path, function_name="kept")
        kept = cute.runtime.load_module(kept_path, enable_tvm_ffi=True).kept
        assert b"cute_fa_sim" not in open(kept_path, "rb").read()
        call(kept, x)
        assert x.eq(3).all() and len(device.launches) == 3
"""


@pytest.mark.parametrize("options", ["", "--enable-tvm-ffi"])
@pytest.mark.parametrize("order", ["real-first", "simulated-first"])
def test_real_and_simulated_programs_side_by_side(order: str, options: str, tmp_path: Path) -> None:
    """Neither is linked to the other's runtime."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("tells the runtimes apart by the missing driver")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)  # the DSL reads the source of what it compiles
    command = [sys.executable, str(program), order, options, str(tmp_path / "kept.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"
