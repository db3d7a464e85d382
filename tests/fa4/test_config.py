"""FA4's plan: tile table, tensor memory, shared memory, registers; what makes it illegal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa import flash_attn_func
from cute_fa.blocks.plan import REGISTERS_PER_SM
from cute_fa.build import can_run
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.exp2 import polynomial_pairs
from cute_fa.fa4.config import REGISTERS, Fa4FwdConfig, pick_fwd
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import KIB, TARGETS
from cute_fa.testing.inputs import normal_inputs

LEGAL = Fa4FwdConfig("float16", 64, 64)
BLACKWELL = TARGETS["sm_100a"]


def _pick(head_dim: int, head_dim_v: int | None = None, **mask) -> Fa4FwdConfig:
    return pick_fwd(KernelVariant("bfloat16", head_dim, head_dim_v or head_dim, **mask), BLACKWELL)


def _row(config: Fa4FwdConfig) -> tuple[float, ...]:
    """Of the tables below."""
    tiles_kib = (config.smem_bytes - config.smem_small_bytes) / KIB
    columns = config.tmem_map.columns_used
    return config.num_q_tiles, config.tile_n, config.stages, columns, tiles_kib


# (D, Dv, causal) → Q tiles, tile_n, stages, TMEM columns, KiB of tiles: the README's table.
TABLE = {
    (32, 32, False): (2, 128, 8, 320, 96),
    (64, 64, False): (2, 128, 8, 384, 192),
    (64, 64, True): (2, 128, 8, 384, 160),
    (96, 96, False): (2, 128, 5, 448, 216),
    (96, 96, True): (2, 128, 7, 448, 216),
    (128, 128, False): (2, 128, 3, 512, 224),
    (128, 128, True): (2, 128, 5, 512, 224),
    (192, 128, True): (2, 96, 3, 448, 204),
    (192, 192, False): (1, 128, 5, 448, 216),
    (192, 192, True): (1, 128, 7, 448, 216),
    (256, 256, False): (1, 128, 3, 512, 224),
    (256, 256, True): (1, 128, 5, 512, 224),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v", "causal"), TABLE)
def test_tile_table(head_dim, head_dim_v, causal):
    config = _pick(head_dim, head_dim_v, causal=causal)
    assert config.is_paired == (config.num_q_tiles == 1)
    assert _row(config) == TABLE[head_dim, head_dim_v, causal]


# The same of FP8, without a mask.
FP8_TABLE = {
    (64, 64): (2, 128, 8, 384, 112),
    (128, 128): (2, 128, 8, 512, 224),
    (192, 128): (2, 128, 4, 512, 208),
    (256, 256): (1, 128, 4, 512, 224),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v"), FP8_TABLE)
def test_tile_table_of_fp8(head_dim, head_dim_v):
    config = pick_fwd(KernelVariant("float8_e4m3fn", head_dim, head_dim_v), BLACKWELL)
    assert _row(config) == FP8_TABLE[head_dim, head_dim_v]
    assert (config.out_dtype, config.has_own_o) == ("bfloat16", True)
    # P begins with its S, and is at most 2^8.
    assert config.tmem_map.p == config.tmem_map.s
    assert config.tmem_map.p_columns == config.tile_n // 4
    assert config.p_exponent + config.rescale_threshold == 8.0
    with pytest.raises(InvalidArgumentError, match=r"0 to 0: P of up to 2\^8"):
        replace(config, rescale_threshold=1.0)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_tensor_memory_map(dims):
    """S buffers, then O tiles, side by side; P within its S, its first part clear of the scores
    that are read behind it; a power of two is allocated."""
    config = _pick(*dims)
    areas = [(start, config.tile_n) for start in config.tmem_map.s]
    areas += [(start, config.padded_dv) for start in config.tmem_map.o]
    ends = [start + width for start, width in areas]
    assert [start for start, _ in areas] == [0, *ends[:-1]]
    assert ends[-1] == config.tmem_map.columns_used <= config.tmem_map.columns <= 512
    assert config.tmem_map.columns & (config.tmem_map.columns - 1) == 0
    for s, p in zip(config.tmem_map.s, config.tmem_map.p, strict=True):
        first_part = config.first_part_columns // (4 // config.element_bytes)
        assert s == p and p + first_part <= s + config.first_part_columns < s + config.tile_n


@pytest.mark.parametrize(("dim", "roles"), [(128, 16), (256, 12)])
def test_roles_are_all_warps(dim, roles):
    config = _pick(dim)
    assert sum(map(len, config.roles.values())) == roles == config.num_threads // 32
    assert [w for warps in config.roles.values() for w in warps] == list(range(roles))
    assert config.correction_warp % 4 == 0, "warp w of a warpgroup reaches lanes 32w … only"


@pytest.mark.parametrize("num_q_tiles", REGISTERS)
def test_registers_fit_the_register_file(num_q_tiles):
    """setmaxnreg only moves registers within what the CTA was launched with."""
    softmax, correction, others = REGISTERS[num_q_tiles]
    warpgroups = num_q_tiles + 2
    at_launch = REGISTERS_PER_SM // (128 * warpgroups) // 8 * 8
    assert num_q_tiles * softmax + correction + others <= warpgroups * at_launch
    assert others <= correction <= at_launch <= softmax
    assert all(count % 8 == 0 for count in REGISTERS[num_q_tiles])


def test_share_of_the_polynomial_belongs_to_the_architecture():
    """The special function unit of sm_103a is twice as fast: there is nothing to share."""
    variant = KernelVariant("bfloat16", 128, 128)
    shares = {arch: pick_fwd(variant, TARGETS[arch]) for arch in ("sm_100a", "sm_103a")}
    of_chunks = [shares["sm_100a"].polynomial_pairs_of(chunk) for chunk in range(4)]
    assert of_chunks == [(2, 8, 13), *[(1, 4, 6, 9, 12, 14)] * 2, (2, 8, 13)]
    assert of_chunks == [polynomial_pairs(chunk, 4, 6) for chunk in range(4)]
    assert not any(shares["sm_103a"].polynomial_pairs_of(chunk) for chunk in range(4))


def test_who_is_persistent():
    """Equal tiles; unequal ones are given out by the hardware, the longest first."""
    assert _pick(64).is_persistent and _pick(64).has_own_o
    for feature in ("causal", "has_window_left", "has_window_right", "is_varlen"):
        assert not _pick(64, **{feature: True}).is_persistent
    assert _pick(192, 128).is_persistent and not _pick(192, 128).has_own_o


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_q_tiles": 3}, "1 or 2"),
        ({"tile_n": 72}, "a multiple of 32 from 64 to 256"),
        ({"tile_n": 32}, "a multiple of 32 from 64 to 256"),
        ({"stages": 2}, "at least 3"),
        ({"polynomial_pairs": 17}, "0 to 16"),
        ({"rescale_threshold": 16.0}, "0 to 15"),
        ({"packed_group": 3}, "divisor of 128"),
        ({"tile_n": 224}, "2 S buffers · 224 + 2 Q tiles · 64 for O = 576 columns"),
        (
            {"stages": 20},
            "2·(256·64 for Q and O + 20 stages · 128·64 for K or V) + 2488 for statistics and "
            "mbarriers = 362936",
        ),
    ],
)
def test_illegal_plans_say_why(changes, words):
    with pytest.raises(InvalidArgumentError) as error:
        replace(LEGAL, **changes)
    assert words in str(error.value)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_unsupported_architectures(arch):
    with pytest.raises(UnsupportedError, match="tcgen05"):
        pick_fwd(KernelVariant("float16", 64, 64), TARGETS[arch])


PROBLEM = AttentionProblem(1, 64, 64, 6, 2, 64, 64, "bfloat16")


@pytest.mark.parametrize(
    ("arch", "automatic"), [("sm_89", "fa2"), ("sm_90a", "fa3"), ("sm_120a", "fa2")]
)
def test_other_architectures_are_refused(arch, automatic):
    """sm_120 has no tensor memory: there the problem is FA2's."""
    support = can_run(PROBLEM, arch, "fa4")
    assert not support.ok and "sm_100a, sm_103a" in support.reason
    assert automatic in support.alternatives
    assert can_run(PROBLEM, arch).generation == automatic
    q, k, v = normal_inputs(PROBLEM)[:3]
    with pytest.raises(UnsupportedError, match="does not serve"):
        flash_attn_func(q, k, v, generation="fa4", arch=arch, backend="sim")


def test_heads_that_do_not_pack_are_refused_when_asked_for():
    """Three query heads per K/V head: 128 rows hold no whole number of queries."""
    q, k, v = normal_inputs(PROBLEM)[:3]
    with pytest.raises(UnsupportedError, match="a divisor of 128") as error:
        flash_attn_func(q, k, v, generation="fa4", arch="sm_100a", backend="sim", pack_gqa=True)
    assert "pack_gqa" in str(error.value)
