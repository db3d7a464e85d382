"""One cache for all tests of the command line, so that each kernel is compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cute_fa.cli.main import main


@pytest.fixture(scope="session")
def shared_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def shared_cache(shared_cache_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", shared_cache_dir)


@pytest.fixture
def cute_fa(
    shared_cache: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """``cute_fa("run", "-s", "8")`` → (exit code, stdout); with ``--json`` stdout is parsed."""
    import json

    def call(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(list(argv))
        out = capsys.readouterr().out
        return code, json.loads(out) if "--json" in argv else out

    return call
