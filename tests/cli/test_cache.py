"""``cute-fa cache`` on a cache of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cute_fa.build.cache import KernelCache
from cute_fa.cli.main import main

KEY = "f" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    cache = KernelCache()
    with cache.lock(KEY):
        cache.store(KEY, {"kernel.ptx": b"text"}, {"label": "fa2 fwd sm_80"})
    return cache


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_path(cache: KernelCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{cache.root}\n"
    assert main(["cache", "path", "--json"]) == 0
    assert document(capsys) == {"path": str(cache.root)}


def test_ls(cache: KernelCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    text = capsys.readouterr().out
    assert "fa2 fwd sm_80" in text and KEY[:12] in text and "1 kernel, " in text
    assert main(["cache", "ls", "--json"]) == 0
    listed = document(capsys)
    assert [entry["key"] for entry in listed["entries"]] == [KEY]
    assert listed["bytes"] == cache.entries()[0].nbytes


def test_verify_fails_on_damage_and_removes_it(
    cache: KernelCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "verify"]) == 0
    (cache.path(KEY) / "kernel.ptx").write_bytes(b"tex")
    capsys.readouterr()
    assert main(["cache", "verify", "--json"]) == 1
    assert document(capsys)["damaged"] == {KEY: "kernel.ptx does not match its checksum"}
    assert main(["cache", "verify"]) == 0
    assert "0 kernels checked, 0 damaged" in capsys.readouterr().out


def test_clear(cache: KernelCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "--json"]) == 0
    assert document(capsys)["removed"] == 1
    assert cache.entries() == []


def test_a_directory_that_others_can_write_is_bad_input(
    cache: KernelCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.root.chmod(0o777)
    assert main(["cache", "ls"]) == 2
    assert "chmod 700" in capsys.readouterr().err
