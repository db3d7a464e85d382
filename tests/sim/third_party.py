"""Programs of installed packages, imported so that tests can run them on simulated devices."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

POLICIES = ("eager", "late", "random")


def import_quack(cache: Path) -> ModuleType:
    """Import the package with its kernel cache in ``cache``.

    Its autotuner imports triton, half a gigabyte that its CuTe DSL kernels do not need: a stand-in
    is there while it is imported, and gone afterwards, so that torch does not take it for real.
    """
    importlib.import_module("torch._dynamo")  # would look into the stand-in
    stand_in = ModuleType("triton")
    stand_in.runtime = ModuleType("triton.runtime")  # type: ignore[attr-defined]
    stand_in.runtime.cache = ModuleType("triton.runtime.cache")
    stand_in.runtime.cache.FileCacheManager = object
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUACK_CACHE_DIR", str(cache))
        if "triton" not in sys.modules:
            for module in (stand_in, stand_in.runtime, stand_in.runtime.cache):
                patch.setitem(sys.modules, module.__name__, module)
        return importlib.import_module("quack")


@contextmanager
def fresh_quack(cache: Path) -> Iterator[ModuleType]:
    """The package as a process sees it that has only met one device: it keeps compiled kernels and
    the device's properties in its modules, whatever architecture they were for."""
    others = _take_out("quack")
    yield import_quack(cache)
    _take_out("quack")
    sys.modules.update(others)


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}
