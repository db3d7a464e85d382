"""Programs of quack-kernels for sm_120a run unmodified: TMA, ldmatrix and block-scaled mma.sync."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from cute_fa.sim.device import Device
from tests.sim.third_party import fresh_quack

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="no quack-kernels"),
]


@pytest.fixture(scope="module")
def quack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    torch.manual_seed(0)
    dynamo = importlib.import_module("torch._dynamo")
    with (
        fresh_quack(tmp_path_factory.mktemp("quack")) as package,
        dynamo.config.patch(disable=True),
    ):
        yield package


@pytest.mark.parametrize(
    ("form", "kind", "completion"), [("nvfp4", "e2m1", "late"), ("mxfp8", "e4m3", "random")]
)
def test_block_scaling(quack: ModuleType, form: str, kind: str, completion: str) -> None:
    from quack.blockscaled.operand import BlockScaledOperand
    from quack.gemm_interface import gemm

    a = BlockScaledOperand.quantize(torch.randn(128, 128, dtype=torch.bfloat16), form)
    b = BlockScaledOperand.quantize(torch.randn(128, 128, dtype=torch.bfloat16), form)
    with Device("sm_120a", workers=1, completion=completion, seed=1) as dev:
        out = gemm(a, b.mT, tuned=False)
    want = a.dequantize().double() @ b.dequantize().double().T
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-3)
    assert dev.launches and not any(launch.hazards for launch in dev.launches)
    assert dev.launches[-1].counters[f"mma_flops.{kind}"] >= 2 * 128**3
