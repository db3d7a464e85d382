"""What was decided for a call, kept for the next one that is like it.

Checking a call takes ten times as long as launching it. A call on a GPU whose tensors have the
shapes, strides, dtypes and device of an earlier one, and whose options are the same, needs none of
it again: only what may differ between the two is looked at (addresses, gradients, and whether torch
is tracing or a simulated device is entered).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_PLANS = 4096
"""All are dropped beyond this many: a program with ever new shapes must not fill the memory."""

_UNALIGNED = 16 - 1  # bits of an address that ``checks.ALIGNMENT_BYTES`` wants clear
_SWITCHES = (True, False)
_CONTIGUOUS = torch.contiguous_format
_plans: dict[Hashable, Plan] = {}


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is known of a call but the tensors' addresses.

    Attributes:
        launch: the kernel's host function.
        device: of the tensors.
        outputs: a tensor as each of out, lse and what the kernel wants beside them is to be; one
            element of memory each (``pattern``).
        scalars: what follows the tensors among the arguments.
    """

    launch: Callable[..., Any]
    device: torch.device
    outputs: tuple[Tensor, ...]
    scalars: tuple[Any, ...]

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the results and launch, on torch's current stream of the tensors' device."""
        made = [torch.empty_like(x, memory_format=_CONTIGUOUS) for x in self.outputs]
        device = self.device
        if device.type == "cuda" and torch._C._cuda_getDevice() != device.index:
            with torch.cuda.device(device):
                self.launch(q, k, v, *made, *self.scalars)
        else:
            self.launch(q, k, v, *made, *self.scalars)
        return made[0], made[1]


def pattern(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape that takes the memory of one element.

    ``empty_like`` of it is the quickest way to a new contiguous tensor of this shape.
    """
    return torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))


def key_of(q: Any, k: Any, v: Any, options: tuple[Any, ...]) -> Hashable | None:
    """What a call is recognised by; None for one that must be checked.

    Args:
        options: softmax_scale, causal, window_size, softcap and then strings, None and anything
            else that is compared by equality of the same type.
    """
    scale, causal, window, softcap, *names = options
    # 1 equals True and 0 equals False, but only one of each is a legal argument.
    if causal not in _SWITCHES or type(causal) is not bool or type(softcap) is not float:
        return None
    if scale is not None and type(scale) is not float:
        return None
    if type(window) is not tuple or len(window) != 2 or bool in map(type, window):
        return None
    if not type(q) is type(k) is type(v) is Tensor:
        return None
    try:
        return (
            q.shape,
            k.shape,
            v.shape,
            q.stride(),
            k.stride(),
            v.stride(),
            q.dtype,
            k.dtype,
            v.dtype,
            q.get_device(),
            k.get_device(),
            v.get_device(),
            scale,
            causal,
            window,
            softcap,
            *names,
        )
    except RuntimeError:
        return None  # a nested tensor has no strides


def key_for(
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    arch: Any = None,
) -> Hashable | None:
    """The key of a call of ``flash_attn_func`` with these arguments and no others."""
    values = (softmax_scale, causal, window_size, softcap, "auto", "auto", arch, None)
    return key_of(q, k, v, (*values, None, type(None), type(arch)))


def find(key: Hashable | None, q: Tensor, k: Tensor, v: Tensor) -> Plan | None:
    """The plan of an earlier call of this key, if nothing else stands against it now."""
    try:
        plan = _plans.get(key)
    except TypeError:
        return None  # an option that cannot be hashed, such as a list
    if plan is None or not _is_plain_call() or _simulates():
        return None
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) & _UNALIGNED:
        return None
    if q.is_neg() or k.is_neg() or v.is_neg():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    return plan


def remember(key: Hashable | None, plan: Plan) -> None:
    """Keep a plan for the calls that have this key."""
    if key is None:
        return
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    try:
        _plans[key] = plan
    except TypeError:
        return


def forget() -> None:
    """Drop all plans: kernels may come from elsewhere now."""
    _plans.clear()


def _is_plain_call() -> bool:
    """Whether no mode of torch (fake tensors, vmap, a function mode) looks at what is called."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )


def _simulates() -> bool:
    hosts = sys.modules.get("cute_fa.sim.hosts")
    return hosts is not None and hosts.is_entered()
