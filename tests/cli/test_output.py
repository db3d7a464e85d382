"""Tables, sizes, JSON and progress bars."""

from __future__ import annotations

import io
import json
import math

import pytest

from cute_fa.cli import output, progress
from cute_fa.cli.progress import Progress


def test_table_aligns_text_left_and_numbers_right() -> None:
    text = output.table(["name", "count"], [["a", 1], ["long name", 12345], ["b", None]])
    assert text.splitlines() == [
        "name        count",
        "a               1",
        "long name  12,345",
        "b               -",
    ]


def test_an_empty_table_is_its_header() -> None:
    assert output.table(["a", "b"], []) == "a  b"


def test_pairs_align_their_values() -> None:
    assert output.pairs({"a": 1, "long": True}, indent=" ") == " a     1\n long  yes"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_size(nbytes: int, text: str) -> None:
    assert output.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.50 s"), (59.0, "59 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_duration(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


def test_json_has_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [math.inf, -math.inf, math.nan, 1.5], 2: (True,)})
    strict = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": ["inf", "-inf", "nan", 1.5], "2": [True]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.styled("x", "red") == "x"
    monkeypatch.setattr("sys.stdout", Terminal())
    assert output.styled("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.styled("x", "red") == "x"


def test_progress_is_silent_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress("work", 3, stream=stream) as bar:
        bar.update(1, "one")
    assert stream.getvalue() == ""


def test_progress_is_silent_while_it_is_quick() -> None:
    stream = Terminal()
    with Progress("work", 3, stream=stream) as bar:
        bar.update(3)
    assert stream.getvalue() == ""


def test_progress_draws_and_wipes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    stream = Terminal()
    drawn = progress.threading.Event()
    write = stream.write

    def write_and_tell(text: str) -> int:
        drawn.set()
        return write(text)

    monkeypatch.setattr(stream, "write", write_and_tell)
    bar = Progress("compiling", 4, stream=stream)
    bar.update(2, "fa2 fwd sm_80")
    with bar:
        assert drawn.wait(30)
    text = stream.getvalue()
    assert "compiling [############............] 2/4" in text and "fa2 fwd sm_80" in text
    assert text.endswith("\r") and text.split("\r")[-2].strip() == ""


def test_a_progress_line_fits_the_terminal() -> None:
    bar = Progress("compiling", 4)
    bar.update(1, "a very long label " * 10)
    assert len(bar.render(3.0, 60)) == 59
    assert Progress("waiting").render(3.2, 60) == "waiting 3 s"


def test_counted_things() -> None:
    counted = [output.count(number, "kernel") for number in (0, 1, 2, 12345)]
    assert counted == ["0 kernels", "1 kernel", "2 kernels", "12,345 kernels"]
