"""What people get wrong with tcgen05 and tensor memory, in CuTe DSL on sm_100a."""

from __future__ import annotations

import pytest
import torch

from tests.sim.mistakes.blackwell import TILES, K, M, N, TensorCoreGemm
from tests.sim.mistakes.judge import Data, Mistake, assert_reported, assert_sound

ARCH = "sm_100a"

RULES = {
    "no barrier behind the allocation": ("shared-race",),
    "an accumulator outside the allocation": ("tmem-unallocated",),
    "too few columns allocated": ("tmem-unallocated",),
    "an allocation while another has the rest": ("deadlock",),
    "the bytes of A announced only": ("read-before-arrival",),
    "no wait for the operands": ("read-before-arrival",),
    "an accumulator that nobody has cleared": ("uninitialised-tmem-read",),
    "no commit": ("deadlock",),
    "a commit counted twice": ("deadlock",),
    "no wait for the last commit": ("tmem-read-before-completion",),
    "no commit of the last product": ("tmem-read-before-completion",),
    "operands refilled before the commit": ("overwrite-while-reading", "shared-race"),
    "the lanes of another warp": ("tmem-lane-access",),
    # Legal as long as all registers are used before: a warning.
    "no wait for the load": ("tmem-load-order",),
    "cells cleared while they are loaded": ("tmem-unwaited-load", "tmem-load-order"),
    "no wait for the store": ("tmem-unwaited-store",),
    "freed while others still load": ("tmem-race",),
    "tensor memory is never freed": ("tmem-leak",),
    "freed by every warp": ("tmem-allocation",),
    "freed twice": ("tmem-allocation",),
    "more columns freed than allocated": ("tmem-allocation", "tmem-leak"),
}


def tensors() -> Data:
    """Small integers, whose sums of products are exact."""
    operands = [
        torch.arange(rows * TILES * K).remainder(5).reshape(rows, TILES * K).half()
        for rows in (M, N)
    ]
    return *operands, torch.full((M, N), float("nan"))


def test_the_sound_program_is_clean() -> None:
    assert_sound(ARCH, TensorCoreGemm, tensors, lambda a, b: a.float() @ b.float().T + 1)


@pytest.mark.parametrize("bug", RULES)
def test_the_mistake_is_reported(bug: str) -> None:
    assert_reported(ARCH, Mistake(TensorCoreGemm, bug, RULES[bug]), tensors)
