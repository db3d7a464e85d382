"""``cute-fa compile``: grids of kernels, their resources, and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cute_fa.cli.main import main

SMALL = ("-g", "fa2", "-d", "32")


def test_one_kernel(cute_fa) -> None:
    code, document = cute_fa("compile", *SMALL, "--json")
    assert code == 0 and document["errors"] == [] and document["unsupported"] == []
    [kernel] = document["kernels"]
    assert kernel["kernel"] == "fa2 fwd sm_80 bfloat16 d32"
    assert kernel["config"]["head_dim"] == 32
    found = kernel["resources"]
    assert found["registers"] > 0 and found["ctas_per_sm"] >= 1
    assert Path(kernel["directory"], "kernel.ptx").exists()
    assert set(kernel["toolchain"]) >= {"dsl", "flavour", "ptxas"}

    code, text = cute_fa("compile", *SMALL)
    [header, row] = text.splitlines()
    assert header.split()[:2] == ["kernel", "regs"] and kernel["kernel"] in row
    assert str(found["registers"]) in row.split() and kernel["key"][:12] in row


def test_a_kernel_for_packed_sequences(cute_fa) -> None:
    code, document = cute_fa("compile", *SMALL, "--varlen", "--seqused-k", "--causal", "--json")
    [kernel] = document["kernels"]
    assert code == 0 and kernel["kernel"] == "fa2 fwd sm_80 bfloat16 d32 causal varlen used-k"
    assert kernel["config"]["is_varlen"] and not kernel["config"]["has_seqused_q"]
    code, text = cute_fa("inspect", *SMALL, "--varlen", "--seqused-k", "--causal")
    assert code == 0 and kernel["kernel"] in text


def test_kernels_for_descales_of_blocks(cute_fa) -> None:
    what = ("-d", "64", "--varlen", "--causal", "--block-descales")
    code, document = cute_fa(
        "compile", "-g", "fa3", "-a", "sm_90a", "--dtype", "fp8", *what, "--json"
    )
    [kernel] = document["kernels"]
    name = "fa3 fwd sm_90a float8_e4m3fn d64 causal varlen block-descales"
    assert code == 0 and kernel["kernel"] == name
    code, document = cute_fa("compile", "-g", "fa2", "-a", "sm_90a", *what, "--json")
    assert code == 2 and "no descales" in document["error"]["what"]


def test_a_grid_by_processes_and_its_files(cute_fa, tmp_path: Path) -> None:
    grid = ("-a", "sm_80,sm_90a", "--dtype", "bf16", "-j", "2", "-o", str(tmp_path / "out"))
    code, document = cute_fa("compile", *SMALL, *grid, "--json")
    assert code == 0
    assert [kernel["arch"] for kernel in document["kernels"]] == ["sm_80", "sm_90a"]
    for kernel in document["kernels"]:
        ptx, cubin = map(Path, kernel["files"])
        assert f".target {kernel['arch']}\n" in ptx.read_text()
        assert cubin.read_bytes()[:4] == b"\x7fELF"
        assert len(cubin.read_bytes()) == kernel["cubin_bytes"]


def test_config_fields_can_be_set(cute_fa) -> None:
    _, usual = cute_fa("compile", *SMALL, "--json")
    tile = usual["kernels"][0]["config"]["tile_n"] // 2
    code, changed = cute_fa("compile", *SMALL, "--set", f"tile_n={tile}", "--json")
    assert code == 0 and changed["kernels"][0]["config"]["tile_n"] == tile
    assert changed["kernels"][0]["key"] != usual["kernels"][0]["key"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-a", "sm_75"), "unknown architecture"),
        (("-d", "big"), "--head-dim is not usable"),
        (("-d", "100"), "head_dim"),
        (("-g", "fa9"), "unknown generation"),
        (("-g", "fa2", "--dtype", "float8_e4m3fn"), "float8_e4m3fn"),
        (("-g", "fa2", "--set", "tile_q=1"), "no such field"),
        (("--jobs", "0"), "jobs is not usable"),
    ],
)
def test_bad_input_is_2(
    shared_cache: None, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert main(["compile", *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""


def test_an_output_that_cannot_be_written(
    cute_fa, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compile", *SMALL, "-o", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
