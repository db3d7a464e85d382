"""FA4 on FP8 inputs, through the public function, against the FP8 reference with FA4's 2ˣ.

Each case is another kernel, for compiling them is what takes the time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from cute_fa import sim
from cute_fa.build import compile
from cute_fa.errors import InvalidArgumentError
from cute_fa.fa4.config import Fa4FwdConfig, pick_fwd
from cute_fa.problem import KernelVariant
from cute_fa.quant import BLOCK_ROWS
from cute_fa.target import TARGETS
from tests.rungs import fp8
from tests.rungs.fp8 import quantized

BLACKWELL = TARGETS["sm_100a"]
VARIANT = KernelVariant("float8_e4m3fn", 128, 128)

check = partial(fp8.check, generation="fa4")


@pytest.mark.parametrize(
    ("dims", "mask"),
    [
        ((128, 128), {}),
        ((64, 64), {"causal": True}),
        ((48, 80), {"softcap": 5.0}),
        ((256, 256), {"causal": True}),
    ],
    ids=str,
)
def test_masks_and_head_dims(dims, mask):
    """Odd lengths, a group of heads, more queries than keys and fewer; two Q tiles and one."""
    check(quantized(dims=dims), **mask)
    check(quantized(seqlen_q=300, seqlen_k=131, dims=dims), **mask)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_without_a_sign(scale):
    check(quantized(heads=(1, 1)), causal=True, softmax_scale=scale)


def test_descales_of_blocks_and_packed_heads():
    inputs = quantized(batch=2, seqlen_q=150, seqlen_k=300, heads=(4, 2), block_rows=BLOCK_ROWS)
    check(inputs, causal=True, pack_gqa=True)


def test_persistent_ctas():
    """One SM for six tiles, which take descales of other heads."""
    inputs = quantized(batch=2, seqlen_q=200, heads=(6, 3), dims=(128, 128))
    with sim.Device(replace(BLACKWELL, sm_count=1)) as device:
        check(inputs, pack_gqa=False)
    assert [launch.grid for launch in device.launches] == [(1, 1, 1)]


def test_largest_and_smallest_descales():
    """Scores of thousands, and a product of factors that no normal fp32 number is small enough
    for: all keys weigh the same then, those behind the mask nothing."""
    inputs = quantized(heads=(1, 1))
    tiny = inputs._replace(q_descale=torch.full((1, 1), 2.0**-100))
    huge = inputs._replace(q_descale=torch.full((1, 1), 16.0))
    for each in (tiny._replace(k_descale=tiny.q_descale), huge):
        check(each, causal=True)


def test_no_descale_is_one():
    fp8.check_missing_descales("fa4")


def test_each_row_picks_its_key_exactly():
    fp8.check_picks((128, 128), "fa4")


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(completion):
    inputs = quantized(seqlen_q=300, seqlen_k=530)
    fp8.check_completion(
        inputs, generation="fa4", arch="sm_100a", completion=completion, causal=True
    )


def test_ptx_is_what_the_tiles_imply():
    """Products of 32 columns or keys an instruction, V with keys along rows as it lies; P in a
    quarter of the columns that S takes; and no spills."""
    compiled = compile("fa4", arch="sm_100a", dtype=VARIANT.dtype, head_dim=128)
    config, ptx = compiled.config, compiled.ptx
    products = re.findall(r"tcgen05\.mma\.cta_group::1\.kind::(\w+)\S* \[%r\d+\], (\[?%)", ptx)
    assert {kind for kind, _ in products} == {"f8f6f4"}
    from_tmem = sum(operand.startswith("[") for _, operand in products)
    assert from_tmem == config.num_q_tiles * config.tile_n // 32
    assert len(products) - from_tmem == config.num_q_tiles * config.padded_d // 32
    assert "prmt" not in ptx and "stmatrix" not in ptx and "ldmatrix" not in ptx
    # Each chunk of 32 scores is 16 conversions of two; twice, with and without a mask.
    assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 2 * config.tile_n // 2
    assert ptx.count("tcgen05.st.sync.aligned.32x32b.x8.b32") == 2 * config.tile_n // 32
    assert compiled.resources.stack_bytes == compiled.resources.spill_store_bytes == 0


@pytest.mark.parametrize(
    "features",
    [{}, {"causal": True, "has_block_descales": True}, {"is_varlen": True, "packed_group": 8}],
    ids=str,
)
def test_every_pair_of_head_dims_has_a_plan(features):
    for head_dim in range(16, 257, 16):
        for head_dim_v in range(16, 257, 16):
            variant = replace(VARIANT, head_dim=head_dim, head_dim_v=head_dim_v, **features)
            config = pick_fwd(variant, BLACKWELL)
            assert config.stages >= 3 and config.has_own_o == config.is_persistent == (not features)


def test_what_is_refused():
    with pytest.raises(InvalidArgumentError, match="multiple of 16"):
        replace(pick_fwd(VARIANT, BLACKWELL), head_dim=72)
    with pytest.raises(InvalidArgumentError, match="divisor of 128, and fp8"):
        Fa4FwdConfig("float16", 64, 64, has_block_descales=True)
