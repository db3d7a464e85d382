"""README stays true: its Python runs, its commands parse, its settings and links exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for _, body in BLOCKS
    for line in body.splitlines()
    if line.startswith("cute-fa ")
]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples_run(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"  # a file, because the DSL reads the source of what it compiles
    script.write_text(PYTHON[number])
    # From the checkout, whether or not the package is installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_ones_that_the_command_line_takes(command: str) -> None:
    from cute_fa.cli.main import _parse

    _parse(shlex.split(command)[1:])


def test_there_are_examples_to_check() -> None:
    assert len(PYTHON) >= 3
    assert len(COMMANDS) >= 6


def test_every_setting_is_listed_and_exists() -> None:
    source = (ROOT / "cute_fa" / "env.py").read_text()
    in_source = set(re.findall(r"\"(CUTE_FA_\w+|CC|NO_COLOR)\"", source))
    in_readme = set(re.findall(r"^\| `(CUTE_FA_\w+|CC|NO_COLOR)` \|", README, re.MULTILINE))
    assert in_source == in_readme


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[A-Z]+@", README)
