"""What all rungs' plans share; their own tests hold it against each config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from cute_fa.blocks.plan import (
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


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_seqused_needs_varlen(entry):
    config = entry.config(VARIANT, TARGETS[entry.archs[0]], {})
    with pytest.raises(InvalidArgumentError, match="seqused without varlen"):
        replace(config, has_seqused_k=True)
    assert replace(config, has_seqused_k=True, is_varlen=True).has_seqused_k


@pytest.mark.parametrize("entry", KERNELS, ids=lambda entry: entry.name)
def test_every_plan_names_its_rung(entry):
    config = entry.config(VARIANT, TARGETS[entry.archs[0]], {})
    with pytest.raises(InvalidArgumentError, match=f"{entry.generation.upper()} config: head_dim"):
        replace(config, head_dim=60)


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
        (_Fa9, {"packed_group": 4}, "packed_group 4"),
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
