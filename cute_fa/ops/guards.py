"""Whether tensors are as those of an earlier call were, asked of all of them at once.

torch.compile guards its graphs by a comparison in C++ of all that makes a tensor what it is: Python
type, dispatch keys (place, lazy negation, functorch's wrappers, and what the thread's state adds),
dtype, index of the device, sizes, strides, requires_grad. It takes a sixth of the time that the
same questions take in Python. It is private to torch: where it is missing, or is not what it was,
nothing is recognised this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Guard = Callable[..., bool]
"""Takes as many plain tensors (type ``Tensor``), none of them nested, as it was made of.

A nested tensor would end the process: torch raises a C++ exception where nothing catches it.
"""


def guard_of(tensors: Sequence[Tensor]) -> Guard | None:
    """What recognises tensors like these; None if nothing can, or one requires a gradient.

    Sharing memory makes no difference to it, and being one object neither.
    """
    if _all_alike is None or any(x.requires_grad for x in tensors):
        return None
    if len(set(map(id, tensors))) == len(tensors):
        return _all_alike(*tensors)
    # All at once, torch's comparison fails where an object stands twice.
    guards = [_all_alike(x) for x in tensors]

    def are_alike(*others: Tensor) -> bool:
        return all(guard(x) for guard, x in zip(guards, others, strict=True))

    return are_alike


def _torchs_guard(*tensors: Tensor) -> Guard:
    guards = torch._C._dynamo.guards.TensorGuards
    return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def _if_it_works(guard_of_all: Callable[..., Guard]) -> Callable[..., Guard] | None:
    """The function, if what it makes tells apart what has to be told apart."""
    try:
        x, y = torch.empty(2, 3, device="cpu"), torch.empty(4, dtype=torch.half, device="cpu")
        others = [x.t(), x[:1], x[None], x.to("meta"), x.double(), torch._neg_view(x)]
        with torch.enable_grad():
            others.append(torch.empty_like(x, requires_grad=True))
        guard = guard_of_all(x, y)
        is_right = guard(torch.empty_like(x), y) is True
        is_right = is_right and not any(guard(z, y) for z in others) and not guard(x, y.float())
    except Exception:
        return None  # another version of torch, whose comparison is another one
    return guard_of_all if is_right else None


_all_alike = _if_it_works(_torchs_guard)
