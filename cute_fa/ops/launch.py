"""From a checked call to a launch: outputs, workspaces, and the compiled function for the backend.

Both backends run the same compiled object. On "cuda" its host function launches through the DSL's
CUDA runtime on torch's current stream; on "sim" the same host code launches on a
``cute_fa.sim.Device``, which runs the PTX on the CPU tensors' memory.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cute_fa.errors import MissingToolError
from cute_fa.ops import plans, sources
from cute_fa.ops.checks import ALIGNMENT_BYTES, Call
from cute_fa.ops.descales import NO_DESCALES, Descales
from cute_fa.problem import out_dtype
from cute_fa.varlen import VarlenProblem

if TYPE_CHECKING:
    from cute_fa.ops.varlen_checks import Lengths
    from cute_fa.problem import AttentionProblem
    from cute_fa.sim.device import Device
    from cute_fa.sim.execute import Launch

_last = threading.local()


def last_launches() -> tuple[Launch, ...]:
    """The simulated launches of this thread's latest call: counters, hazards, grid and so on.

    Empty if that call ran on a GPU, or had nothing to compute. What a call inside a
    ``with sim.Device(...) as dev`` block launches is kept in ``dev.launches`` too.
    """
    return getattr(_last, "launches", ())


def entered_device() -> Device | None:
    """The simulated device of the innermost ``with`` block.

    The simulator is not imported for the question: on a GPU neither it nor numpy is needed.
    """
    module = sys.modules.get("cute_fa.sim.device")
    return None if module is None else module.current_device()


def kernel_of(call: Call) -> Any:
    """The kernel that a checked call will run; compiled here if it has to be."""
    return sources.kernel(call.generation, call.target.arch, call.variant, call.kernels)


def nothing_simulated() -> None:
    """Say that this thread's latest call ran on a GPU."""
    _last.launches = ()


def keep_plan(
    key: Hashable, inputs: tuple[Tensor, ...], results: tuple[Tensor, Tensor], call: Call
) -> None:
    """Remember how a dense call on a GPU was launched; see ``plans``."""
    q = inputs[0]
    out, lse = results
    needs_other_strides = any(_with_legal_strides(x) is not x for x in inputs)
    if not call.has_work or needs_other_strides:
        return
    kernel, padded = kernel_of(call), call.padded
    sizes = (padded.batch, padded.seqlen_q, padded.heads_q)
    shapes = [
        (tuple(out.shape), out.dtype),
        (tuple(lse.shape), lse.dtype),
        *((w.shape, getattr(torch, w.dtype)) for w in kernel.config.workspace(*sizes)),
    ]
    outputs = tuple(plans.pattern(shape, dtype, q.device) for shape, dtype in shapes)
    plan = plans.Plan(kernel.host("cuda"), q.device, outputs, _scalars(padded))
    plans.remember(key, plan)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    descales: Descales = NO_DESCALES,
    device: Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a checked call.

    Args:
        descales: of FP8 inputs.
        device: the simulated device to run on; None makes one for the call's architecture.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, bfloat16 for FP8, and lse (B, Hq, Sq) in fp32, natural
        logarithm, both contiguous and new.
    """
    extras: tuple[Any, ...] = ()
    if q.dtype.itemsize == 1:
        extras = descales.arguments(q.shape[0], k.shape[2], q.device)
    return _launch(q, k, v, call, device, extras)


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    call: Call,
    *,
    descales: Descales = NO_DESCALES,
    device: Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a checked call on packed tensors.

    Args:
        descales, device: as of ``forward``.

    Returns:
        out (Tq, Hq, Dv) in q's dtype, bfloat16 for FP8, and lse (Hq, Tq) in fp32, natural
        logarithm, both contiguous and new; 0 and -inf in rows that do not count.
    """
    extras = _length_arguments(lengths, min(lengths.max_seqlen_q, q.shape[0]))
    if q.dtype.itemsize == 1:
        extras = (*descales.arguments(lengths.batch, k.shape[1], q.device), *extras)
    return _launch(q, k, v, call, device, extras, lengths)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    device: Device | None,
    extras: tuple[Any, ...],
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """Args:
    extras: what follows the scalars among the kernel's arguments.
    """
    _last.launches = ()
    out, lse = empty_outputs(q, v)
    if not call.has_work:
        return out.zero_(), lse.fill_(-math.inf)
    kernel = kernel_of(call)
    padded = call.padded
    rows = padded.seqlen_q if lengths is None else q.shape[0]
    workspace = [
        torch.empty(w.shape, dtype=getattr(torch, w.dtype), device=q.device)
        for w in kernel.config.workspace(padded.batch, rows, padded.heads_q)
    ]
    arguments = (
        *map(_with_legal_strides, (q, k, v)),
        *(out, lse, *workspace, *_scalars(padded)),
        *extras,
    )
    if call.backend == "sim":
        for memory in (out, lse, *workspace):
            memory.fill_(math.nan)  # an element that the kernel leaves out must not look right
    if lengths is not None and lengths.seqused_q is not None:
        _clear_rows_that_do_not_count(out, lse, call)
    if call.backend == "cuda":
        run_cuda(kernel, q.device, arguments)
    else:
        run_sim(kernel, device, arguments)
    return out, lse


def _length_arguments(lengths: Lengths, rows: int) -> tuple[Any, ...]:
    """What follows the scalars of a kernel for packed sequences, of which none has more ``rows``
    of queries."""
    return (
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        lengths.seqused_q,
        lengths.seqused_k,
        rows,
    )


def _clear_rows_that_do_not_count(out: Tensor, lse: Tensor, call: Call) -> None:
    """0 and -inf where the kernel will write nothing. Which rows those are only a GPU's own memory
    knows, so there it is all of them."""
    packing = call.problem.packing if isinstance(call.problem, VarlenProblem) else None
    if packing is None:
        out.zero_()
        lse.fill_(-math.inf)
        return
    for rows, stop in zip(packing.rows_q, packing.cu_seqlens_q[1:], strict=True):
        out[rows.stop : stop] = 0.0
        lse[:, rows.stop : stop] = -math.inf


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), or both without B if q is packed;
    contiguous whatever q's strides are: what torch.compile is told (the fake implementation) must
    be what it gets."""
    *batch, rows, heads_q, _ = q.shape
    dtype = getattr(torch, out_dtype(str(q.dtype).removeprefix("torch.")))
    out = q.new_empty(*batch, rows, heads_q, v.shape[-1], dtype=dtype)
    return out, q.new_empty(*batch, heads_q, rows, dtype=torch.float32)


def run_cuda(kernel: Any, device: torch.device, arguments: tuple[Any, ...]) -> None:
    """Launch on torch's current stream of ``device``, which need not be the current device."""
    # The host function takes its stream from the environment that TVM-FFI sets up from the
    # tensors' device: torch's current stream there.
    with torch.cuda.device(device):
        kernel.host("cuda")(*arguments)


def run_sim(kernel: Any, device: Device | None, arguments: tuple[Any, ...]) -> None:
    """Launch on a simulated device and remember what ran."""
    try:
        from cute_fa.sim.device import Device as SimulatedDevice
    except ModuleNotFoundError as error:
        raise MissingToolError(
            "CPU tensors run in the simulator, which needs a package that is not installed",
            got=f"no {error.name}",
            fix=f"pip install {error.name}, or pass CUDA tensors",
        ) from error
    device = SimulatedDevice(kernel.arch) if device is None else device
    before = len(device.launches)
    try:
        device.bind(kernel.host("sim"), kernel.ptx)(*arguments)
    finally:
        _last.launches = tuple(device.launches[before:])


def _scalars(problem: AttentionProblem) -> tuple[float, float, int, int]:
    """softmax_scale, softcap, window_left, window_right as the kernels take them.

    Bounds beyond Sq + Sk bound nothing; clamped, they cannot overflow the kernels' 32-bit sums.
    """
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
