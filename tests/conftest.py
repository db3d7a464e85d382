"""The rungs of the ladder, each on the first architecture that it was written for; test order."""

from __future__ import annotations

import pytest

from tests.rungs.bench import Bench


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: begun last, one of them would leave the other cores idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
