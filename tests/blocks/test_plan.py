"""What all rungs' plans share; their own tests hold it against each config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from cute_fa.blocks.plan import (
    DESCALE_ROWS,
    ForwardPlan,
    TileRow,
    TmaForwardPlan,
    changed_if_legal,
    first_row_for,
)
from cute_fa.build.registry import KERNELS
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant
from cute_fa.target import KIB, TARGETS

VARIANT = KernelVariant("float16", 64, 64)


def _usual(entry):
    """The rung's plan on its first architecture."""
    return entry.config(VARIANT, TARGETS[entry.archs[0]], {})


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_seqused_needs_varlen(entry):
    config = _usual(entry)
    with pytest.raises(InvalidArgumentError, match="seqused without varlen"):
        replace(config, has_seqused_k=True)
    assert replace(config, has_seqused_k=True, is_varlen=True).has_seqused_k


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_every_plan_names_its_rung(entry):
    config = _usual(entry)
    with pytest.raises(InvalidArgumentError, match=f"{entry.generation.upper()} config: head_dim"):
        replace(config, head_dim=60)


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float32"}, "float16 or bfloat16"),
        ({"head_dim": 60}, "multiple of 8"),
        ({"head_dim_v": 12}, "multiple of 8"),
        ({"head_dim": 264}, "up to 256"),
        ({"head_dim_v": 264}, "up to 256"),
        ({"is_causal": True, "has_window_right": True}, "right window of 0"),
    ],
    ids=str,
)
def test_what_no_kernel_computes_is_refused_by_every_plan(entry, changes, words):
    config = _usual(entry)
    with pytest.raises(InvalidArgumentError, match=words):
        replace(config, **changes)


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_block_descales": True}, "no descales"),
        ({"head_dim": 512}, "up to 256|no FA1 tile"),
        ({"packed_group": 3}, "row tiles of its own|3 query heads per K/V head"),
    ],
    ids=str,
)
def test_what_no_kernel_serves_is_refused_by_every_rung(entry, changes, words):
    with pytest.raises(UnsupportedError, match=words):
        entry.config(replace(VARIANT, **changes), TARGETS[entry.archs[0]], {})


HEAD_DIM_FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "softcap": {"has_softcap": True},
    "fp8": {"dtype": "float8_e4m3fn"},
    "fp8 causal": {"dtype": "float8_e4m3fn", "causal": True},
    "fp8 blocks": {"dtype": "float8_e4m3fn", "has_block_descales": True},
    "fp8 causal blocks": {"dtype": "float8_e4m3fn", "causal": True, "has_block_descales": True},
}


@pytest.mark.parametrize(
    ("entry", "features"),
    [
        pytest.param(entry, features, id=f"{entry.generation} {name}")
        for entry in KERNELS
        for name, features in HEAD_DIM_FEATURES.items()
        if features.get("dtype", VARIANT.dtype) in _usual(entry).dtypes
    ],
)
def test_every_pair_of_head_dims_has_a_plan(entry, features):
    """On the rung's first architecture; each config is legal, or it could not have been made."""
    target = TARGETS[entry.archs[0]]
    step = 16 if "dtype" in features else 8
    for head_dim in range(step, 257, step):
        for head_dim_v in range(step, 257, step):
            variant = replace(VARIANT, head_dim=head_dim, head_dim_v=head_dim_v, **features)
            config = entry.config(variant, target, {})
            assert 0 <= config.padded_d - head_dim < 32
            assert 0 <= config.padded_dv - head_dim_v < 32 * getattr(config, "num_ctas", 1)
            assert config.smem_bytes <= config.smem_limit_bytes == target.smem_per_block_bytes
            assert not variant.has_block_descales or DESCALE_ROWS % config.tile_n == 0


@pytest.mark.parametrize("entry", KERNELS[1:], ids=lambda entry: entry.name)
def test_only_fa1_keeps_its_state_in_global_memory(entry):
    config = _usual(entry)
    assert config.workspace(2, 100, 4) == ()


@dataclass(frozen=True)
class _Fa9(ForwardPlan):
    rung: ClassVar[str] = "FA9"


@dataclass(frozen=True)
class _Fa9Tma(TmaForwardPlan):
    rung: ClassVar[str] = "FA9"
    box_rows: ClassVar[int] = 64


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        (_Fa9, {"dtype": "float8_e4m3fn"}, "float16 or bfloat16"),
        (_Fa9, {"packed_group": 4}, "row tiles of its own"),
        (_Fa9Tma, {"dtype": "float32"}, "float8_e4m3fn"),
        (_Fa9Tma, {"has_block_descales": True}, "no descales"),
        (_Fa9Tma, {"packed_group": 3}, "a divisor of 64"),
    ],
)
def test_what_a_rung_has_no_code_for_is_refused(plan, changes, words):
    plan.check_served(replace(VARIANT, is_varlen=True))
    with pytest.raises(UnsupportedError, match=words):
        plan.check_served(replace(VARIANT, **changes))


def test_a_plan_computes_what_its_variant_says():
    variant = KernelVariant("float8_e4m3fn", 64, 96, causal=True, packed_group=4)
    plan = _Fa9Tma.of(variant, TARGETS["sm_80"], tile_n=64)
    assert plan == _Fa9Tma(
        *("float8_e4m3fn", 64, 96),
        is_causal=True,
        packed_group=4,
        tile_n=64,
        smem_limit_bytes=163 * KIB,
    )
    assert (plan.out_dtype, plan.out_bytes, plan.element_bytes) == ("bfloat16", 2, 1)
    assert (plan.panel_d, plan.panel_dv, plan.key_bytes) == (32, 48, 160)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_block_descales": True, "dtype": "float8_e4m3fn", "tile_n": 96}, "divisor of 128"),
        ({"packed_group": 5}, "a divisor of 64"),
        ({"packed_group": 0}, "a divisor of 64"),
    ],
)
def test_tma_plans_say_what_is_wrong(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        replace(_Fa9Tma("float16", 64, 64), **changes).require_whole_descales()


def test_a_change_that_is_not_legal_is_left_out():
    plan = _Fa9Tma("float16", 64, 64)
    assert changed_if_legal(plan, packed_group=3) is plan
    assert changed_if_legal(plan, packed_group=2).packed_group == 2


def test_the_first_row_that_serves_both_head_dims():
    table = (TileRow(64, 64), TileRow(64, 128), TileRow(128, 128))
    assert first_row_for("FA9", table, KernelVariant("float16", 64, 72)) == table[1]
    with pytest.raises(UnsupportedError, match="FA9 has no tile"):
        first_row_for("FA9", table, KernelVariant("float16", 136, 8))
