"""ruff (lint and format, nothing excluded) and mypy on the host-side code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Device code is traced, not typed: its annotations are for readers.
HOST_SIDE = [
    "problem.py",
    "target.py",
    "errors.py",
    "env.py",
    "reference",
    "ptx",
    "asm",
    "sim",
    "build",
    "ops",
    "testing",
    "cli",
]


def run(*command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def test_ruff_lint() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--check", "--no-cache", ".")


def test_mypy() -> None:
    run("mypy", *(f"cute_fa/{part}" for part in HOST_SIDE))
