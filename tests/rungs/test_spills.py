"""No plan that FA3's and FA4's tile tables choose spills, but for those named here: every padded
head dim and mask, dense and packed. Compiled, not run: 504 kernels, about an hour of one core. The
rungs' test_build.py have the tightest of these plans, in every run.
"""

from __future__ import annotations

from typing import Any

import pytest

from cute_fa.build import compile

ARCHS = {"fa3": "sm_90a", "fa4": "sm_100a"}
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
ELEMENTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "float8_e4m3fn"},
    "fp8-blocks": {"dtype": "float8_e4m3fn", "block_descales": True},
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (64, 64)},
    "left window under causal": {"causal": True, "window_size": (130, -1)},
    "softcap": {"softcap": 15.0},
    "causal, softcap": {"causal": True, "softcap": 15.0},
    "window, softcap": {"window_size": (64, 64), "softcap": 15.0},
}
# The packed form has every feature that keeps something alive beside the accumulators.
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"varlen": True, "seqused_q": True, "seqused_k": True, "packed_group": 8},
}


def _allowed_bytes(rung: str, element: str, mask: str) -> int:
    """What may be spilled; the rung's README says what it is."""
    return 40 if (rung, element) == ("fa4", "fp8-blocks") and "softcap" in mask else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("rung", ARCHS)
def test_spills_nothing(rung, dims, element, form):
    found = {}
    for mask, features in MASKS.items():
        how = {**ELEMENTS[element], **features, **FORMS[form]}
        compiled = compile(rung, arch=ARCHS[rung], head_dim=dims[0], head_dim_v=dims[1], **how)
        found[mask] = compiled.resources.spill_store_bytes
    assert all(n <= _allowed_bytes(rung, element, mask) for mask, n in found.items()), found
