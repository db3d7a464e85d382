"""The command line as a whole: help, errors, exit codes, and what it loads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from cute_fa.cli import main as cli
from cute_fa.cli.main import COMMANDS, main
from cute_fa.errors import CompileError, InvalidArgumentError, MissingToolError
from tests.processes import run_python


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cute-fa {command or '[-h]'}")
    if command is None:
        assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["cache"], ["cache", "eat"], ["run", "--batch", "x"]]
)
def test_bad_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: cute-fa" in capsys.readouterr().err


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args) -> int:
        raise error

    monkeypatch.setattr("cute_fa.cli.kernels.run", run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgumentError("bad thing", got=3, expected="4", fix="do so"), 2),
        (MissingToolError("no tool"), 2),
        (CompileError("broken"), 1),
    ],
)
def test_errors_are_told_without_a_traceback(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert main(["list"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err == f"cute-fa: {error}\n"


@pytest.mark.parametrize(
    ("argv", "what", "usage"),
    [
        (["bench", "--json", "--bogus"], "unrecognized arguments: --bogus", "cute-fa bench [-h]"),
        (["run", "--seed", "x", "--json"], "invalid int value: 'x'", "cute-fa run [-h]"),
        (["diff", "--json"], "required: A, B", "cute-fa diff [-h]"),
        (["nonsense", "--json"], "invalid choice: 'nonsense'", "cute-fa [-h]"),
    ],
    ids=str,
)
def test_bad_usage_is_the_commands_own(
    capsys: pytest.CaptureFixture[str], argv: list[str], what: str, usage: str
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert what in error["got"] and usage in error["expected"] and err == ""
    with pytest.raises(SystemExit) as left:
        main([word for word in argv if word != "--json"])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and what in err and f"usage: {usage}" in err and out == ""


def test_an_error_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(InvalidArgumentError("bad", got=[3], fix="do so", alternatives=["fa2"]), monkeypatch)
    assert main(["list", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "type": "InvalidArgumentError",
            "what": "bad",
            "got": "[3]",
            "expected": None,
            "fix": "do so",
            "alternatives": ["fa2"],
        }
    }


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)  # type: ignore[arg-type]
    assert main(["list"]) == 130


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "cute_fa", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("cute-fa ")


@pytest.mark.parametrize(("words", "code"), [("list", 0), ("bench --json --bogus", 2)])
def test_a_reader_that_leaves_is_no_error(words: str, code: int) -> None:
    command = f"{sys.executable} -m cute_fa {words}; echo code $? >&2"
    result = subprocess.run(
        ["bash", "-c", f"({command}) | true"], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == f"code {code}"


@pytest.mark.parametrize("argv", [["--help"], ["list"], ["list", "--json"], ["cache", "path"]])
def test_light_commands_load_no_heavy_package(argv: list[str]) -> None:
    program = (
        "import sys; from cute_fa.cli.main import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'cutlass', 'tvm_ffi')\n"
        "print(*(m for m in heavy if m in sys.modules), file=sys.stderr)"
    )
    result = run_python(program)
    assert result.stderr.strip() == ""
    assert result.stdout


def test_exit_codes_are_the_documented_ones() -> None:
    assert (cli.OK, cli.FAILED, cli.USAGE) == (0, 1, 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("argv", [["list"], ["list", "--json"], ["cache", "path"]])
def test_a_full_disk_is_told_without_a_traceback(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "cute_fa", *argv], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == cli.USAGE
    assert result.stderr.startswith("cute-fa: the output cannot be written: No space left")
    assert len(result.stderr.splitlines()) == 1


def test_an_error_of_a_file_is_not_taken_for_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(OSError(errno.ENOSPC, "full", "/some/file"), monkeypatch)
    with pytest.raises(OSError, match="/some/file"):
        main(["list"])


def test_descriptions_keep_their_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "on a GPU" in " ".join(capsys.readouterr().out.split())
