"""The host's cost is measured on the code that a GPU call runs; how long it takes is not tested."""

from __future__ import annotations

import pytest
import torch

import cute_fa
from cute_fa.bench import host_cost as module
from cute_fa.bench.host_cost import host_cost
from cute_fa.errors import MissingToolError
from cute_fa.ops import checks, plans


def test_every_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[object, ...]] = []
    checked: list[object] = []
    linked, check = module._Launches._linked, checks.check_call

    def counted(self, kernel):
        function = linked(self, kernel)

        def call(*arguments):
            launches.append(arguments)
            return function(*arguments)

        return call

    def counted_check(*arguments, **named):
        checked.append(arguments)
        return check(*arguments, **named)

    monkeypatch.setattr(module._Launches, "_linked", counted)
    monkeypatch.setattr(checks, "check_call", counted_check)
    found = host_cost(samples=2, calls=5)
    assert len(found) == 8 and all(timing.count == 2 for timing in found.values())
    assert all(0 < timing.minimum <= timing.median for timing in found.values())
    # Twice 5 calls and one before each, in five ways after eight calls, and by itself; and those
    # that are checked, once for each kind and shape of dense call, besides those that only are.
    assert len(launches) == 5 * (2 * 6 + 8) + 2 * 6
    assert len(checked) == 3 + 7 + 2 * 6
    assert plans._plans == {}, "the plans for CPU tensors are gone"
    assert cute_fa.flash_attn_func(*torch.zeros(3, 1, 4, 1, 64).half()).shape == (1, 4, 1, 64)
    assert cute_fa.ops.last_launches(), "CPU tensors are simulated again"


def test_the_launch_code_is_real(tmp_path) -> None:
    """It checks its arguments as it does for a GPU."""
    launches = module._Launches(tmp_path)
    variant = checks.check_call(
        *torch.zeros(3, 1, 4, 1, 128).half(), checks.Options(causal=True), device=None
    ).variant
    launch = launches.kernel("fa2", "sm_80", variant, None).host("cuda")
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        launch(torch.zeros(3))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(MissingToolError, match="C compiler"):
        host_cost()
    assert callable(cute_fa.flash_attn_func)
