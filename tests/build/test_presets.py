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


def configs(preset: str, arch: str, generation: str, **features: object) -> list:
    """Those of a preset's kernels whose variant has these features."""
    return [
        each.request.config
        for each in presets.select([preset], [arch])[0]
        if each.request.entry.generation == generation
        and all(getattr(each.request.variant, name) == x for name, x in features.items())
    ]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fa3_tries_schedules_tiles_and_consumers(causal: bool) -> None:
    found = configs("tune", "sm_90a", "fa3", dtype="bfloat16", head_dim=128, causal=causal)
    assert {(c.is_persistent, c.has_own_o) for c in found} >= {(False, False), (True, True)}
    assert (True, False) in {(c.is_persistent, c.has_own_o) for c in found}
    assert {c.num_consumers for c in found} == {2, 3} and {c.stages for c in found} >= {2, 3}
    assert {c.tile_n for c in found} >= {64, 128, 160} and len({c.has_turns for c in found}) == 2
    # Beside strips of O there is no room for 176 columns.
    assert any(c.tile_n == 176 for c in found) != causal


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fp8_competes_too(causal: bool) -> None:
    features = {"dtype": "float8_e4m3fn", "head_dim": 128, "causal": causal}
    found = configs("tune", "sm_90a", "fa3", **features)
    assert {c.tile_n for c in found} >= {128, 160, 192, 224}
    assert {c.num_consumers for c in found} == {2, 3} and {c.stages for c in found} >= {2, 3, 4}
    assert {c.is_persistent for c in found} == {True, False}
    blackwell = configs("tune", "sm_100a", "fa4", **features)
    assert len({c.polynomial_pairs for c in blackwell}) == 5 and len(blackwell) > 8


def test_fa4_tries_three_schedules_and_fa2_tiles_on_hopper() -> None:
    found = configs("tune", "sm_100a", "fa4", dtype="bfloat16", head_dim=128, causal=True)
    assert {(c.is_persistent, c.has_launch_control) for c in found} == {
        (False, False),
        (True, False),
        (False, True),
    }
    wide = configs("tune", "sm_100a", "fa4", dtype="bfloat16", head_dim=256, causal=True)
    assert {(c.is_paired, c.has_launch_control) for c in wide} == {
        (True, False),
        (False, False),
        (False, True),
    }
    hopper = configs("tune", "sm_90a", "fa2", dtype="bfloat16", head_dim=128, causal=True)
    assert len({(c.tile_m, c.tile_n, c.stages) for c in hopper}) >= 8


def test_the_benchmark_has_packed_fp8_and_check_has_its_descales() -> None:
    for arch, rung in (("sm_90a", "fa3"), ("sm_100a", "fa4")):
        fp8 = {"dtype": "float8_e4m3fn", "is_varlen": True}
        assert len(configs("benchmark", arch, rung, **fp8)) == 2
        assert configs("check", arch, rung, **fp8)
        assert configs("check", arch, rung, has_block_descales=True, is_varlen=False)
        assert configs("check", arch, rung, has_block_descales=True, is_varlen=True)
