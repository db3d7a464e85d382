"""``cute-fa inspect`` shows what the analysis found, as text, JSON, PTX or SASS."""

from __future__ import annotations

import pytest

from cute_fa.cli.main import main

SMALL = ("-g", "fa2", "-d", "32")


def test_one_screen(cute_fa) -> None:
    code, text = cute_fa("inspect", *SMALL)
    assert code == 0
    assert text.startswith("fa2 fwd sm_80 bfloat16 d32\n")
    for words in ("compiled by", "CuTe DSL", "tile_m=", "registers", "MMA", "red flags"):
        assert words in text


def test_json(cute_fa) -> None:
    code, document = cute_fa("inspect", *SMALL, "--json")
    assert code == 0
    assert document["label"] == "fa2 fwd sm_80 bfloat16 d32" and document["target"] == "sm_80"
    assert document["config"]["head_dim"] == 32
    assert document["threads"] == document["config"]["num_threads"]
    assert document["resources"]["registers"] > 0
    assert any("16816" in shape or "m16n8k16" in shape for shape in document["ptx"]["mma_shapes"])
    assert not any(flag["rule"] == "local-memory" for flag in document["flags"])


def test_the_texts_alone(cute_fa) -> None:
    code, ptx = cute_fa("inspect", *SMALL, "--ptx")
    assert code == 0 and ".target sm_80" in ptx and "mma.sync" in ptx
    _, with_lines = cute_fa("inspect", *SMALL, "--ptx", "--line-info")
    assert ".loc" in with_lines and ".loc" not in ptx


def test_sass(cute_fa, capsys: pytest.CaptureFixture[str]) -> None:
    from cute_fa.asm.tools import find_tool
    from cute_fa.errors import MissingToolError

    try:
        find_tool("nvdisasm")
    except MissingToolError:
        assert main(["inspect", *SMALL, "--sass"]) == 2
        assert "cute-fa[inspect]" in capsys.readouterr().err
    else:
        code, sass = cute_fa("inspect", *SMALL, "--sass")
        assert code == 0 and "HMMA.16816" in sass


def test_only_one_form_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *SMALL, "--ptx", "--sass"])
    assert caught.value.code == 2
    assert "--sass: not allowed with argument --ptx" in capsys.readouterr().err
    assert main(["inspect", *SMALL, "--ptx", "--json"]) == 2
    assert "--json: not allowed with argument --ptx" in capsys.readouterr().out
