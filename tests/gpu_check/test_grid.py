"""The problems that each kernel is checked on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.gpu_check.grid import GridCase, grid
from cute_fa.problem import KernelVariant
from cute_fa.quant import BLOCK_ROWS
from cute_fa.varlen import VarlenProblem


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(
    "variant",
    [
        KernelVariant("bfloat16", 64, 64),
        KernelVariant("float16", 128, 64, causal=True, has_window_left=True),
        KernelVariant("float16", 64, 64, has_window_left=True, has_window_right=True),
        KernelVariant("bfloat16", 64, 64, has_softcap=True, packed_group=4),
        KernelVariant("bfloat16", 64, 64, is_varlen=True, has_seqused_q=True),
        KernelVariant("bfloat16", 64, 64, is_varlen=True, causal=True, has_seqused_k=True),
    ],
    ids=str,
)
def test_the_grid_is_of_the_variant(variant: KernelVariant, tiny: bool) -> None:
    cases: list[GridCase] = list(grid(variant, tiny=tiny))
    assert {case.kind for case in cases} >= {"normal", "one hot", "extreme"}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert replace(case.case.problem.variant, packed_group=variant.packed_group) == variant
        assert (case.inputs().expected is not None) == case.exact


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("is_varlen", [False, True], ids=["dense", "packed"])
def test_fp8_has_descales_as_its_variant_wants(is_varlen: bool, tiny: bool) -> None:
    base = KernelVariant("float8_e4m3fn", 64, 64, is_varlen=is_varlen)
    for variant in (base, replace(base, has_block_descales=True)):
        cases = list(grid(variant, tiny=tiny))
        assert {c.kind for c in cases} == {"normal", "one hot", "index", "extreme", "quantized"}
        blocks = set()
        for case in cases[:10]:
            inputs = case.inputs()
            assert inputs.descales.by_block == variant.has_block_descales
            if case.kind == "quantized":
                problem = case.case.problem
                batch = (
                    problem.padded.batch if isinstance(problem, VarlenProblem) else problem.batch
                )
                assert inputs.descales.v is not None and inputs.descales.v.shape[0] == batch
                assert inputs.descales.v.unique().numel() > 1 or batch * inputs.v.shape[-2] == 1
            if variant.has_block_descales and inputs.descales.k is not None:
                blocks.add(inputs.descales.k.shape[2])
        if variant.has_block_descales:
            assert max(blocks) > 1, f"more keys than {BLOCK_ROWS}"


@pytest.mark.parametrize("is_varlen", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_views_stay_views_where_they_are_taken(dtype: str, is_varlen: bool) -> None:
    """Gaps, other orders and strides of 0 reach the device: ``Tensor.to`` closes gaps."""
    cases = [c for c in grid(KernelVariant(dtype, 64, 64, is_varlen=is_varlen)) if c.has_views]
    repeated = 0
    for case in cases:
        here = case.inputs()
        there = here.to("meta")
        for x, y in zip(here[:3], there[:3], strict=True):
            assert (y.shape, y.stride(), y.device.type) == (x.shape, x.stride(), "meta")
            repeated += 0 in x.stride()
        assert not all(x.is_contiguous() for x in here[:3])
    assert len(cases) == 3 and repeated == (1 if is_varlen else 2)
