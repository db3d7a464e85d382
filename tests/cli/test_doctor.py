"""``cute-fa doctor``: every check, and what it says when something is missing."""

from __future__ import annotations

import pytest

from cute_fa.build import toolchain
from cute_fa.errors import MissingToolError


def by_name(document: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in document["findings"]}


def test_this_machine_is_fine(cute_fa) -> None:
    code, document = cute_fa("doctor", "--json")
    found = by_name(document)
    assert code == 0, document
    for name in ("cute-fa", "torch", "numpy", "tvm-ffi", "CuTe DSL", "C compiler", "self-test"):
        assert found[name]["status"] == "ok", found[name]
    assert toolchain.toolchain().flavour in found["CuTe DSL"]["detail"]
    assert found["cache"]["status"] == "ok"


def test_what_is_missing_comes_with_its_command(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_dsl():
        raise MissingToolError("the CuTe DSL is not installed", fix=toolchain.INSTALL_DSL)

    monkeypatch.setattr(toolchain, "toolchain", no_dsl)
    monkeypatch.setattr(toolchain, "c_compiler", lambda: None)
    code, text = cute_fa("doctor", "--no-self-test")
    assert code == 1
    assert toolchain.INSTALL_DSL in text and toolchain.INSTALL_CC in text
    assert sum(line.startswith("BAD") for line in text.splitlines()) == 2


def test_settings_that_change_the_compiler_are_named(
    cute_fa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    _, document = cute_fa("doctor", "--no-self-test", "--json")
    assert by_name(document)["CUTE_DSL_LINEINFO"]["fix"] == "unset CUTE_DSL_LINEINFO"


def test_a_cache_that_is_off_is_noted(cute_fa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    _, document = cute_fa("doctor", "--no-self-test", "--json")
    assert by_name(document)["cache"]["status"] == "note"
