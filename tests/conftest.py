"""The rungs of the ladder, each on the first architecture that it was written for; tools that may
be missing; test order."""

from __future__ import annotations

import pytest

from cute_fa.asm.tools import find_tool
from cute_fa.errors import MissingToolError
from tests.rungs.bench import Bench

KERNEL_FOLDERS = ("rungs", "fa1", "fa2", "fa3", "fa4")


@pytest.fixture(scope="session")
def fa1() -> Bench:
    return Bench("fa1", "sm_80")


@pytest.fixture(scope="session")
def fa2() -> Bench:
    return Bench("fa2", "sm_80")


@pytest.fixture(scope="session")
def fa3() -> Bench:
    return Bench("fa3", "sm_90a")


@pytest.fixture(scope="session")
def fa4() -> Bench:
    return Bench("fa4", "sm_100a")


def _skip_without(tool: str) -> None:
    try:
        find_tool(tool)
    except MissingToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def nvdisasm() -> None:
    """Skips where the extra ``inspect`` is not installed."""
    _skip_without("nvdisasm")


@pytest.fixture(scope="session")
def cuobjdump() -> None:
    """Skips where the extra ``inspect`` is not installed."""
    _skip_without("cuobjdump")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: begun last, one of them would leave the other cores idle."""
    first = {item.path for item in items if _is_long(item)}
    items.sort(key=lambda item: item.path not in first)


def _is_long(item: pytest.Item) -> bool:
    """Whether a test may take more than some seconds: it compiles and simulates whole kernels."""
    marks = {mark.name for mark in item.iter_markers()}
    return bool(marks & {"slow", "third_party"}) or item.path.parent.name in KERNEL_FOLDERS
