"""Two small bundles with recorded results of the simulator, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cute_fa.build import aot, presets
from cute_fa.gpu_check import agreement
from cute_fa.gpu_check.place import Place
from cute_fa.ops.bundle import LoadedBundle, load_bundle
from cute_fa.problem import KernelVariant
from cute_fa.target import get_target

CAUSAL = KernelVariant("bfloat16", 64, 64, causal=True)
PACKED = KernelVariant("bfloat16", 64, 64, is_varlen=True, has_seqused_k=True)
WISHES = (
    presets.Wish(CAUSAL, ("fa2",)),
    presets.Wish(CAUSAL, ("fa2",), {"tile_n": 32}),
    presets.Wish(PACKED, ("fa2",)),
)
FP8 = KernelVariant("float8_e4m3fn", 64, 64)
FP8_WISHES = (
    presets.Wish(FP8, ("fa3",)),
    presets.Wish(replace(FP8, has_block_descales=True), ("fa3",)),
    presets.Wish(replace(FP8, has_block_descales=True, is_varlen=True), ("fa3",)),
)


def write(output: Path, wishes: Sequence[presets.Wish], arch: str) -> Path:
    table = {"few": presets.Preset("tests", lambda: iter(wishes))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", table)
        aot.write_bundle(
            output,
            archs=[arch],
            presets=["few"],
            with_runtime=False,
            jobs=1,
            extend=agreement.record,
        )
    return output


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "few", WISHES, "sm_80")


@pytest.fixture
def bundle(folder: Path) -> LoadedBundle:
    return load_bundle(folder)


@pytest.fixture(scope="session")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "fp8", FP8_WISHES, "sm_90a")


@pytest.fixture
def simulator() -> Place:
    return Place("cpu", get_target("sm_80"))
