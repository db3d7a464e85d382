"""``cute-fa aot``: write a bundle, verify it, and say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cute_fa.build import presets
from cute_fa.cli.main import main
from cute_fa.problem import KernelVariant

WISHES = (
    presets.Wish(KernelVariant("bfloat16", 32, 32), ("fa2",)),
    presets.Wish(KernelVariant("float8_e4m3fn", 32, 32), ("fa2", "fa3")),
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"few": presets.Preset("tests", lambda: iter(WISHES))}
    monkeypatch.setattr(presets, "PRESETS", table)


def test_write_and_verify(cute_fa, few: None, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    write = ("aot", "-a", "sm_80", "-p", "few", "-o", str(folder), "--no-runtime", "-j", "1")
    code, text = cute_fa(*write)
    assert code == 0
    assert "2 small problems" in text and "left out: 1 not served, or of no use" in text
    code, document = cute_fa(*write, "--no-agreement", "--json")
    assert code == 0 and document["agreement_cases"] == document["runtime_bytes"] == 0
    assert [kernel["label"] for kernel in document["kernels"]] == ["fa2 fwd sm_80 bfloat16 d32"]
    assert document["left_out"][0].startswith("fa2 fwd sm_80 float8_e4m3fn d32: ")
    size = sum(path.stat().st_size for path in folder.rglob("*.*") if path.name != "manifest.json")
    assert document["bytes"] == size

    code, text = cute_fa("aot", "--verify", str(folder))
    assert code == 0 and "every file is whole" in text and "CUDA driver" in text
    next(folder.glob("kernels/*.so")).write_bytes(b"damage")
    assert main(["aot", "--verify", str(folder)]) == 2


def test_bad_usage(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, what in (
        (["-a", "sm_80", "-p", "no-such", "-o", str(tmp_path / "b")], "unknown preset"),
        (["-a", "sm_80", "-p", "few", "-o", str(tmp_path.parent)], "in the way"),
        (["-a", "sm_80,sm_42", "-p", "few", "-o", str(tmp_path / "b")], "unknown architecture"),
        (["--verify", str(tmp_path)], "not a bundle"),
    ):
        assert main(["aot", *argv]) == 2
        assert what in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["aot", "-o", "a", "--verify", "b"])
