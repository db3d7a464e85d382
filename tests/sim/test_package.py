"""The simulator's public names."""

from __future__ import annotations

import pytest

from cute_fa import sim


def test_every_public_name_resolves_and_is_listed() -> None:
    assert dir(sim) == sorted(sim.__all__)
    for name in sim.__all__:
        assert getattr(sim, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sim.no_such_name
