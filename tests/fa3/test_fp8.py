"""FA3 on FP8 inputs, through the public function, against the FP8 reference."""

from __future__ import annotations

from functools import partial

import pytest

from cute_fa.quant import BLOCK_ROWS
from tests.rungs import fp8
from tests.rungs.fp8 import MASKS, quantized

check = partial(fp8.check, generation="fa3")


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    """Odd lengths, a group of heads, more queries than keys and fewer."""
    check(quantized(), **MASKS[mask])
    check(quantized(seqlen_q=200, seqlen_k=131), **MASKS[mask])


@pytest.mark.parametrize("mask", ["full", "causal", "softcap"])
def test_descales_of_blocks(mask):
    check(quantized(batch=2, seqlen_q=200, seqlen_k=300, block_rows=BLOCK_ROWS), **MASKS[mask])


@pytest.mark.parametrize(
    "dims", [(16, 16), (48, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str
)
def test_head_dims(dims):
    check(quantized(seqlen_k=290, heads=(1, 1), dims=dims), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_without_a_sign(scale):
    check(quantized(heads=(1, 1)), causal=True, softmax_scale=scale)


@pytest.mark.parametrize("pack_gqa", [True, False])
def test_heads(pack_gqa):
    inputs = quantized(seqlen_q=30, heads=(8, 2), block_rows=BLOCK_ROWS)
    check(inputs, causal=True, pack_gqa=pack_gqa)
    check(quantized(seqlen_q=30, heads=(8, 2)), causal=True, pack_gqa=pack_gqa)


def test_no_descale_is_one():
    fp8.check_missing_descales("fa3")


@pytest.mark.parametrize("dims", [(64, 64), (128, 96)], ids=str)
def test_each_row_picks_its_key_exactly(dims):
    fp8.check_picks(dims, "fa3")


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(completion):
    inputs = quantized(seqlen_q=240, seqlen_k=730)
    fp8.check_completion(
        inputs, generation="fa3", arch="sm_90a", completion=completion, causal=True
    )


def test_close_to_exact_attention_on_the_numbers_stored():
    fp8.check_close_to_exact("fa3")
