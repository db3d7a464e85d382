"""``cute-fa diff``: descriptions and files, text and JSON, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cute_fa.cli.diff import request_of
from cute_fa.cli.main import main
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant

A, B = "fa2 sm_80 bfloat16 d32", "fa2 sm_80 bfloat16 d32 tile_n=32"


def test_two_configurations(cute_fa) -> None:
    code, text = cute_fa("diff", A, B)
    assert code == 1
    for words in (f"A  {A}", f"B  {B}", "registers", "PTX hot loop", "-    mma.sync"):
        assert words in text
    assert "no difference" not in text
    short = cute_fa("diff", A, B, "--no-ptx")[1]
    assert "mma.sync" not in short and "PTX hot loop" in short
    assert "threads" not in short and "threads" in cute_fa("diff", A, B, "--all")[1]


def test_a_kernel_and_itself(cute_fa) -> None:
    code, text = cute_fa("diff", A, "fa2 fwd sm_80 d32 bf16")
    assert code == 0 and text.rstrip().endswith("no difference")


def test_json_and_files(cute_fa, tmp_path: Path) -> None:
    cute_fa("compile", "-g", "fa2", "-d", "32", "-o", str(tmp_path))
    [ptx] = tmp_path.glob("*.ptx")
    code, document = cute_fa("diff", A, str(ptx), "--json")
    assert code == 0 and document["ptx"] == []
    assert document["labels"] == [A, str(ptx)]
    registers = document["figures"]["resources"]["registers"]
    assert registers[0] == registers[1] > 0
    ptx.with_suffix(".cubin").unlink()
    assert "resources" not in cute_fa("diff", A, str(ptx), "--json")[1]["figures"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fa2 fwd sm_80 bfloat16 d64", KernelVariant("bfloat16", 64, 64)),
        ("fa2,sm_80,half,d192/128,causal", KernelVariant("float16", 192, 128, causal=True)),
        (
            "fa2 sm_80 d64 window-left window-right softcap",
            KernelVariant("bfloat16", 64, 64, False, True, True, True),
        ),
        (
            "fa2 sm_80 d64 varlen used-q used-k",
            KernelVariant(
                "bfloat16", 64, 64, is_varlen=True, has_seqused_q=True, has_seqused_k=True
            ),
        ),
    ],
)
def test_descriptions_are_labels(text: str, expected: KernelVariant) -> None:
    request = request_of(text)
    assert request.variant == expected and request.target.arch == "sm_80"
    assert request_of(request.label).variant == expected, "what is printed can be pasted"


@pytest.mark.parametrize(
    ("text", "error", "what"),
    [
        ("fa2 sm_80 d64 casual", InvalidArgumentError, "'casual'"),
        ("fa2 d64", InvalidArgumentError, "lacks an architecture"),
        ("sm_80", InvalidArgumentError, "lacks a generation and head dims"),
        ("fa2 sm_80 d64 no_field=3", InvalidArgumentError, "no_field"),
        ("fa2 sm_80 d64/32/16", InvalidArgumentError, "'d64/32/16'"),
        ("fa3 sm_80 d64", UnsupportedError, "not built for this architecture"),
    ],
)
def test_bad_descriptions(text: str, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        request_of(text)


def test_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.ptx").write_text("not PTX")
    for argv, what in (
        (["missing.ptx", "missing.ptx"], "cannot be read"),
        ([str(tmp_path / "bad.ptx")] * 2, "PTX"),
        ([str(tmp_path / "bad.ptx")] * 2 + ["-U", "-1"], "--context is negative"),
    ):
        assert main(["diff", *argv]) in (1, 2)
        assert what in capsys.readouterr().err
