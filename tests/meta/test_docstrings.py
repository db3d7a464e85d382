"""Every public name says what it is, and its functions say of which types."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest

MODULES = (
    "cute_fa",
    *("cute_fa.asm", "cute_fa.build", "cute_fa.ptx", "cute_fa.sim", "cute_fa.testing"),
    *("cute_fa.errors", "cute_fa.problem", "cute_fa.quant", "cute_fa.target", "cute_fa.varlen"),
    *(f"cute_fa.reference.{name}" for name in ("dense", "fa1", "fa2", "fa3", "fa4", "fp8")),
    *(f"cute_fa.reference.{name}" for name in ("schedule", "traffic")),
)


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of what the module exports, or defines if it has no ``__all__``."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    for name in names:
        yield name, getattr(module, name)


def _members(owner: type) -> Iterator[tuple[str, Any]]:
    """(name, function) of the public methods and properties that a class defines itself."""
    for name, member in vars(owner).items():
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        elif isinstance(member, cached_property):
            member = member.func
        if not name.startswith("_") and inspect.isfunction(member):
            yield name, member


def _complaints(name: str, value: Any) -> Iterator[str]:
    if not inspect.getdoc(value):
        yield f"{name} has no docstring"
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    if signature.return_annotation is signature.empty:
        yield f"{name} does not say what it returns"
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "cls") and parameter.annotation is parameter.empty:
            yield f"{name}: {parameter.name} has no type"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_described_and_typed(name):
    complaints = []
    for own, value in _public(importlib.import_module(name)):
        if inspect.isclass(value):
            for member, function in _members(value):
                complaints += _complaints(f"{own}.{member}", function)
        if callable(value):
            complaints += _complaints(own, value)
    assert not complaints, "\n".join(complaints)
