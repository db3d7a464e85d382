"""The checks that all rungs' plans share; their own tests hold them against each config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.blocks.plan import check_served
from cute_fa.build.registry import KERNELS
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant
from cute_fa.target import TARGETS

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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float8_e4m3fn"}, "float16 or bfloat16"),
        ({"is_varlen": True}, "does not take packed sequences"),
        ({"packed_group": 4}, "packed_group 4"),
    ],
)
def test_what_a_rung_has_no_code_for_is_refused(changes, words):
    dtypes = ("float16", "bfloat16")
    check_served("FA9", VARIANT, dtypes=dtypes)
    variant = replace(VARIANT, **changes)
    with pytest.raises(UnsupportedError, match=words):
        check_served("FA9", variant, dtypes=dtypes)
    if variant.dtype in dtypes:
        check_served("FA9", variant, dtypes=dtypes, has_varlen=True, has_packed_groups=True)
