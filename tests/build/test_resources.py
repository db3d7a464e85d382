"""Resources of a compiled kernel: the cubin's own figures, with the launch's."""

from __future__ import annotations

import pytest

from cute_fa.build import KernelEntry, compile
from cute_fa.target import KIB


def test_resources_of_a_small_kernel(tiny: KernelEntry) -> None:
    found = compile("tiny", arch="sm_80", dtype="half", head_dim=64).resources
    assert 4 <= found.registers <= 32 and found.role_registers == {"all": found.registers}
    assert not found.spills and found.stack_bytes == found.spill_store_bytes == 0
    assert (found.threads, found.smem_bytes) == (128, 0)
    # 2048 threads of an SM by 128; 16 warps' worth of registers would allow more
    assert (found.ctas_per_sm, found.limited_by) == (16, "threads")
    assert found.code_bytes > 0
    assert found.as_dict()["registers"] == found.registers


@pytest.mark.parametrize(
    ("arch", "ctas"),
    # (40 + 1) KiB into 164, 100 and 228 KiB
    [("sm_80", 4), ("sm_86", 2), ("sm_90a", 5), ("sm_120a", 2)],
)
def test_dynamic_shared_memory_comes_from_the_config(
    tiny: KernelEntry, arch: str, ctas: int
) -> None:
    compiled = compile("tiny", arch=arch, dtype="half", head_dim=64, smem_bytes=40 * KIB)
    found = compiled.resources
    assert found.dynamic_smem_bytes == 40 * KIB and found.smem_bytes >= 40 * KIB
    assert (found.ctas_per_sm, found.limited_by) == (ctas, "shared memory")


def test_threads_come_from_the_config(tiny: KernelEntry) -> None:
    compiled = compile("tiny", arch="sm_80", dtype="half", head_dim=64, num_threads=1024)
    assert (compiled.resources.threads, compiled.resources.ctas_per_sm) == (1024, 2)
