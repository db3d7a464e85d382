"""Wrong arguments of the commands: 2, and what, got, expected and how to mend it; nothing compiled.

What argparse itself refuses is argparse's to word.
"""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cute_fa.cli.main import main

CALLS = (
    "compile -g fa9",
    "compile -g ,",
    "compile -a ,",
    "compile -d ,",
    "compile --dtype ,",
    "compile -a sm_70",
    "compile -d 0",
    "compile -d 64/x",
    "compile -d 64/128/2",
    "compile --dtype int8",
    "compile -g fa2 --set foo=1",
    "compile -g fa2 --set tile_n",
    "compile -g fa2 --set is_causal=True",
    "compile -g fa2 --set smem_limit_bytes=999999",
    "compile -g fa2 --set tile_n=abc",
    "compile -g fa2 -j 0",
    "compile --window -5 0",
    "compile --softcap nan",
    "compile --seqused-q",
    "compile -g fa2 -o FILE",
    "run -s -5",
    "run -b -1",
    "run -H 3 --heads-k 2",
    "run -H 0",
    "run --dtype fp32",
    "run -d 60",
    "run -g fa3 -a sm_80",
    "run --backend cuda",
    "run --varlen 1,x",
    "run --varlen",
    "run --varlen 5,3 --seqused-q 9,1",
    "run --varlen 5,3 -b 2",
    "run --varlen-k 3",
    "run --seqused-q 3",
    "run --scale inf",
    "run --random 0",
    "run --random 3 --varlen 4,5",
    "run -s 999999999",
    "inspect -g fa2 -d -8",
    "diff fa2 fa9",
    "diff FILE.ptx 'fa2 sm_80 bfloat16 d64'",
    "diff 'fa2 sm_80 bfloat16 d64' 'fa2 sm_80 bfloat16 d64' -U -1",
)


@pytest.mark.parametrize("call", CALLS)
def test_what_got_expected_and_how_to_mend(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(import_module("cute_fa.build.compile"), "_run_compiler", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    argv = [word.replace("FILE", str(tmp_path / "file")) for word in shlex.split(call)]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and "got:" in err and "expected:" in err
    assert "to mend:" in err or "would do:" in err
