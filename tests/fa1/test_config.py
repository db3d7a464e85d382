"""FA1's plan: the paper's block sizes, what bends them, and the arithmetic of illegal ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.fa1.config import Fa1FwdConfig, paper_tiles, pick_fwd
from cute_fa.problem import KernelVariant
from cute_fa.target import TARGETS

LEGAL = Fa1FwdConfig("float16", 64, 64, tile_m=32, tile_n=128, tile_dv=64)


def _pick(head_dim: int, arch: str = "sm_80", head_dim_v: int | None = None) -> Fa1FwdConfig:
    return pick_fwd(KernelVariant("bfloat16", head_dim, head_dim_v or head_dim), TARGETS[arch])


def test_paper_tiles():
    """⌈M / 4d⌉ with M = 163 · 1024 / 2 elements, and Br no more than d."""
    assert paper_tiles(64, 163 * 1024) == (64, 326)
    assert paper_tiles(128, 163 * 1024) == (128, 163)
    assert paper_tiles(256, 163 * 1024) == (82, 82)


# (head_dim, arch) → (tile_m, tile_n), the table of the rung's README.
TABLE = {
    (32, "sm_80"): (32, 256),
    (64, "sm_80"): (32, 256),
    (96, "sm_80"): (32, 192),
    (128, "sm_80"): (64, 128),
    (192, "sm_80"): (64, 64),
    (256, "sm_80"): (64, 64),
    (32, "sm_86"): (32, 256),
    (64, "sm_86"): (32, 192),
    (96, "sm_86"): (32, 128),
    (128, "sm_86"): (64, 64),
    (192, "sm_86"): (32, 64),
    (256, "sm_86"): (16, 64),
}


@pytest.mark.parametrize(("head_dim", "arch"), TABLE)
def test_tile_table(head_dim, arch):
    config = _pick(head_dim, arch)
    assert (config.tile_m, config.tile_n) == TABLE[head_dim, arch]
    _, bc = paper_tiles(head_dim, TARGETS[arch].smem_per_block_bytes)
    # The paper's Bc, but for the floor of 16 columns a warp and the cap that keeps 32 rows of S
    # in registers.
    assert config.tile_n == min(max(64, bc // 64 * 64), 256)


@pytest.mark.parametrize("arch", TARGETS)
def test_every_head_dim_has_a_plan(arch):
    """Every pair of multiples of 8 up to 256, on the smallest shared memory too."""
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            config = _pick(head_dim, arch, head_dim_v)
            assert config.smem_bytes <= TARGETS[arch].smem_per_block_bytes


def test_variant_reaches_the_config():
    variant = KernelVariant("float16", 64, 32, has_window_left=True, causal=True, has_softcap=True)
    config = pick_fwd(variant, TARGETS["sm_80"])
    assert config.dtype == "float16"
    assert (config.head_dim, config.head_dim_v) == (64, 32)
    assert config.is_causal and config.has_window_left and config.has_softcap
    assert not config.has_window_right


def test_smem_arithmetic():
    """Q 32·64, K and V 128·64 each, in 2 bytes; four warps' 32 rows of 64 + 8 fp32 without the
    last 8; statistics of 2·4 + 2 fp32 a row."""
    tiles = 2 * 64 * (32 + 128 + 128)
    partial = 4 * (4 * 32 * (64 + 8) - 8)
    assert LEGAL.smem_bytes == tiles + partial + 4 * 32 * (2 * 4 + 2)


def test_workspace_shapes():
    shapes = {w.name: (w.shape, w.dtype) for w in LEGAL.workspace(2, 100, 3)}
    assert shapes == {
        "o_accum": ((2, 100, 3, 64), "float32"),
        "row_max": ((2, 3, 100), "float32"),
        "row_sum": ((2, 3, 100), "float32"),
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tile_m": 24}, "tile_m"),
        ({"tile_m": 0}, "tile_m"),
        ({"tile_n": 96}, "multiple of 64"),
        ({"tile_dv": 48}, "tile_dv"),
        ({"head_dim_v": 96, "tile_dv": 96}, "fp32 of O per update"),
        ({"head_dim_v": 96}, "padded head_dim_v"),
        ({"tile_m": 64, "tile_n": 256, "tile_dv": 32}, "64 × slice_n 64 / 32 = 128"),
        ({"tile_m": 64, "tile_dv": 64}, "64 × tile_dv 64 / 32 = 128"),
        ({"smem_limit_bytes": 48 * 1024}, "K 16384 + V 16384"),
    ],
    ids=str,
)
def test_illegal_plans_say_why(change, complaint):
    with pytest.raises(InvalidArgumentError) as error:
        replace(LEGAL, **change)
    assert complaint in str(error.value)


def test_pick_refuses_fp8_by_name():
    with pytest.raises(UnsupportedError, match="convert the inputs"):
        pick_fwd(KernelVariant("float8_e4m3fn", 64, 64), TARGETS["sm_80"])
