"""The registry: who serves what, why not, and what would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cute_fa.build import registry
from cute_fa.build.registry import (
    COMPILED,
    KERNELS,
    KernelEntry,
    can_run,
    choose_generation,
    find,
)
from cute_fa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import TARGETS
from cute_fa.varlen import VarlenProblem
from tests.processes import run_python

BASE = AttentionProblem(2, 100, 130, 4, 2, 64, 64, "bfloat16")


def problem(**changes: Any) -> AttentionProblem:
    return replace(BASE, **changes)


@pytest.mark.parametrize("arch", COMPILED)
@pytest.mark.parametrize("generation", ["fa1", "fa2"])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_both_rungs_serve_every_arch(generation: str, arch: str, head_dim: int) -> None:
    support = can_run(problem(head_dim=head_dim, head_dim_v=head_dim), arch, generation)
    assert support, support.reason
    assert support.generation == generation and support.alternatives == ()


@pytest.mark.parametrize("generation", ["fa1", "fa2", "fa4"])
def test_an_architecture_that_is_not_compiled_for_is_refused_with_the_reason(generation) -> None:
    support = can_run(problem(), "sm_110a", generation)
    assert not support and "sm_101a" in support.reason


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_fa3_serves_hopper_only(head_dim: int) -> None:
    wanted = problem(head_dim=head_dim, head_dim_v=head_dim)
    assert can_run(wanted, "sm_90a").generation == "fa3"
    support = can_run(wanted, "sm_80", "fa3")
    assert not support and support.alternatives == ("fa1", "fa2")
    assert not can_run(wanted, "sm_90", "fa3")


def test_auto_is_the_newest_generation_and_never_fa1() -> None:
    assert choose_generation(problem(), "sm_80") == "fa2"
    assert can_run(problem(), "sm_100a").generation == "fa4"
    assert can_run(problem(), "sm_120a").generation == "fa2"


def test_auto_prefers_a_newer_rung_where_it_exists_and_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer = KernelEntry(
        generation="fa3",
        direction="fwd",
        archs=("sm_90a",),
        kernel="none:none",
        arguments="none:none",
        pick="tiny_config:pick_wide",
        sources=(),
        summary="",
        features=(),
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "kernels"))
    older = tuple(entry for entry in KERNELS if entry.generation in ("fa1", "fa2"))
    monkeypatch.setattr(registry, "KERNELS", (*older, newer))
    wide = problem(head_dim=128, head_dim_v=128)
    assert choose_generation(wide, "sm_90a") == "fa3"
    assert choose_generation(wide, "sm_80") == "fa2"
    assert choose_generation(problem(), "sm_90a") == "fa2"
    with pytest.raises(UnsupportedError, match="only D 128") as caught:
        choose_generation(problem(), "sm_90a", "fa3")
    assert caught.value.alternatives == ("fa1", "fa2")


def test_a_dtype_that_no_kernel_serves_is_explained() -> None:
    support = can_run(problem(dtype="float8_e4m3fn"), "sm_80")
    assert not support and "float8_e4m3fn" in support.reason
    assert support.alternatives == ()
    with pytest.raises(UnsupportedError, match="no generation serves this problem on sm_80"):
        choose_generation(problem(dtype="float8_e4m3fn"), "sm_80")


@pytest.mark.parametrize("what", [None, "64x64", problem().variant])
def test_what_is_no_problem_is_refused(what: Any) -> None:
    with pytest.raises(InvalidTypeError, match="expected: an AttentionProblem or a VarlenProblem"):
        can_run(what, "sm_80")


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_fp8_is_served_where_the_features_say_so(entry: KernelEntry) -> None:
    """Dense and packed alike."""
    dense = problem(dtype="float8_e4m3fn")
    for what in (dense, VarlenProblem(dense, 150, 190)):
        support = can_run(what, entry.archs[0], entry.generation)
        assert support.ok == ("FP8 (e4m3)" in entry.features)
        assert support.ok or "16-bit inputs only" in support.reason


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("has_seqused", [False, True])
def test_varlen_is_served_where_the_features_say_so(entry: KernelEntry, has_seqused: bool) -> None:
    packed = VarlenProblem(problem(), 150, 190, has_seqused_k=has_seqused)
    support = can_run(packed, entry.archs[0], entry.generation)
    assert support.ok == ("varlen" in entry.features)
    if not support:
        assert "packed sequences" in support.reason
    else:
        config = entry.config(packed.variant, TARGETS[entry.archs[0]], {})
        assert (config.is_varlen, config.has_seqused_q, config.has_seqused_k) == (
            True,
            False,
            has_seqused,
        )


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_an_override_of_another_type_is_refused(entry: KernelEntry) -> None:
    target = TARGETS[entry.archs[0]]
    for overrides in ({"tile_n": "64"}, {"tile_n": 64.0}, {"is_causal": 1}, {"dtype": None}):
        (name,) = overrides
        with pytest.raises(InvalidTypeError, match=rf"{name}: not what(.|\n)*expected: \w+, as in"):
            entry.config(problem().variant, target, overrides)


def test_an_override_that_makes_another_variant_is_refused() -> None:
    fp8 = KernelVariant("float8_e4m3fn", 64, 64)
    for overrides in ({"is_causal": True}, {"has_softcap": True}, {"has_block_descales": True}):
        (name,) = overrides
        with pytest.raises(InvalidArgumentError, match=f"{name} follows from what the fa3 fwd"):
            find("fa3").config(fp8, TARGETS["sm_90a"], overrides)
    assert find("fa3").config(fp8, TARGETS["sm_90a"], {"packed_group": 2}).packed_group == 2


def test_what_a_target_or_this_version_lacks_names_what_there_is() -> None:
    support = can_run(problem(), "sm_120a", "fa4")
    assert not support.ok and support.alternatives == ("fa1", "fa2")
    with pytest.raises(UnsupportedError, match="no fa2 bwd kernel"):
        find("fa2", "bwd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fa9",), "unknown generation"), (("fa2", "sideways"), "unknown direction")],
)
def test_names_that_do_not_exist(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        find(*arguments)


def test_an_unknown_config_field_lists_the_known_ones() -> None:
    entry = find("fa2")
    with pytest.raises(InvalidArgumentError, match=r"tile_q: no such field(.|\n)*tile_m"):
        entry.config(problem().variant, TARGETS["sm_80"], {"tile_q": 64})


def test_an_override_changes_the_config() -> None:
    entry = find("fa2")
    target = TARGETS["sm_80"]
    usual = entry.config(problem().variant, target, {})
    changed = entry.config(problem().variant, target, {"tile_n": usual.tile_n // 2})
    assert changed.tile_n == usual.tile_n // 2 and changed.tile_m == usual.tile_m


def test_every_kernel_and_its_arguments_exist() -> None:
    for entry in KERNELS:
        for name in (entry.kernel, entry.arguments, entry.pick):
            assert callable(registry.load(name)), name


def test_asking_the_registry_loads_neither_torch_nor_the_dsl() -> None:
    program = (
        "import sys\n"
        "from cute_fa import AttentionProblem, can_run\n"
        "p = AttentionProblem(1, 8, 8, 1, 1, 64, 64, 'float16')\n"
        "assert all(can_run(p, 'sm_80', g).ok for g in ('fa1', 'fa2', 'auto'))\n"
        "print(*(m for m in ('torch', 'cutlass', 'numpy', 'tvm_ffi') if m in sys.modules))"
    )
    assert run_python(program).stdout.strip() == ""


def test_the_table_has_a_row_per_kernel_of_json_values() -> None:
    rows = json.loads(json.dumps(registry.rows()))
    assert [row["generation"] for row in rows] == [entry.generation for entry in KERNELS]
    assert all(row["archs"] and row["features"] and row["summary"] for row in rows)
