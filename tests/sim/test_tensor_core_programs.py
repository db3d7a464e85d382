"""CuTe DSL programs with tcgen05.mma, compiled and run: one CTA and pairs, all policies."""

from __future__ import annotations

from typing import Any

import cutlass
import pytest
import torch
from cutlass.cute.runtime import from_dlpack

from cute_fa.sim.device import Device
from tests.sim.dsl_tensor_core import TensorCoreGemm

CASES = {
    "bf16": (cutlass.BFloat16, torch.bfloat16, 1, 128, 64),
    "tf32": (cutlass.TFloat32, torch.float32, 1, 128, 64),
    "e4m3": (cutlass.Float8E4M3FN, torch.float8_e4m3fn, 1, 128, 64),
    "pair, m 256": (cutlass.BFloat16, torch.bfloat16, 2, 256, 128),
    "pair, m 128": (cutlass.Float16, torch.float16, 2, 128, 64),
    "bf16, transposed": (cutlass.BFloat16, torch.bfloat16, 1, 128, 64, True),
    "tf32, transposed": (cutlass.TFloat32, torch.float32, 1, 128, 64, True),
    "pair, transposed": (cutlass.Float16, torch.float16, 2, 256, 64, True),
}


def as_tensor(x: torch.Tensor, element: type) -> Any:
    """A DSL tensor of types that DLPack does not know."""
    out = from_dlpack(x.view(torch.uint8) if x.element_size() == 1 else x, assumed_align=16)
    out.element_type = element
    return out


@pytest.mark.parametrize("case", CASES)
def test_gemm_of_small_integers_is_exact(case: str) -> None:
    dtype, kind, group, tile_m, tile_n, *transposed = CASES[case]
    generator = torch.Generator().manual_seed(3)
    m, n, k = 2 * tile_m, 2 * tile_n, 3 * 1024 // dtype.width
    a, b = (
        torch.randint(-3, 4, (rows, k), generator=generator).float().to(kind) for rows in (m, n)
    )
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    gemm = TensorCoreGemm(dtype, group, tile_m, tile_n, *transposed)

    want = (a.double() @ b.double().T).float()
    for completion in ("eager", "late", "random"):
        c = torch.full((m, n), float("nan"))
        with Device("sm_100a", completion=completion, workers=1, seed=5) as dev:
            arguments = as_tensor(a, dtype), as_tensor(b, dtype), as_tensor(c, cutlass.Float32)
            run = dev.compile(gemm, *arguments)
            run(*arguments)
        assert torch.equal(c, want)
        assert dev.launches[-1].hazards == []
        flops = dev.launches[-1].counters.by_class("mma_flops")
        assert sum(flops.values()) == 2 * m * n * k


def test_the_same_program_on_thor() -> None:
    """The DSL's compiler knows sm_110a by its first name, sm_101a."""
    a, b = (torch.eye(128, 64).to(torch.bfloat16), torch.arange(4096.0).view(64, 64).bfloat16())
    c = torch.full((128, 64), float("nan"))
    with Device("sm_110a", completion="late", workers=1) as dev:
        arguments = [from_dlpack(x, assumed_align=16) for x in (a, b, c)]
        run = dev.compile(TensorCoreGemm(cutlass.BFloat16), *arguments)
        run(*arguments)
    assert torch.equal(c, a.float() @ b.float().T)
    assert dev.launches[-1].hazards == []
    assert ".target sm_101a" in run.ptx or ".target sm_110a" in run.ptx
