"""What tests of several functions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cute_fa.ops import sources


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong call has to be refused before anything is compiled for it."""

    def compiled(*_: Any) -> None:
        raise AssertionError("compiled although the call is wrong")

    monkeypatch.setattr(sources, "kernel", compiled)


class KeptGraphs(list):
    """A backend of ``torch.compile`` that runs each graph as it is and keeps it."""

    def __call__(self, graph: Any, example_inputs: Any) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


@pytest.fixture
def graphs() -> KeptGraphs:
    return KeptGraphs()
