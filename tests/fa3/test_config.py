"""FA3's plan: the tile table, its shared memory and registers, and what makes a plan illegal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.fa3.config import REGISTERS, REGISTERS_PER_SM, Fa3FwdConfig, pick_fwd
from cute_fa.problem import KernelVariant
from cute_fa.target import KIB, TARGETS

LEGAL = Fa3FwdConfig("float16", 64, 64)
HOPPER = TARGETS["sm_90a"]


def _pick(head_dim: int, head_dim_v: int | None = None, **mask) -> Fa3FwdConfig:
    return pick_fwd(KernelVariant("bfloat16", head_dim, head_dim_v or head_dim, **mask), HOPPER)


# (D, Dv, causal) → tile_m, tile_n, consumers, KiB of tiles in shared memory: the README's table.
TABLE = {
    (32, 32, False): (192, 128, 3, 44),
    (64, 64, False): (192, 128, 3, 88),
    (96, 96, False): (128, 160, 2, 144),
    (96, 96, True): (128, 128, 2, 120),
    (128, 128, False): (128, 176, 2, 208),
    (128, 128, True): (128, 128, 2, 160),
    (192, 128, False): (128, 128, 2, 208),
    (192, 192, True): (128, 112, 2, 216),
    (256, 256, False): (128, 80, 2, 224),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal"), TABLE)
def test_tile_table(head_dim, head_dim_v, causal):
    config = _pick(head_dim, head_dim_v, causal=causal)
    smem_kib = (config.smem_bytes - 8 * config.num_mbarriers) / KIB
    got = (config.tile_m, config.tile_n, config.num_consumers, smem_kib)
    assert got == TABLE[head_dim, head_dim_v, causal]


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"has_softcap": True}])
def test_every_pair_of_head_dims_has_a_plan(mask):
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            config = _pick(head_dim, head_dim_v, **mask)
            assert 0 <= config.padded_d - head_dim < 32
            assert 0 <= config.padded_dv - head_dim_v < 32
            assert config.smem_bytes <= HOPPER.smem_per_block_bytes


@pytest.mark.parametrize("num_consumers", REGISTERS)
def test_registers_fit_the_register_file(num_consumers):
    """setmaxnreg only moves registers within what the CTA was launched with."""
    producer, consumer = REGISTERS[num_consumers]
    threads = 128 * (1 + num_consumers)
    at_launch = min(REGISTERS_PER_SM // threads // 8 * 8, 255)
    assert 128 * (producer + num_consumers * consumer) <= threads * at_launch
    assert producer <= at_launch <= consumer
    assert producer % 8 == consumer % 8 == 0


def test_workspace_is_empty():
    assert LEGAL.workspace(2, 100, 4) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float32"}, "float16 or bfloat16"),
        ({"head_dim": 60}, "multiple of 8"),
        ({"head_dim_v": 264}, "up to 256"),
        ({"num_consumers": 4}, "one of 2, 3 warpgroups"),
        ({"tile_n": 72}, "multiple of 16"),
        ({"tile_n": 272}, "up to 256"),
        ({"stages": 1}, "at least 2"),
        ({"is_causal": True, "has_window_right": True}, "right window of 0"),
        ({"num_consumers": 3, "tile_n": 208}, "S 208/2 + P 208/4 + O 64/2 = 188"),
        (
            {"stages": 7},
            "2·(128·64 for Q and O + 7 stages · 128·(64 + 64) for K and V) + 8·30 for mbarriers"
            " = 246000",
        ),
    ],
)
def test_illegal_plans_say_why(changes, words):
    with pytest.raises(InvalidArgumentError) as error:
        replace(LEGAL, **changes)
    assert words in str(error.value)


def test_unsupported_dtype_architecture_and_head_dim():
    variant = KernelVariant("float16", 64, 64)
    with pytest.raises(UnsupportedError, match="16-bit"):
        pick_fwd(replace(variant, dtype="float8_e4m3fn"), HOPPER)
    with pytest.raises(UnsupportedError, match="wgmma"):
        pick_fwd(variant, TARGETS["sm_100a"])
    with pytest.raises(UnsupportedError, match="wgmma"):
        pick_fwd(variant, TARGETS["sm_90"])
    with pytest.raises(UnsupportedError, match="up to 256"):
        pick_fwd(replace(variant, head_dim=512), HOPPER)
