"""From a checked call to a launch: outputs, workspaces, and the compiled function for the backend.

Both backends run the same compiled object. On "cuda" its host function launches through the DSL's
CUDA runtime on torch's current stream; on "sim" the same host code launches on a
``cute_fa.sim.Device``, which runs the PTX on the CPU tensors' memory.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cute_fa.ops.checks import ALIGNMENT_BYTES, Call

if TYPE_CHECKING:
    from cute_fa.build import Compiled
    from cute_fa.problem import KernelVariant
    from cute_fa.sim.device import Device
    from cute_fa.sim.execute import Launch

_last = threading.local()


def last_launches() -> tuple[Launch, ...]:
    """The simulated launches of this thread's latest call: counters, hazards, grid and so on.

    Empty if that call ran on a GPU, or had nothing to compute. What a call inside a
    ``with sim.Device(...) as dev`` block launches is kept in ``dev.launches`` too.
    """
    return getattr(_last, "launches", ())


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, *, device: Device | None = None
) -> tuple[Tensor, Tensor]:
    """Run a checked call.

    Args:
        device: the simulated device to run on; None makes one for the call's architecture.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) in fp32, natural logarithm, both
        contiguous and new.
    """
    _last.launches = ()
    out, lse = empty_outputs(q, v)
    if not call.has_work:
        return out.zero_(), lse.fill_(-math.inf)
    kernel = compiled(call.generation, call.target.arch, call.problem.variant)
    problem = call.problem
    sizes = (problem.batch, problem.seqlen_q, problem.heads_q)
    workspace = [
        torch.empty(w.shape, dtype=getattr(torch, w.dtype), device=q.device)
        for w in kernel.config.workspace(*sizes)
    ]
    arguments = (*map(_with_legal_strides, (q, k, v)), out, lse, *workspace, *_scalars(call))
    if call.backend == "cuda":
        run_cuda(kernel, q.device, arguments)
    else:
        for memory in (out, lse, *workspace):
            memory.fill_(math.nan)  # an element that the kernel leaves out must not look right
        run_sim(kernel, device, arguments)
    return out, lse


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), contiguous whatever q's strides are:
    what torch.compile is told (the fake implementation) must be what it gets."""
    batch, seqlen_q, heads_q, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads_q, v.shape[-1])
    return out, q.new_empty(batch, heads_q, seqlen_q, dtype=torch.float32)


@cache
def compiled(generation: str, arch: str, variant: KernelVariant) -> Compiled:
    """The kernel for a variant, from this process, the disk cache or the compiler."""
    from cute_fa import build

    return build.compile(
        generation,
        "fwd",
        arch=arch,
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        head_dim_v=variant.head_dim_v,
        **variant_features(variant),
    )


def variant_features(variant: KernelVariant) -> dict[str, Any]:
    """Masking and softcap as ``build.compile`` takes them; the numbers themselves are arguments of
    the launch, any that say the same will do."""
    return {
        "causal": variant.causal,
        "window_size": (
            0 if variant.has_window_left else None,
            1 if variant.has_window_right else None,
        ),
        "softcap": 1.0 if variant.has_softcap else 0.0,
    }


def run_cuda(kernel: Compiled, device: torch.device, arguments: tuple[Any, ...]) -> None:
    """Launch on torch's current stream of ``device``, which need not be the current device."""
    # The host function takes its stream from the environment that TVM-FFI sets up from the
    # tensors' device: torch's current stream there.
    with torch.cuda.device(device):
        kernel.host("cuda")(*arguments)


def run_sim(kernel: Compiled, device: Device | None, arguments: tuple[Any, ...]) -> None:
    """Launch on a simulated device and remember what ran."""
    from cute_fa import sim

    device = sim.Device(kernel.arch) if device is None else device
    before = len(device.launches)
    try:
        device.bind(kernel.host("sim"), kernel.ptx)(*arguments)
    finally:
        _last.launches = tuple(device.launches[before:])


def _scalars(call: Call) -> tuple[float, float, int, int]:
    """softmax_scale, softcap, window_left, window_right as the kernels take them.

    Bounds beyond Sq + Sk bound nothing; clamped, they cannot overflow the kernels' 32-bit sums.
    """
    problem = call.problem
    reach = problem.seqlen_q + problem.seqlen_k
    left, right = (reach if b is None else min(b, reach) for b in problem.window)
    return float(problem.scale), float(problem.softcap), left, right


def _with_legal_strides(x: Tensor) -> Tensor:
    """x, with strides that pass the host function's checks in dimensions of one element.

    torch lets such a dimension have any stride, as slicing leaves it; it is never stepped along.
    """
    elements = ALIGNMENT_BYTES // x.element_size()
    strides = x.stride()
    if all(stride % elements == 0 for stride in strides[:-1]):
        return x
    legal = [
        elements if size == 1 and stride % elements else stride
        for size, stride in zip(x.shape[:-1], strides[:-1], strict=True)
    ]
    return x.as_strided(x.shape, (*legal, 1))
