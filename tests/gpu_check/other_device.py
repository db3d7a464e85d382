"""A second device made of CPU memory: like a GPU's, its tensors do not mix with those of the CPU.

Tensors there say that they are on ``DEVICE``; operators compute with what is inside of them, and
refuse to take tensors of both devices, as torch does between the CPU and a GPU. (It is "meta",
the one other device whose guards every torch has.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
# Operators that bring CPU tensors there, or take indices from there.
MAY_MIX = {"aten::copy_", "aten::index.Tensor", "aten::index_put_"}


class There(Tensor):
    """A tensor of the second device; ``inside`` is its memory."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> There:
        there: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=DEVICE,
        )
        there.inside = inside
        return there

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it to subclasses."""
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    schema = function._schema
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    is_there = any(isinstance(x, There) for x in given)
    if is_there and schema.name not in MAY_MIX:
        # A number in a tensor of the CPU goes anywhere.
        here = [x for x in given if not isinstance(x, There) and x.ndim]
        assert not here, f"{schema.name} of tensors of two devices"
    asked = kwargs.get("device")
    if asked is not None:
        is_there = torch.device(asked).type == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(inside_of, args), **tree_map(inside_of, kwargs))
    if schema.name.endswith("_") and schema.is_mutable:
        return args[0]
    return tree_map(put_there, result) if is_there else result


def inside_of(x: Any) -> Any:
    """A tensor of the CPU in place of one of the second device."""
    return x.inside if isinstance(x, There) else x


def put_there(x: Any) -> Any:
    """The same memory, as a tensor of the second device."""
    return There(x) if isinstance(x, Tensor) and not isinstance(x, There) else x


class _Generator(torch.Generator):
    """Of any device, with the CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


@contextmanager
def entered() -> Iterator[None]:
    """Inside the block, whatever torch makes on ``DEVICE`` is made of memory."""
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "Generator", _Generator)
        yield
