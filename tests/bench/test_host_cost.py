"""The host's cost is measured on the code that a GPU call runs; how long it takes is not tested."""

from __future__ import annotations

import pytest
import torch

import cute_fa
from cute_fa.bench import host_cost as module
from cute_fa.bench.host_cost import host_cost
from cute_fa.errors import MissingToolError
from cute_fa.ops import plans


def test_every_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[object, ...]] = []
    linked = module._linked_to_nothing

    def counted(folder):
        function = linked(folder)

        def call(*arguments):
            launches.append(arguments)
            return function(*arguments)

        return call

    monkeypatch.setattr(module, "_linked_to_nothing", counted)
    found = host_cost(samples=2, calls=5)
    assert len(found) == 4 and all(timing.count == 2 for timing in found.values())
    assert all(0 < timing.minimum <= timing.median for timing in found.values())
    # Twice 5 calls and one before that, through the public function and by itself.
    assert len(launches) == 2 * (2 * 5 + 1)
    assert plans._plans == {}, "the plan for CPU tensors is gone"


def test_the_launch_code_is_real(tmp_path) -> None:
    """It checks its arguments as it does for a GPU."""
    function = module._linked_to_nothing(tmp_path)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        function(torch.zeros(3))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingToolError, match="C compiler"):
        host_cost()
    assert callable(cute_fa.flash_attn_func)
