"""cuDNN frontend's CuTe DSL attention for sm_80 runs unmodified on the simulated device.

Its host side reads tensors and launches from C++, so it sees the device through DLPack's C
interface and the stand-in runtime only.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import pytest
import torch

from cute_fa.sim.device import Device

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="no cudnn-frontend"),
]


@pytest.fixture
def device(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Device]:
    # The package keeps compiled kernels; not among the user's.
    cache = tmp_path_factory.getbasetemp() / "cudnn"
    monkeypatch.setenv("CUDNN_FRONTEND_COMPILED_CACHE", str(cache))
    torch.manual_seed(0)
    with Device("sm_80", workers=1) as dev:
        yield dev
    assert dev.launches
    assert all(launch.hazards == [] for launch in dev.launches)


def heads_first(batch: int, seqlen: int, heads: int, dim: int) -> torch.Tensor:
    """(B, H, S, D) over (B, S, H, D) memory."""
    x = torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16)
    return x.transpose(1, 2)


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))


def whole(size: int, tile: int) -> int:
    return tile * math.ceil(size / tile)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its natural-log LSE in float64; causal from the top left."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from cudnn.sdpa.fwd.api_dsl import SdpaFwdDslSm80

    out = poisoned(q[..., : v.shape[-1]])
    lse = torch.full(q.shape[:3], float("nan"), device="cuda")
    plan = SdpaFwdDslSm80(q, k, v, out, sample_lse=lse, is_causal=causal)
    assert plan.check_support()
    plan.compile()
    workspace = {}
    if plan.scratch_workspace_bytes():
        nbytes = plan.scratch_workspace_bytes()
        workspace["workspace"] = torch.empty(nbytes, device="cuda", dtype=torch.uint8)
    plan.execute(q, k, v, out, lse_tensor=lse, **workspace)
    return out, lse


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "heads_q", "heads_k", "dim", "causal"),
    [
        (128, 128, 2, 2, 64, False),
        (200, 200, 2, 1, 64, True),
        (70, 133, 2, 2, 128, False),
        (65, 65, 1, 1, 96, True),  # no kernel for this width: copies to padded tensors and back
    ],
)
def test_forward(
    device: Device,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_k: int,
    dim: int,
    causal: bool,
) -> None:
    q = heads_first(1, seqlen_q, heads_q, dim)
    k, v = (heads_first(1, seqlen_k, heads_k, dim) for _ in range(2))
    out, lse = forward(q, k, v, causal)
    want, want_lse = reference(q, k, v, causal)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    # Two matrix products; rows and columns are padded to tiles of 128, the width to one of 64.
    counted = sum(launch.counters.mma_flops for launch in device.launches)
    flops = 4 * heads_q * seqlen_q * seqlen_k * dim
    padded = 4 * heads_q * whole(seqlen_q, 128) * whole(seqlen_k, 128) * whole(dim, 64)
    assert flops / (2 if causal else 1) <= counted <= padded


def test_backward(device: Device) -> None:
    from cudnn.sdpa.bwd.api_dsl import SdpaBwdDslSm80

    q, k, v = (heads_first(1, 128, 1, 64) for _ in range(3))
    out, lse = forward(q, k, v, causal=True)
    grad = torch.randn_like(out)
    dq, dk, dv = map(poisoned, (q, k, v))
    plan = SdpaBwdDslSm80(q, k, v, out, grad, lse, dq, dk, dv, is_causal=True)
    assert plan.check_support()
    plan.compile()
    workspace = torch.empty(plan.scratch_workspace_bytes(), device="cuda", dtype=torch.uint8)
    plan.execute(q, k, v, out, grad, lse, dq, dk, dv, workspace=workspace)
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(reference(*leaves, causal=True)[0], leaves, grad.double())
    for got, expected in zip((dq, dk, dv), want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


def test_the_package_checks_the_simulated_architecture() -> None:
    from cudnn.sdpa.fwd.api_dsl import SdpaFwdDslSm80

    with Device("sm_86"):
        q = heads_first(1, 64, 1, 64)
        plan = SdpaFwdDslSm80(q, q, q, q)
        with pytest.raises(ValueError, match=r"requires SM80 .*found SM86 on cuda:0"):
            plan.check_support()
