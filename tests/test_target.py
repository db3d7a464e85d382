"""The table of architectures."""

from __future__ import annotations

import pytest

from cute_fa.errors import InvalidArgumentError, InvalidTypeError
from cute_fa.target import KIB, TARGETS, get_target, runs_on, target_of_capability


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("sm_80", "sm_80"),
        ("SM80", "sm_80"),
        ("8.0", "sm_80"),
        (80, "sm_80"),
        ("90", "sm_90"),
        ("90a", "sm_90a"),
        ("sm_120", "sm_120a"),
        ("100", "sm_100a"),
        ("11.0", "sm_110a"),
        (" hopper ", "sm_90a"),
        ("ampere", "sm_80"),
        ("blackwell", "sm_100a"),
        (TARGETS["sm_89"], "sm_89"),
    ],
    ids=str,
)
def test_names(name, arch):
    assert get_target(name).arch == arch


@pytest.mark.parametrize("name", ["sm_70", "", "sm_", "volta", "sm_80a", -1])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(InvalidArgumentError, match="sm_90a"):
        get_target(name)


@pytest.mark.parametrize("name", [None, True, 8.0, (8, 0)], ids=str)
def test_other_types(name):
    with pytest.raises(InvalidTypeError, match="sm_80"):
        get_target(name)


def test_the_table_is_consistent():
    for arch, target in TARGETS.items():
        major, minor = target.compute_capability
        assert target.arch == arch == f"sm_{major}{minor}" + ("a" if arch.endswith("a") else "")
        # every SM keeps 1 KiB per block for itself
        assert target.smem_per_block_bytes == target.smem_per_sm_bytes - KIB
        assert target.max_threads_per_sm % 32 == 0 and target.max_blocks_per_sm >= 16
    assert TARGETS["sm_80"].smem_per_block_bytes == 163 * KIB
    assert TARGETS["sm_89"].smem_per_block_bytes == 99 * KIB
    assert TARGETS["sm_90a"].smem_per_block_bytes == 227 * KIB


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((12, 1), "sm_121a")],
)
def test_target_of_a_gpu(capability, arch):
    assert target_of_capability(capability).arch == arch


def test_a_gpu_that_is_not_in_the_table():
    with pytest.raises(InvalidArgumentError, match=r"7\.5"):
        target_of_capability((7, 5))


def test_instruction_sets():
    assert get_target("sm_90a").has_wgmma and not get_target("sm_90a").has_tcgen05
    assert not get_target("sm_90").has_wgmma  # wgmma exists in sm_90a code only
    assert get_target("sm_100a").has_tcgen05 and not get_target("sm_100a").has_wgmma
    assert not get_target("sm_120a").has_tcgen05 and not get_target("sm_80").has_wgmma


@pytest.mark.parametrize(
    ("built", "arch", "runs"),
    [
        ("sm_80", "sm_80", True),
        ("sm_80", "sm_86", True),
        ("sm_86", "sm_80", False),
        ("sm_80", "sm_90a", False),
        ("sm_90", "sm_90a", True),
        ("sm_90a", "sm_90", False),
        ("sm_100f", "sm_103a", True),
        ("sm_101a", "sm_110a", True),  # its name before CUDA 13
        ("sm_101f", "sm_110a", True),
        ("sm_100f", "sm_110a", False),
        ("sm_101a", "sm_100a", False),
        ("sm_100a", "sm_103a", False),
        ("sm_120a", "sm_121a", False),
    ],
)
def test_binary_compatibility(built: str, arch: str, runs: bool) -> None:
    assert runs_on(built, get_target(arch)) is runs
