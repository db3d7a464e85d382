"""Occupancy by hand-worked examples, and the registers of warp roles."""

from __future__ import annotations

import pytest

from cute_fa.build.resources import occupancy, role_registers
from cute_fa.target import KIB, TARGETS


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "smem", "expected"),
    [
        # 164 KiB / (48 + 1) KiB = 3
        ("sm_80", 128, 128, 48 * KIB, (3, "shared memory")),
        # 65536 / (168 · 32) = 12 warps, 4 each
        ("sm_80", 128, 168, 16 * KIB, (3, "registers")),
        # 161 rounds up to 168
        ("sm_80", 128, 161, 16 * KIB, (3, "registers")),
        # 2048 / 256 and 1536 / 256
        ("sm_80", 256, 32, 0, (8, "threads")),
        ("sm_86", 256, 32, 0, (6, "threads")),
        # small CTAs run into the number of CTAs
        ("sm_80", 32, 32, 0, (32, "CTAs")),
        ("sm_89", 32, 32, 0, (24, "CTAs")),
        ("sm_86", 32, 32, 0, (16, "CTAs")),
        # a whole SM: 227 + 1 of 228 KiB
        ("sm_90a", 384, 168, 227 * KIB, (1, "shared memory")),
        # 49 + 1 KiB fits twice into 100; one byte more is rounded up to 128
        ("sm_120a", 128, 64, 49 * KIB, (2, "shared memory")),
        ("sm_120a", 128, 64, 49 * KIB + 1, (1, "shared memory")),
    ],
)
def test_occupancy(
    arch: str, threads: int, registers: int, smem: int, expected: tuple[int, str]
) -> None:
    assert occupancy(TARGETS[arch], threads, registers, smem) == expected


def test_threads_round_up_to_whole_warps() -> None:
    a, _ = occupancy(TARGETS["sm_90"], 97, 128, 0)
    b, _ = occupancy(TARGETS["sm_90"], 128, 128, 0)
    assert a == b == 4


def test_what_does_not_fit_is_zero() -> None:
    assert occupancy(TARGETS["sm_86"], 128, 64, 120 * KIB) == (0, "shared memory")
    assert occupancy(TARGETS["sm_80"], 1024, 255, 0) == (0, "registers")


def test_every_target_has_a_limit_of_ctas() -> None:
    for target in TARGETS.values():
        assert occupancy(target, 32, 1, 0)[0] in (16, 24, 32)


SPECIALISED = """
    @%p1 bra $L2;
    setmaxnreg.dec.sync.aligned.u32 24;
$L2:
    @!%p3 setmaxnreg.inc.sync.aligned.u32 240;
"""


def test_role_registers() -> None:
    assert role_registers(".entry k ()\n{ ret; }", 168) == {"all": 168}
    assert role_registers(SPECIALISED, 168) == {"role 0 (dec)": 24, "role 1 (inc)": 240}
