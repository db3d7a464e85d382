"""No run of statements stands in two places; what several need belongs to one of the floors."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cute_fa", "tests", "tools", "benchmarks")

STATEMENTS = 8
"""A run of so many is a clone: lines of a definition or a call count as one statement."""

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def _statements(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text without layout) of each statement but imports and docstrings."""
    tokens: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in _LAYOUT:
            continue
        if token.type != tokenize.NEWLINE:
            tokens.append(token)
            continue
        is_docstring = len(tokens) == 1 and tokens[0].type == tokenize.STRING
        if tokens and not is_docstring and tokens[0].string not in ("import", "from"):
            yield tokens[0].start[0], " ".join(each.string for each in tokens)
        tokens = []


def _is_loop_of_a_rung(path: Path) -> bool:
    """Each rung can be read alone, next to its paper: share the vocabulary, repeat the loop."""
    return path.parent.name.startswith("fa") and path.name.startswith("fwd")


def _clones(paths: Iterable[Path], statements: int) -> list[str]:
    """Where runs of so many statements stand, and where again; the first of each pair of files."""
    seen: dict[tuple[str, ...], tuple[Path, int]] = {}
    found: dict[tuple[Path, Path], str] = {}
    for path in paths:
        listed = list(_statements(path))
        for start in range(len(listed) - statements + 1):
            run = listed[start : start + statements]
            line = run[0][0]
            other, there = seen.setdefault(tuple(text for _, text in run), (path, line))
            if (other, there) != (path, line):
                found.setdefault((other, path), f"{other}:{there} and {path}:{line}")
    return list(found.values())


def test_no_run_of_statements_stands_twice():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    clones = _clones((path for path in paths if not _is_loop_of_a_rung(path)), STATEMENTS)
    assert not clones, "\n".join(clones)


def test_a_clone_is_found_whatever_its_layout(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("x = 1\ny = f(x, 2)\nz = x + y\n")
    second.write_text('"""Other."""\nw = 0\nx = 1  # one\ny = f(\n    x, 2\n)\nz = x + y\n')
    assert _clones([first, second], 3) == [f"{first}:1 and {second}:3"]
    assert _clones([first, second], 4) == []
