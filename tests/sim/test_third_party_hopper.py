"""quack-kernels' sm_90 programs, unmodified: clusters with st.async, and TMA / WGMMA GEMMs.

Its GEMM is warp-specialised and persistent: a TMA producer with multicast over a cluster of two,
setmaxnreg, two consumer warpgroups that overlap one WGMMA group with the next, a tile scheduler
that broadcasts through st.async, and an epilogue through stmatrix and TMA stores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cute_fa.sim.device import Device
from tests.sim.third_party import POLICIES, fresh_quack

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="no quack-kernels"),
]

ROWS = 4
COLUMNS = 32768  # wide enough for a cluster of two


@pytest.fixture(scope="module")
def quack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    torch.manual_seed(0)
    with fresh_quack(tmp_path_factory.mktemp("quack")) as package:
        yield package


def run(completion: str, program, *args, **kwargs) -> tuple[torch.Tensor, Device]:  # type: ignore[no-untyped-def]
    with Device("sm_90a", workers=1, completion=completion, seed=1) as dev:
        out = program(*args, **kwargs)
    assert dev.launches and all(launch.hazards == [] for launch in dev.launches)
    return out.detach(), dev


def test_softmax_over_a_cluster(quack: ModuleType) -> None:
    x = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    results = []
    for completion in POLICIES:
        out, dev = run(completion, quack.softmax, x)
        assert dev.launches[0].cluster == (1, 2, 1)
        results.append(out)
    torch.testing.assert_close(results[0].float(), x.float().softmax(-1), rtol=1e-2, atol=1e-5)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rmsnorm_over_a_cluster(quack: ModuleType) -> None:
    x, weight = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16), torch.randn(COLUMNS)
    want = F.rms_norm(x.float(), (COLUMNS,), weight, eps=1e-6)
    for completion in POLICIES:
        out, dev = run(completion, quack.rmsnorm, x, weight)
        assert dev.launches[0].cluster == (1, 2, 1)
        torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("completion", POLICIES)
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [(256, 456, 320, torch.bfloat16), (200, 136, 72, torch.float16)],
)
def test_gemm(
    quack: ModuleType, completion: str, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Small whole numbers, so that every product and sum is exact: the result has to be, too."""
    from quack.gemm_interface import gemm

    a = torch.randint(-3, 4, (m, k)).to(dtype)
    b = torch.randint(-3, 4, (k, n)).to(dtype)
    out, dev = run(completion, gemm, a, b, tuned=False)
    assert torch.equal(out, (a.float() @ b.float()).to(dtype))
    counters = dev.launches[-1].counters
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert counters[f"mma_flops.{kind}"] >= 2 * m * n * k
    assert counters["tensor_copies"] > 0
    assert counters["global_bytes_written"] == m * n * 2
