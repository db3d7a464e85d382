"""Packed sequences in FP8 on every rung that multiplies FP8: each has descales of its own.

Rows of q, k and v that do not count hold the NaN byte 0x7f, so that one of them in a product, even
with a P of 0, shows in the result; so do descales of blocks behind a sequence's end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cute_fa.problem import AttentionProblem
from cute_fa.quant import BLOCK_ROWS, QuantizedQKV
from cute_fa.testing.inputs import (
    extreme_inputs,
    index_coded_inputs,
    normal_inputs,
    one_hot_inputs,
    quantized_inputs,
)
from cute_fa.varlen import Packing, VarlenProblem
from tests.rungs import fp8
from tests.rungs.bench import Bench
from tests.rungs.test_varlen import PACKINGS

NAN_BYTE = 0x7F
CAUSAL = AttentionProblem(1, 1, 1, 4, 2, 64, 64, "float8_e4m3fn", causal=True)
# One kernel for most tests: compiling it is what takes the time.
USED = VarlenProblem.of(CAUSAL, PACKINGS["used both"])
# Longer than a block of descales, for each of several; and no queries, no keys.
BLOCKS = Packing.of_lengths((130, 0, 300, 17), (290, 40, 0, 129), seqused_k=(257, 40, 0, 129))


@pytest.fixture(params=fp8.EXP2)
def rung(request) -> Bench:
    return request.getfixturevalue(request.param)


def spoiled(problem: VarlenProblem, inputs: QuantizedQKV) -> QuantizedQKV:
    """NaN in rows that do not count, and in descales of blocks without rows."""
    packing = problem.require_packing()
    sides = (packing.rows_q, packing.rows_k, packing.rows_k)
    for x, descale, sequences in zip(inputs[:3], inputs[3:], sides, strict=True):
        idle = torch.ones(len(x), dtype=torch.bool)
        for number, rows in enumerate(sequences):
            idle[rows.start : rows.stop] = False
            if descale.ndim == 3:
                descale[number, :, -(-len(rows) // BLOCK_ROWS) :] = torch.nan
        x.view(torch.uint8)[idle] = NAN_BYTE
    return inputs


@pytest.mark.parametrize(
    "make",
    [index_coded_inputs, one_hot_inputs, lambda p: extreme_inputs(p, magnitude=-1e3)],
    ids=["index", "one hot", "extreme"],
)
def test_structured_inputs(rung, make):
    """Without descales; exact where the result is known."""
    inputs = make(USED)
    assert inputs.v.view(torch.uint8).eq(NAN_BYTE).any()
    rung.check(USED, inputs)


def test_strides_and_offsets_beyond_32_bits(rung):
    """Views with NaN between their rows; rows of K 2²⁵ bytes apart, so that the second sequence
    begins 2³¹ bytes from the first."""
    rung.check(USED, normal_inputs(USED, layouts=("sliced", "heads_first", "packed")))
    packing = Packing.of_lengths((3, 9), (66, 10), (3, 8), (64, 10))
    problem = VarlenProblem.of(replace(CAUSAL, heads_q=1, heads_k=1), packing)
    inputs = index_coded_inputs(problem)
    far = torch.empty(76 << 25, dtype=inputs.k.dtype).as_strided(inputs.k.shape, (1 << 25, 64, 1))
    far.copy_(inputs.k)
    rung.check(problem, inputs._replace(k=far))


def test_sequences_are_what_dense_calls_make_of_them(rung):
    """Bit for bit, with the descales of each; and by the reference."""
    inputs = spoiled(USED, quantized_inputs(USED))
    out, lse = fp8.check_packed(USED, inputs, generation=rung.generation, pack_gqa=False)
    packing = USED.require_packing()
    counted = 0
    for number, (rows_q, rows_k) in enumerate(zip(packing.rows_q, packing.rows_k, strict=True)):
        if not rows_q or not rows_k:
            continue
        of_q, of_k = slice(rows_q.start, rows_q.stop), slice(rows_k.start, rows_k.stop)
        own = QuantizedQKV(
            *(x[None, of] for x, of in zip(inputs[:3], (of_q, of_k, of_k), strict=True)),
            *(descale[number, None] for descale in inputs[3:]),
        )
        how = {"generation": rung.generation, "pack_gqa": False, "causal": True}
        own_out, own_lse = fp8.attention(own, **how)
        assert torch.equal(out[of_q], own_out[0]) and torch.equal(lse[:, of_q], own_lse[0])
        counted += 1
    assert counted == 4


@pytest.mark.parametrize(
    ("changes", "by_block"),
    [
        ({"causal": False, "head_dim": 128, "head_dim_v": 96}, False),
        ({"softcap": 5.0, "head_dim": 256, "head_dim_v": 256}, True),
    ],
    ids=str,
)
def test_descales(rung, changes, by_block):
    """Of heads and of blocks; no mask and a causal one with softcap."""
    problem = VarlenProblem.of(replace(CAUSAL, **changes), BLOCKS)
    inputs = spoiled(problem, quantized_inputs(problem, by_block=by_block))
    fp8.check_packed(problem, inputs, generation=rung.generation, pack_gqa=False)


def test_packed_heads_and_windows(rung):
    """Eight query heads share row tiles, which end where a block of descales does or between."""
    window = {"causal": False, "window_left": 150, "window_right": 20}
    problem = VarlenProblem.of(replace(CAUSAL, heads_q=8, heads_k=1, **window), BLOCKS)
    inputs = spoiled(problem, quantized_inputs(problem, by_block=True))
    fp8.check_packed(problem, inputs, generation=rung.generation, pack_gqa=True)


@pytest.mark.parametrize("completion", ["late", "random"])
def test_completion_policies(rung, completion):
    """No bit changes with the order in which copies, products and warps finish."""
    inputs = spoiled(USED, quantized_inputs(USED, seed=1))
    results = []
    for policy in ("eager", completion):
        out, lse, launch = rung.run(USED, inputs, completion=policy, seed=3)
        assert launch.hazards == []
        results.append((out.nan_to_num(nan=7.0), lse.nan_to_num(nan=7.0)))
    (out, lse), (other_out, other_lse) = results
    assert torch.equal(out, other_out) and torch.equal(lse, other_lse)
