"""A cache directory of its own for each test, and a tiny kernel that compiles quickly."""

from __future__ import annotations

from pathlib import Path

import pytest

from cute_fa.build import registry
from cute_fa.build.cache import KernelCache
from cute_fa.build.registry import KernelEntry

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """An empty cache in its own directory, which the environment names."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path / "cache"))
    return KernelCache()


@pytest.fixture
def tiny(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> KernelEntry:
    """The tiny kernel, registered as generation "tiny", with an empty cache."""
    monkeypatch.syspath_prepend(str(KERNELS))
    from tiny_registry import TINY

    monkeypatch.setattr(registry, "KERNELS", (*registry.KERNELS, TINY))
    return TINY
