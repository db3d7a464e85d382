"""Guards of torch's compiler tell tensors apart as the launch needs it, or are not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cute_fa.ops import guards
from cute_fa.ops.guards import guard_of


def tensors(count: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(2, 3, 4) for _ in range(count))


def test_tensors_of_the_same_kind_are_recognised() -> None:
    guard = guard_of(tensors())
    assert guard is not None and guard(*tensors()) is True
    assert guard(*(x.view(-1).view(2, 3, 4) for x in tensors()))
    with torch.no_grad():
        assert guard(*tensors())


@pytest.mark.parametrize("place", [0, 1])
def test_tensors_of_another_kind_are_not(place: int) -> None:
    guard = guard_of(tensors())
    assert guard is not None
    with FakeTensorMode():
        fake = torch.zeros(2, 3, 4)
    wrapped: list[Tensor] = []
    torch.func.vmap(lambda x: (wrapped.append(x), x)[1])(torch.zeros(5, 2, 3, 4))
    others: list[Any] = [
        torch.zeros(2, 3, 5),
        torch.zeros(2, 3),
        torch.zeros(2, 4, 3).transpose(1, 2),
        torch.zeros(2, 3, 4).half(),
        torch.zeros(2, 3, 4, device="meta"),
        torch.zeros(2, 3, 4, requires_grad=True),
        torch.nn.Parameter(torch.zeros(2, 3, 4), requires_grad=False),
        torch._neg_view(torch.zeros(2, 3, 4)),
        torch.zeros(2, 3, 4).to_sparse(),
        *(fake, *wrapped, None, 3, [0.0]),
    ]
    for other in others:
        given = list(tensors())
        given[place] = other
        assert not guard(*given), type(other)


def test_an_object_may_stand_twice() -> None:
    [x, y], [z] = tensors(2), tensors(1)
    twice, apart = guard_of([x, x]), guard_of([x, y])
    assert twice is not None and apart is not None
    assert twice(x, x) and twice(y, y) and twice(x, y) and apart(x, z)
    assert not twice(x, x.half()) and not twice(x.half(), x)


def test_what_needs_a_gradient_has_no_guard() -> None:
    x, y = tensors()
    assert guard_of([x, y.requires_grad_()]) is None


def test_what_torch_compares_by_is_tried_first() -> None:
    def missing(*_: Tensor) -> Any:
        raise AttributeError("no TensorGuards")

    def takes_all(*_: Tensor) -> Any:
        return lambda *others: True

    def takes_none(*_: Tensor) -> Any:
        return lambda *others: False

    def sees_the_first_only(*given: Tensor) -> Any:
        return lambda *others: guards._torchs_guard(given[0])(others[0])

    for wrong in (missing, takes_all, takes_none, sees_the_first_only):
        assert guards._if_it_works(wrong) is None
    assert guards._if_it_works(guards._torchs_guard) is guards._torchs_guard


def test_without_them_nothing_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_all_alike", None)
    assert guard_of(tensors()) is None
