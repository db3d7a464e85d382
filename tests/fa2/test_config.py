"""FA2's plan: the tile table, its shared memory, and the arithmetic of illegal plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.fa2.config import Fa2FwdConfig, pick_fwd
from cute_fa.problem import KernelVariant
from cute_fa.target import KIB, TARGETS

LEGAL = Fa2FwdConfig("float16", 64, 64)


def _pick(arch: str, head_dim: int, head_dim_v: int | None = None, **mask) -> Fa2FwdConfig:
    variant = KernelVariant("bfloat16", head_dim, head_dim_v or head_dim, **mask)
    return pick_fwd(variant, TARGETS[arch])


# (arch, head dim) → tile_m, tile_n, warps, stages, KiB of shared memory: the README's table.
TABLE = {
    ("sm_80", 32): (128, 64, 4, 2, 24),
    ("sm_80", 64): (128, 64, 4, 2, 48),
    ("sm_80", 96): (128, 64, 4, 2, 72),
    ("sm_80", 128): (128, 32, 4, 2, 64),
    ("sm_80", 192): (128, 64, 8, 2, 144),
    ("sm_80", 256): (128, 64, 8, 1, 128),
    ("sm_86", 96): (64, 64, 4, 1, 36),
    ("sm_89", 128): (64, 64, 4, 1, 48),
    ("sm_120a", 192): (128, 64, 8, 1, 96),
    ("sm_121a", 256): (64, 64, 4, 1, 96),
    ("sm_90a", 256): (128, 64, 8, 2, 192),
    ("sm_100a", 128): (128, 64, 8, 2, 96),
}


@pytest.mark.parametrize(("arch", "head_dim"), TABLE)
def test_tile_table(arch, head_dim):
    config = _pick(arch, head_dim)
    warps, smem_kib = config.num_threads // 32, config.smem_bytes // KIB
    got = (config.tile_m, config.tile_n, warps, config.stages, smem_kib)
    assert got == TABLE[arch, head_dim]


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("has_softcap", [False, True])
def test_every_pair_of_head_dims_has_a_plan(arch, has_softcap):
    """Any multiple of 8 for D and Dv; two CTAs of four warps per SM, or one of eight."""
    target = TARGETS[arch]
    for head_dim in range(8, 257, 8):
        for head_dim_v in (8, head_dim, 136, 256):
            config = _pick(arch, head_dim, head_dim_v, has_softcap=has_softcap)
            assert config.padded_d - head_dim < 32 and config.padded_dv - head_dim_v < 32
            if config.num_warps == 4 and max(head_dim, head_dim_v) <= 192:
                per_cta = config.smem_bytes + target.smem_reserved_per_block_bytes
                assert 2 * per_cta <= target.smem_per_sm_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile_m": 96}, "16 rows · 4 warps = 64"),
        ({"tile_n": 72}, "multiple of 16"),
        ({"tile_n": 16, "head_dim": 32}, "32 rows at a time"),
        ({"num_threads": 100}, "whole warps"),
        ({"stages": 0}, "at least 1"),
        ({"stages": 6}, "2·(128·64 for Q and O + 6 stages · 64·(64 + 64) for K and V) = 114688"),
    ],
)
def test_illegal_plans_say_why(changes, words):
    with pytest.raises(InvalidArgumentError) as error:
        replace(LEGAL, **changes)
    assert words in str(error.value)


def test_unsupported_dtype():
    with pytest.raises(UnsupportedError, match="16-bit"):
        pick_fwd(KernelVariant("float8_e4m3fn", 64, 64), TARGETS["sm_89"])
