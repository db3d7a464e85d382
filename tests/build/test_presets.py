"""Which kernels a bundle gets: every preset, on every architecture that bundles are made for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import pytest

from cute_fa.build import presets
from cute_fa.build.registry import find
from cute_fa.errors import InvalidArgumentError
from cute_fa.problem import KernelVariant
from cute_fa.target import Target, get_target


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
    assert {c.tile_n for c in found} >= {96, 112, 128, 144, 160, 176, 192}
    assert {c.has_turns for c in found} == {True, False}
    # As many columns as strips of O leave room for, and more without.
    assert {c.tile_n for c in found if c.has_own_o and c.stages == 2} >= {112, 128, 144, 160}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fp8_competes_too(causal: bool) -> None:
    features = {
        "dtype": "float8_e4m3fn",
        "head_dim": 128,
        "causal": causal,
        "is_varlen": False,
    }
    found = configs("tune", "sm_90a", "fa3", **features)
    assert {c.tile_n for c in found} >= {128, 160, 192, 224}
    assert {c.num_consumers for c in found} == {2, 3} and {c.stages for c in found} >= {2, 3, 4}
    assert {c.is_persistent for c in found} == {True, False}
    blackwell = configs("tune", "sm_100a", "fa4", **features)
    assert len({c.polynomial_pairs for c in blackwell}) == 5 and len(blackwell) > 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("arch", "rung"), [("sm_90a", "fa3"), ("sm_100a", "fa4")])
def test_packed_sequences_compete_on_schedules(arch: str, rung: str, dtype: str) -> None:
    for causal in (False, True):
        found = configs("tune", arch, rung, dtype=dtype, is_varlen=True, causal=causal)
        assert {c.is_persistent for c in found} == {True, False}
        assert len({c.tile_n for c in found}) > 1 and all(c.head_dim == 128 for c in found)


@pytest.mark.parametrize(
    ("table", "dtype", "is_varlen"),
    [
        (presets.CANDIDATES, "bfloat16", False),
        (presets.FP8_CANDIDATES, "float8_e4m3fn", False),
        (presets.VARLEN_CANDIDATES, "bfloat16", True),
        (presets.VARLEN_FP8_CANDIDATES, "float8_e4m3fn", True),
    ],
    ids=["16 bits", "fp8", "packed", "packed fp8"],
)
def test_every_line_has_candidates(
    table: Mapping[str, tuple[presets.Grid, ...]], dtype: str, is_varlen: bool
) -> None:
    """The config refuses points of a grid, but not all of them, nor all that have some value of
    it; and what is left is not the default alone."""
    for generation, grids in table.items():
        arch = {"fa2": "sm_90a", "fa3": "sm_90a", "fa4": "sm_100a"}[generation]
        for grid in grids:
            found = [
                (values, config)
                for dim, causal in itertools.product((64, 128, 256), (False, True))
                for values, config in legal(
                    generation,
                    KernelVariant(dtype, dim, dim, causal=causal, is_varlen=is_varlen),
                    get_target(arch),
                    grid,
                )
            ]
            for name, values in grid.items():
                assert {each[name] for each, _ in found} == set(values), (generation, grid, name)
            assert any(is_other for _, is_other in found), (generation, grid)


def legal(
    generation: str, variant: KernelVariant, target: Target, grid: presets.Grid
) -> Iterator[tuple[dict[str, object], bool]]:
    """The points of a grid that make a plan, and whether it is another than the default."""
    entry = find(generation)
    default = entry.config(variant, target, {})
    for point in itertools.product(*grid.values()):
        values = dict(zip(grid, point, strict=True))
        with contextlib.suppress(InvalidArgumentError):
            yield values, entry.config(variant, target, values) != default


def test_fa4_tries_three_schedules_and_fa2_tiles_on_hopper() -> None:
    found = configs("tune", "sm_100a", "fa4", dtype="bfloat16", head_dim=128, causal=True)
    assert {(c.is_persistent, c.has_launch_control) for c in found} == {
        (False, False),
        (True, False),
        (False, True),
    }
    wide = configs("tune", "sm_100a", "fa4", dtype="bfloat16", head_dim=256, causal=True)
    schedules = {(c.is_paired, c.has_launch_control) for c in wide}
    assert schedules == set(itertools.product((True, False), repeat=2))
    hopper = configs("tune", "sm_90a", "fa2", dtype="bfloat16", head_dim=128, causal=True)
    assert len({(c.tile_m, c.tile_n, c.stages) for c in hopper}) >= 8


def test_the_benchmark_has_packed_fp8_and_check_has_its_descales() -> None:
    for arch, rung in (("sm_90a", "fa3"), ("sm_100a", "fa4")):
        fp8 = {"dtype": "float8_e4m3fn", "is_varlen": True}
        assert len(configs("benchmark", arch, rung, **fp8)) == 2
        assert configs("check", arch, rung, **fp8)
        assert configs("check", arch, rung, has_block_descales=True, is_varlen=False)
        assert configs("check", arch, rung, has_block_descales=True, is_varlen=True)
