"""Which kernels a bundle gets: every preset, on every architecture that bundles are made for."""

from __future__ import annotations

import pytest

from cute_fa.build import presets


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_the_presets_are_served(arch: str) -> None:
    """Every rung of the architecture is in each preset, nothing twice, candidates beside their
    default."""
    for name in ("benchmark", "check", "tune", "all"):
        selected, left_out = presets.select([name], [arch])
        requests = [each.request for each in selected]
        keys = {(r.entry.name, r.variant, r.config) for r in requests}
        assert len(keys) == len(requests)
        assert all(each.reason for each in left_out)
    everything = presets.select(["all"], [arch])[0]
    defaults = {
        (s.request.entry.name, s.request.variant) for s in everything if s.role == "default"
    }
    candidates = [s for s in everything if s.role == "candidate"]
    assert candidates
    assert {(s.request.entry.name, s.request.variant) for s in candidates} <= defaults
    rungs = {s.request.entry.generation for s in everything}
    assert rungs == {"sm_80": {"fa1", "fa2"}, "sm_90a": {"fa1", "fa2", "fa3"}}.get(
        arch, {"fa1", "fa2", "fa4"}
    )
