"""Scalar arithmetic of the softmax, and the reductions over the quad of threads that hold a row."""

from __future__ import annotations

import math

import cutlass
from cutlass import cute

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
NEG_INF = float("-inf")


def exp2(x):
    """2ˣ by ex2.approx.ftz (2 ulp; 2^-inf = 0); takes a scalar or a vector."""
    return cute.math.exp2(x, fastmath=True)


def fma(x: cute.TensorSSA, factor: cutlass.Float32, addend: cutlass.Float32) -> cute.TensorSSA:
    """x·factor + addend with one rounding, elementwise; both scalars are broadcast."""
    return cute.math.fma(x, cute.full_like(x, factor), cute.full_like(x, addend))


def tanh_from_exp2(x_log2e2):
    """tanh(x), given ``x_log2e2`` = 2·log2(e)·x: 1 − 2 / (1 + e^2x), exact at both infinities.

    tanh.approx would be one instruction, but its relative error is 2^-11 (PTX ISA, tanh), and a
    softcap of 50 turns that into 0.02 on a score, ten times what bf16 rounding does to P. This form
    costs two more and errs by some 1e-7.
    """
    return 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + exp2(x_log2e2))


def quad_max(x: cutlass.Float32) -> cutlass.Float32:
    """Maximum over the four threads that share a row of an mma accumulator."""
    for offset in (2, 1):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
    return x


def quad_sum(x: cutlass.Float32) -> cutlass.Float32:
    """Sum over the four threads that share a row of an mma accumulator."""
    for offset in (2, 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=offset)
    return x
