"""Programs of quack-kernels and cuDNN frontend for sm_100a and sm_103a run unmodified.

quack's GEMM is persistent and warp-specialised: TMA, tcgen05.mma by one CTA or a pair, tensor
memory, cluster launch control, epilogues through tensor-memory loads and TMA stores. cuDNN's
attention adds softmax in tensor memory, packed float32 arithmetic and a 2-CTA ring of K and V.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cute_fa.sim import device as device_module
from cute_fa.sim.device import Device
from tests.sim.third_party import POLICIES, fresh_quack

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="no quack-kernels"),
    pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="no cudnn-frontend"),
]

WARNINGS = {"tmem-lane-implied", "tmem-load-order"}
"""Found in cuDNN's programs: tensor memory addresses without the warp's own lanes, which the
hardware adds; stores to tensor memory that only a register dependency orders behind a load."""


@pytest.fixture(scope="module")
def quack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with fresh_quack(tmp_path_factory.mktemp("quack")) as package:
        yield package


@pytest.fixture(autouse=True)
def settings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The same random numbers, no compiled kernels of the user's, and no kernels for the CPU."""
    cache = tmp_path_factory.getbasetemp() / "cudnn-blackwell"
    monkeypatch.setenv("CUDNN_FRONTEND_COMPILED_CACHE", str(cache))
    torch.manual_seed(0)
    dynamo = importlib.import_module("torch._dynamo")
    with dynamo.config.patch(disable=True):
        yield


def run(program: Callable[[], Any], completion: str, arch: str = "sm_100a", **options: Any) -> Any:
    """(result, rules that were violated, last launch)."""
    with Device(arch, workers=1, completion=completion, seed=1, **options) as dev:
        out = program()
    rules = {hazard.rule for launch in dev.launches for hazard in launch.hazards}
    return out, rules, dev.launches[-1]


def whole(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Small whole numbers: every product and sum of them is exact."""
    return torch.randint(-3, 4, shape).to(dtype)


# --- quack's GEMM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("completion", POLICIES)
@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 128), (200, 136, 72)])
def test_pairs_of_ctas_multiply(quack: ModuleType, completion: str, m: int, n: int, k: int) -> None:
    from quack.gemm_interface import gemm

    a, b = whole(m, k), whole(k, n)
    out, rules, launch = run(lambda: gemm(a, b, tuned=False), completion)
    assert torch.equal(out, (a.float() @ b.float()).bfloat16())
    assert rules == set() and launch.cluster == (2, 1, 1)
    assert launch.counters["mma_flops.bf16"] >= 2 * m * n * k
    assert launch.counters["global_bytes_written"] == m * n * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_tf32_along_either_dimension(quack: ModuleType, transposed: bool) -> None:
    """Operands that are contiguous along m and n use 128-byte swizzles with atoms of 32 bytes."""
    from quack.gemm_interface import gemm

    a, b = whole(128, 96, dtype=torch.float32), whole(96, 128, dtype=torch.float32)
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    out, rules, _ = run(lambda: gemm(a, b, tuned=False), "eager")
    assert torch.equal(out, a @ b) and rules == set()


def test_stochastic_rounding_keeps_what_is_exact(quack: ModuleType) -> None:
    from quack.gemm_interface import gemm

    a, b = whole(128, 64), whole(64, 128)
    program = lambda: gemm(a, b, tuned=False, rounding_mode=1, sr_seed=3)  # noqa: E731
    out, rules, _ = run(program, "random")
    assert torch.equal(out, (a.float() @ b.float()).bfloat16()) and rules == set()


def test_an_epilogue_with_an_activation(quack: ModuleType) -> None:
    from quack.gemm_interface import gemm_act

    a, b = whole(128, 64), whole(64, 256)
    program = lambda: gemm_act(a, b, activation="gelu_tanh_approx", tuned=False)  # noqa: E731
    (before, after), rules, _ = run(program, "late")
    product = a.float() @ b.float()
    assert torch.equal(before, product.bfloat16()) and rules == set()
    want = F.gelu(product, approximate="tanh")
    torch.testing.assert_close(after.float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("left", "right", "completion"),
    [
        ("nvfp4", "nvfp4", "late"),
        ("mxfp4", "mxfp4", "eager"),
        ("mxfp8", "mxfp4", "random"),
        ("mxfp6_e2m3_packed", "mxfp6_e2m3_packed", "eager"),
    ],
)
def test_block_scaling(quack: ModuleType, left: str, right: str, completion: str) -> None:
    """Scale factors go through tensor memory; 4- and 6-bit elements are unpacked by the copies."""
    from quack.blockscaled.operand import BlockScaledOperand
    from quack.gemm_interface import gemm

    a = BlockScaledOperand.quantize(torch.randn(128, 256, dtype=torch.bfloat16), left)
    b = BlockScaledOperand.quantize(torch.randn(128, 256, dtype=torch.bfloat16), right)
    out, rules, _ = run(lambda: gemm(a, b.mT, tuned=False), completion)
    want = a.dequantize().double() @ b.dequantize().double().T
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-3)
    assert rules == set()


# --- cuDNN's GEMMs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile", "cluster", "completion"),
    [((128, 128), (1, 1), "late"), ((256, 128), (2, 1), "random")],
)
def test_gemm_with_swiglu(tile: tuple[int, int], cluster: tuple[int, int], completion: str) -> None:
    from cudnn.gemm.cutedsl.dense.swiglu.api import gemm_swiglu_wrapper_sm100

    a, b = whole(1, 256, 64), whole(1, 128, 64)
    out, rules, launch = run(
        lambda: gemm_swiglu_wrapper_sm100(
            a.permute(1, 2, 0), b.permute(1, 2, 0), mma_tiler_mn=tile, cluster_shape_mn=cluster
        ),
        completion,
    )
    product = a[0].float() @ b[0].float().T
    assert torch.equal(out["ab12_tensor"][..., 0], product)
    assert rules == set() and launch.cluster == (*cluster, 1)
    value, gate = product.reshape(256, 2, 2, 32).unbind(2)  # blocks of 32 columns take turns
    want = (value * F.silu(gate)).reshape(256, 64)
    torch.testing.assert_close(out["c_tensor"][..., 0].float(), want, rtol=2e-3, atol=2e-2)


def test_every_epilogue_warp_of_a_gemm_frees_the_tensor_memory() -> None:
    """A true finding: tcgen05.dealloc is executed by four warps, and three find nothing to free."""
    from cudnn.gemm.cutedsl.dense.amax.api import gemm_amax_wrapper_sm100

    codes = torch.randint(0, 256, (1, 128, 64), dtype=torch.uint8)
    operand = codes.view(torch.float4_e2m1fn_x2).permute(1, 2, 0)
    scales = torch.ones(1, 1, 2, 32, 4, 4).to(torch.float8_e4m3fn).permute(3, 4, 1, 5, 2, 0)
    out, rules, _ = run(
        lambda: gemm_amax_wrapper_sm100(operand, operand, scales, scales, sf_vec_size=16),
        "eager",
        strict=False,
    )
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    values = torch.stack([table[(codes[0] & 15).long()], table[(codes[0] >> 4).long()]], -1)
    product = values.flatten(1) @ values.flatten(1).T
    assert torch.equal(out["c_tensor"][..., 0], product)
    assert out["amax_tensor"].item() == product.abs().max()
    assert rules == {"tmem-allocation"}


# --- cuDNN's attention ----------------------------------------------------------------------------


def attention(
    seqlen: int, heads_q: int, heads_k: int, dim: int, causal: bool, dim_v: int | None = None
) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """The forward as a program of its own, and O and LSE as they should be."""

    def heads_first(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, seqlen, heads, width, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = (
        heads_first(heads_q, dim),
        heads_first(heads_k, dim),
        heads_first(heads_k, dim_v or dim),
    )

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        from cudnn.sdpa.fwd.api_dsl import SdpaFwdDslSm100

        out = torch.full((1, seqlen, heads_q, v.shape[-1]), math.nan, dtype=q.dtype)
        out = out.transpose(1, 2)
        lse = torch.full((1, heads_q, seqlen), math.nan)
        plan = SdpaFwdDslSm100(q, k, v, out, sample_lse=lse, is_causal=causal)
        assert plan.check_support()
        plan.compile()
        nbytes = plan.scratch_workspace_bytes()
        workspace = torch.empty(nbytes, dtype=torch.uint8) if nbytes else None
        plan.execute(q, k, v, out, lse_tensor=lse, workspace=workspace)
        return out, lse

    group = heads_q // heads_k
    wide = [t.double().repeat_interleave(group, 1) for t in (k, v)]
    scores = q.double() @ wide[0].mT / math.sqrt(dim)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return program, scores.softmax(-1) @ wide[1], scores.logsumexp(-1)


def check_attention(out: torch.Tensor, lse: torch.Tensor, *want: torch.Tensor) -> None:
    torch.testing.assert_close(out.double(), want[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("completion", POLICIES)
def test_causal_attention_with_shared_heads(completion: str) -> None:
    """Two heads of queries for one of keys, of 64 columns."""
    program, *want = attention(300, 2, 1, 64, causal=True)
    (out, lse), rules, launch = run(program, completion)
    check_attention(out, lse, *want)
    assert rules <= WARNINGS
    # Two matrix products; rows and columns in tiles of 128, half of them masked.
    assert 4 * 2 * 300 * 300 * 64 / 2 <= launch.counters["mma_flops.bf16"] <= 4 * 2 * 512 * 512 * 64


def test_attention_with_narrow_values_and_a_reducing_load() -> None:
    """192 columns of Q and K, 128 of V; sm_103a takes row maxima while it loads scores."""
    program, *want = attention(256, 1, 1, 192, causal=False, dim_v=128)
    (out, lse), rules, _ = run(program, "late", "sm_103a")
    check_attention(out, lse, *want)
    assert rules <= WARNINGS


def test_relaxed_arrivals_order_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two true findings in the program for 128 columns. The softmax warps store P to tensor memory,
    wait for the store and arrive with ``mbarrier.arrive.relaxed`` and no tcgen05.fence, which by
    the ISA orders nothing for the tensor core that reads P. And the warps that rescale O arrive at
    barriers of the pair's first CTA which it does not wait for again; the arrival that it waits for
    before it exits is relaxed as well, and orders none of them. Releasing instead is enough."""
    program, *want = attention(256, 2, 2, 128, causal=False)
    (out, lse), rules, _ = run(program, "eager", strict=False)
    check_attention(out, lse, *want)
    assert rules - WARNINGS == {"missing-tcgen05-fence", "exited-cta-access"}

    parse = device_module.parse_all
    relaxed, release = (f"mbarrier.arrive.{how}.cluster" for how in ("relaxed", "release"))

    def ordered(texts: list[str]) -> Any:
        assert any(relaxed in text for text in texts)
        return parse([text.replace(relaxed, release) for text in texts])

    monkeypatch.setattr(device_module, "parse_all", ordered)
    (out, lse), rules, _ = run(program, "eager")
    check_attention(out, lse, *want)
    assert rules <= WARNINGS
