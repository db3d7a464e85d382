"""FA3's plan: the tile table, its shared memory and registers, and what makes a plan illegal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.blocks.plan import REGISTERS_PER_SM
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.fa3.config import FP8_REGISTERS, REGISTERS, Fa3FwdConfig, pick_fwd, preferred_group
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import KIB, TARGETS
from cute_fa.varlen import Packing, VarlenProblem

LEGAL = Fa3FwdConfig("float16", 64, 64)
HOPPER = TARGETS["sm_90a"]


def _pick(head_dim: int, head_dim_v: int | None = None, **mask) -> Fa3FwdConfig:
    return pick_fwd(KernelVariant("bfloat16", head_dim, head_dim_v or head_dim, **mask), HOPPER)


# (D, Dv, causal) → tile_m, tile_n, consumers, KiB of tiles in shared memory: the README's table.
# Where there is room, O has strips of its own.
TABLE = {
    (32, 32, False): (192, 128, 3, 56),
    (64, 64, False): (192, 128, 3, 112),
    (96, 96, False): (128, 160, 2, 168),
    (64, 64, True): (192, 128, 3, 112),
    (96, 96, True): (128, 128, 2, 144),
    (128, 128, False): (128, 176, 2, 208),
    (128, 128, True): (128, 128, 2, 192),
    (192, 128, False): (128, 128, 2, 208),
    (192, 128, True): (128, 128, 2, 208),
    (192, 192, True): (128, 112, 2, 216),
    (256, 256, False): (128, 80, 2, 224),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal"), TABLE)
def test_tile_table(head_dim, head_dim_v, causal):
    config = _pick(head_dim, head_dim_v, causal=causal)
    smem_kib = (config.smem_bytes - 8 * config.num_mbarriers) / KIB
    got = (config.tile_m, config.tile_n, config.num_consumers, smem_kib)
    assert got == TABLE[head_dim, head_dim_v, causal]


# The same of fp8 inputs, with the third ring.
FP8_TABLE = {
    (64, 64, False): (192, 160, 3, 96),
    (64, 64, True): (192, 128, 3, 84),
    (96, 96, False): (128, 192, 2, 144),
    (128, 128, False): (128, 192, 2, 192),
    (128, 128, True): (128, 128, 2, 144),
    (192, 128, False): (128, 128, 2, 168),
    (192, 192, True): (128, 128, 2, 216),
    (256, 256, False): (128, 96, 2, 208),
    (256, 256, True): (128, 64, 2, 192),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal"), FP8_TABLE)
def test_fp8_tile_table(head_dim, head_dim_v, causal):
    config = pick_fwd(KernelVariant("float8_e4m3fn", head_dim, head_dim_v, causal), HOPPER)
    smem_kib = (config.smem_bytes - 8 * config.num_mbarriers) / KIB
    got = (config.tile_m, config.tile_n, config.num_consumers, smem_kib)
    assert got == FP8_TABLE[head_dim, head_dim_v, causal]


@pytest.mark.parametrize(
    ("features", "has_own_o"),
    [
        ({}, False),
        ({"has_softcap": True}, False),
        ({"causal": True}, True),
        ({"has_window_left": True}, True),
        ({"has_window_right": True}, True),
        ({"is_varlen": True}, False),
    ],
)
def test_everybody_is_persistent(features, has_own_o):
    """Beside 176 columns of K and V there is no room for strips of O."""
    config = _pick(128, **features)
    assert config.is_persistent and config.has_own_o == has_own_o


def test_strips_of_o_fit():
    """O gets strips of its own exactly where they fit beside everything else."""
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            config = _pick(head_dim, head_dim_v, causal=True)
            if not config.has_own_o:
                with pytest.raises(InvalidArgumentError, match="shared memory"):
                    replace(config, has_own_o=True)


@pytest.mark.parametrize(
    ("heads_q", "heads_k", "seqlen_q", "group"),
    [
        (8, 1, 1, 8),
        (8, 2, 24, 4),  # 96 of 192 rows, against four tiles of 24
        (2, 1, 192, 1),  # two full tiles either way
        (2, 1, 200, 2),  # 400 rows are three tiles, 2 · 200 are four
        (3, 1, 1, 1),  # 3 does not divide 64
        (128, 1, 1, 1),
        (4, 4, 1, 1),
    ],
)
def test_preferred_group(heads_q, heads_k, seqlen_q, group):
    problem = AttentionProblem(1, seqlen_q, 500, heads_q, heads_k, 64, 64, "float16")
    assert preferred_group(problem) == group


def test_preferred_group_of_packed_sequences_goes_by_the_mean_length():
    problem = AttentionProblem(1, 1, 1, 8, 1, 64, 64, "float16")
    short = VarlenProblem.of(problem, Packing.of_lengths((5, 400), (500, 500)))
    assert preferred_group(short) == 8  # 203 queries are nine packed tiles, sixteen otherwise
    full = VarlenProblem.of(problem, Packing.of_lengths((184, 200), (500, 500)))
    assert preferred_group(full) == 1


@pytest.mark.parametrize("registers", [REGISTERS, FP8_REGISTERS])
@pytest.mark.parametrize("num_consumers", REGISTERS)
def test_registers_fit_the_register_file(num_consumers, registers):
    """setmaxnreg only moves registers within what the CTA was launched with."""
    producer, consumer = registers[num_consumers]
    threads = 128 * (1 + num_consumers)
    at_launch = min(REGISTERS_PER_SM // threads // 8 * 8, 255)
    assert 128 * (producer + num_consumers * consumer) <= threads * at_launch
    assert producer <= at_launch <= consumer
    assert producer % 8 == consumer % 8 == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_consumers": 4}, "one of 2, 3 warpgroups"),
        ({"tile_n": 72}, "multiple of 16"),
        ({"tile_n": 272}, "up to 256"),
        ({"stages": 1}, "at least 2"),
        ({"packed_group": 3}, "a divisor of 64"),
        ({"dtype": "float8_e4m3fn", "head_dim": 72}, "multiple of 16"),
        ({"dtype": "float8_e4m3fn", "tile_n": 112}, "multiple of 32"),
        ({"has_block_descales": True}, "fp8 inputs"),
        (
            {"dtype": "float8_e4m3fn", "has_block_descales": True, "tile_n": 96},
            "a divisor of 128",
        ),
        ({"packed_group": 128}, "a divisor of 64"),
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


@pytest.mark.parametrize("arch", ["sm_100a", "sm_90"])
def test_unsupported_architectures(arch):
    with pytest.raises(UnsupportedError, match="wgmma"):
        pick_fwd(KernelVariant("float16", 64, 64), TARGETS[arch])
