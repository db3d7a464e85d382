"""From a checked call to a launch: outputs, workspaces, and the compiled function for the backend.

Both backends run the same compiled object. On "cuda" its host function launches through the DSL's
CUDA runtime on torch's current stream; on "sim" the same host code launches on a
``cute_fa.sim.Device``, which runs the PTX on the CPU tensors' memory.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cute_fa.errors import MissingToolError
from cute_fa.ops import descales, plans, sources
from cute_fa.ops.checks import ALIGNMENT_BYTES, Call
from cute_fa.problem import out_dtype
from cute_fa.varlen import VarlenProblem

if TYPE_CHECKING:
    from cute_fa.problem import AttentionProblem
    from cute_fa.sim.device import Device
    from cute_fa.sim.execute import Launch


def last_launches() -> tuple[Launch, ...]:
    """The simulated launches of this thread's latest call: counters, hazards, grid and so on.

    Empty if that call ran on a GPU, or had nothing to compute. What a call inside a
    ``with sim.Device(...) as dev`` block launches is kept in ``dev.launches`` too.
    """
    return getattr(plans.latest, "launches", ())


def entered_device() -> Device | None:
    """The simulated device of the innermost ``with`` block.

    The simulator is not imported for the question: on a GPU neither it nor numpy is needed.
    """
    module = sys.modules.get("cute_fa.sim.device")
    return None if module is None else module.current_device()


def kernel_of(call: Call) -> Any:
    """The kernel that a checked call will run; compiled here if it has to be."""
    return sources.kernel(call.generation, call.target.arch, call.variant, call.kernels)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    more: plans.More = (),
    *,
    device: Device | None = None,
    key: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run a checked call.

    Args:
        more: the call's tensors behind v, in the order of ``plans.key_of``.
        device: the simulated device to run on; None makes one for the call's architecture.
        key: of ``plans.key_of``, under which a call on a GPU is kept; None to keep nothing.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, bfloat16 for FP8, and lse (B, Hq, Sq) in fp32, natural
        logarithm; of packed sequences (Tq, Hq, Dv) and (Hq, Tq), with 0 and -inf in rows that do
        not count. Both are contiguous and new.
    """
    if not call.has_work:
        plans.latest.launches = ()
        out, lse = empty_outputs(q, v)
        return out.zero_(), lse.fill_(-math.inf)
    # What is made while a graph is captured may hold memory that nothing has been written to.
    is_kept = key is not None and call.backend == "cuda" and not descales.is_capturing()
    plan = make_plan(q, v, call, device, is_kept=is_kept)
    inputs = [_with_legal_strides(x) for x in (q, k, v)]
    results = plan.run(inputs[0], inputs[1], inputs[2], more)
    if is_kept and all(x is y for x, y in zip(inputs, (q, k, v), strict=True)):
        plans.remember(key, plan)
    return results


def make_plan(
    q: Tensor, v: Tensor, call: Call, device: Device | None = None, *, is_kept: bool = False
) -> plans.Plan:
    """How to launch a checked call that computes something.

    Args:
        device: the simulated device to run on; None makes one for the call's architecture.
        is_kept: whether later calls may be launched by it, too.
    """
    kernel, padded = kernel_of(call), call.padded
    rows = q.shape[-3]
    kinds = list(_output_kinds(q, v))
    for w in kernel.config.workspace(padded.batch, rows, padded.heads_q):
        kinds.append((w.shape, getattr(torch, w.dtype)))
    outputs = tuple(plans.contiguous(shape, dtype) for shape, dtype in kinds)
    is_packed, scalars = isinstance(call.problem, VarlenProblem), _scalars(padded)
    convert = None
    if q.dtype.itemsize == 1:
        ones = descales.ones(padded.batch, padded.heads_k, q.device, is_kept=is_kept)
        convert = _with_descales(is_packed, ones)
    # How many rows of queries the longest of packed sequences has at most.
    last = (min(padded.seqlen_q, rows),) if is_packed else ()
    if call.backend == "cuda":
        prepare = _clear if _leaves_rows_out(call) else None
        # The host function takes its stream from the environment that TVM-FFI sets up from the
        # tensors' device: torch's current stream there.
        launch = kernel.host("cuda")
        return plans.Plan(launch, outputs, scalars, q.device, convert, last, prepare)

    def simulate(*arguments: Any) -> None:
        run_sim(kernel, device, arguments)

    prepare = functools.partial(_fill_for_simulation, call)
    return plans.Plan(simulate, outputs, scalars, None, convert, last, prepare)


def _with_descales(is_packed: bool, ones: Tensor) -> Callable[[plans.More], plans.More]:
    """What puts three descales before the lengths, as kernels for FP8 inputs take them."""
    if is_packed:
        return lambda more: (*descales.as_arguments(more[4:], ones), *more[:4])
    return lambda more: descales.as_arguments(more, ones)


def _leaves_rows_out(call: Call) -> bool:
    """Whether the kernel writes nothing in rows of queries that do not count."""
    return isinstance(call.problem, VarlenProblem) and call.problem.has_seqused_q


def _clear(made: Sequence[Tensor]) -> None:
    """0 and -inf, for the rows that do not count; which those are only the GPU's memory knows."""
    made[0].zero_()
    made[1].fill_(-math.inf)


def _fill_for_simulation(call: Call, made: Sequence[Tensor]) -> None:
    """NaN, so that an element that the kernel leaves out does not look right; 0 and -inf in rows
    that do not count."""
    for memory in made:
        memory.fill_(math.nan)
    problem = call.problem
    if not (_leaves_rows_out(call) and isinstance(problem, VarlenProblem)):
        return
    packing = problem.require_packing()
    for rows, stop in zip(packing.rows_q, packing.cu_seqlens_q[1:], strict=True):
        _clear((made[0][rows.stop : stop], made[1][:, rows.stop : stop]))


def _output_kinds(q: Tensor, v: Tensor) -> tuple[tuple[Sequence[int], torch.dtype], ...]:
    """Shape and dtype of out (B, Sq, Hq, Dv) and lse (B, Hq, Sq); both without B if q is packed."""
    *batch, rows, heads_q, _ = q.shape
    dtype = getattr(torch, out_dtype(str(q.dtype).removeprefix("torch.")))
    return ((*batch, rows, heads_q, v.shape[-1]), dtype), ((*batch, heads_q, rows), torch.float32)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse, contiguous whatever q's strides are: what torch.compile is told
    (the fake implementation) must be what it gets."""
    out, lse = (q.new_empty(shape, dtype=dtype) for shape, dtype in _output_kinds(q, v))
    return out, lse


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
        plans.latest.launches = tuple(device.launches[before:])


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
