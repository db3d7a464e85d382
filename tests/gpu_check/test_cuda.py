"""A bundle's kernels through NVIDIA's own launch code; see tests/build/test_cuda_calls.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cute_fa.ops.bundle import load_bundle
from cute_fa.sim.runtime import image_digest
from tests.build import cuda_runtime


@pytest.mark.parametrize("which", ["folder", "fp8_folder"])
def test_launches_are_those_of_the_simulator(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(which)
    bundle = load_bundle(folder)
    calls = cuda_runtime.in_a_process(tmp_path, "bundle", str(folder))
    assert [call["label"] for call in calls] == [kernel.label for kernel in bundle.kernels]
    for kernel, call in zip(bundle.kernels, calls, strict=True):
        [launch] = call["cuda"]
        assert launch["name"] == kernel.kernel_name
        if kernel.role == "default":
            compiled = cuda_runtime.kernel_for(kernel.generation, kernel.arch, kernel.variant)
            assert launch["image"] == image_digest(compiled.cubin)
        assert cuda_runtime.as_the_simulator_was_told(call), kernel.label
