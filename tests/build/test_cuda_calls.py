"""What a call does on a machine with a GPU: NVIDIA's own launch code, above a CUDA runtime that
keeps a record of what it is asked and lets the simulator run what is launched.

The kernels, their launch code and how it is linked and loaded are what a GPU gets. Not covered:
the CUDA runtime inside NVIDIA's library and the driver; of that library, how it reports that there
is no usable GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cute_fa.problem import KernelVariant
from cute_fa.sim.runtime import image_digest
from tests.build import cuda_runtime

FA2 = ("fa2", "sm_90a", KernelVariant("bfloat16", 64, 64, causal=True))
WISHES = (
    FA2,
    ("fa3", "sm_90a", KernelVariant("float16", 64, 64)),
    ("fa3", "sm_90a", KernelVariant("bfloat16", 64, 64, is_varlen=True, has_seqused_k=True)),
    ("fa3", "sm_90a", KernelVariant("float8_e4m3fn", 64, 64)),
    ("fa4", "sm_100a", KernelVariant("bfloat16", 256, 256)),
)
PAIRS = "fa4 fwd sm_100a bfloat16 d256"


def as_argument(*wishes: tuple[str, str, KernelVariant]) -> str:
    return json.dumps([(generation, arch, vars(variant)) for generation, arch, variant in wishes])


def test_launches_are_those_of_the_simulator(tmp_path: Path) -> None:
    kernels = [cuda_runtime.kernel_for(*wish) for wish in WISHES]
    calls = cuda_runtime.in_a_process(tmp_path, "compiled", as_argument(*WISHES))
    assert [call["label"] for call in calls] == [kernel.label for kernel in kernels]
    for kernel, call in zip(kernels, calls, strict=True):
        [launch] = call["cuda"]
        assert launch["image"] == image_digest(kernel.cubin)
        assert launch["name"] == kernel.kernel_name
        assert launch["cluster"] == ([2, 1, 1] if kernel.label == PAIRS else [1, 1, 1])
        asked = [name for name, *_ in call["calls"]]
        assert asked == ["load", "kernel", "set", "set", "launch"]
        assert cuda_runtime.as_the_simulator_was_told(call), kernel.label


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is raised after each failure of the CUDA runtime."""
    cuda_runtime.kernel_for(*FA2)
    folder = tmp_path_factory.mktemp("cuda")
    [found] = cuda_runtime.in_a_process(folder, "failures", as_argument(FA2))
    return found


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("cudaGetDeviceCount", "cudaError100"),
        ("cudaLibraryLoadData", "cudaError209"),
        ("cudaLibraryGetKernel", "cudaError500"),
        ("cudaKernelSetAttributeForDevice", "cudaError1 "),
        ("cudaGetDevice", "CUDA Error Code: 101"),
        ("cudaLaunchKernelExC", "CUDA Error Code: 719"),
    ],
)
def test_what_the_runtime_refuses_is_raised(
    failures: dict[str, Any], failing: str, said: str
) -> None:
    assert failures[failing].startswith("RuntimeError: ") and said in failures[failing]


def test_calls_behind_a_failure_are_like_any_other(failures: dict[str, Any]) -> None:
    assert failures["nothing"] == failures["nothing again"] == "1 launched"


def test_a_call_runs_on_the_device_of_its_tensors(failures: dict[str, Any]) -> None:
    """And the device that was the current one is that again."""
    assert failures["device 1"] == "1 launched"
    assert failures["calls for device 1"] == [["set device", 1], ["launch", 1], ["set device", 0]]
    assert failures["device behind them"] == 0


WITHOUT_DEVICE = """
import json, sys
import torch
from cute_fa.build import compile
from cute_fa.sim import tensors
kernel = compile("fa2", arch="sm_90a", dtype="bfloat16", head_dim=64, causal=True)
q, lse = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 8)
arguments = [tensors.to_tvm_ffi(x) for x in (q, q, q, q.clone(), lse)]
try:
    kernel.host("cuda")(*arguments, 1.0, 0.0, 100, 100)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [(100, "no CUDA-capable device"), (803, "unsupported display driver")],
)
def test_a_driver_that_does_not_initialise(tmp_path: Path, code: int, said: str) -> None:
    """With the whole of NVIDIA's library, whose CUDA runtime asks the driver."""
    cuda_runtime.kernel_for(*FA2)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(cuda_runtime.build_driver(tmp_path).parent),
        "STAND_IN_INIT": str(code),
        "PYTHONPATH": str(cuda_runtime.ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEVICE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in result.stdout
