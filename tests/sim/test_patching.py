"""Attributes of other people's objects are replaced and put back."""

from __future__ import annotations

from types import SimpleNamespace

from cute_fa.sim.patching import Patches


class Base:
    value = "base"


class Derived(Base):
    pass


def test_values_come_back_in_reverse_order() -> None:
    patches, owner, order = Patches(), SimpleNamespace(x=1), []
    patches.set(owner, "x", 2)
    patches.on_undo(lambda: order.append(owner.x))
    patches.set(owner, "x", 3)
    patches.set(owner, "y", 4)
    assert (owner.x, owner.y) == (3, 4)
    patches.undo()
    assert vars(owner) == {"x": 1} and order == [2]
    owner.x = 5
    patches.undo()  # nothing is left to undo
    assert owner.x == 5


def test_inherited_attributes_are_inherited_again() -> None:
    patches = Patches()
    patches.set(Derived, "value", "patched")
    assert (Base.value, Derived.value) == ("base", "patched")
    patches.undo()
    assert "value" not in vars(Derived) and Derived.value == "base"
