"""One small bundle with recorded results of the simulator, for all tests of this folder."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "few"
    table = {"few": presets.Preset("tests", lambda: iter(WISHES))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", table)
        aot.write_bundle(
            output,
            archs=["sm_80"],
            presets=["few"],
            with_runtime=False,
            jobs=1,
            extend=agreement.record,
        )
    return output


@pytest.fixture
def bundle(folder: Path) -> LoadedBundle:
    return load_bundle(folder)


@pytest.fixture
def simulator() -> Place:
    return Place("cpu", get_target("sm_80"))
