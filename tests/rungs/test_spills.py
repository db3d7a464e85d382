"""No plan that a rung's tile table chooses spills, but for those that READMEs name: every padded
head dim and mask, dense and packed. Compiled, not run: 924 kernels, an hour and a half of one core.
The rungs' test_build.py have the tightest of these plans, in every run.
"""

from __future__ import annotations

from typing import Any

import pytest

from cute_fa.build import compile
from tests.rungs.spills import assert_no_spills

# sm_86 has the smaller shared memory; the others generate code in their own ways.
RUNGS = [
    ("fa1", "sm_80"),
    *(("fa2", arch) for arch in ("sm_80", "sm_86", "sm_90a", "sm_120a")),
    *(("fa3", "sm_90a"), ("fa4", "sm_100a")),
]
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
    "packed": {"varlen": True, "seqused_q": True, "seqused_k": True},
}
# These take FP8, and query heads that share row tiles.
NEWER = ("fa3", "fa4")
CASES = [
    (rung, arch, element)
    for rung, arch in RUNGS
    for element in (ELEMENTS if rung in NEWER else ("bf16",))
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(("rung", "arch", "element"), CASES)
def test_spills_nothing(rung, arch, element, dims, form):
    group = {"packed_group": 8} if form == "packed" and rung in NEWER else {}
    for features in MASKS.values():
        how = {**ELEMENTS[element], **features, **FORMS[form], **group}
        assert_no_spills(compile(rung, arch=arch, head_dim=dims[0], head_dim_v=dims[1], **how))
