"""What a result was measured with, and how a benchmark hands it out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "torch", "numpy")


def environment() -> dict[str, str]:
    """This checkout's commit ("modified" if files differ from it), the machine, and versions."""
    commit = _git("rev-parse", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--untracked-files=no", "--", ":/cute_fa", ":/benchmarks"):
        commit += ", modified"
    return {
        "commit": commit,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        **{name: _version(name) for name in PACKAGES},
    }


def write(results: dict[str, Any], output: Path | None) -> None:
    """Print results as JSON and keep them in a file, whole or not at all."""
    text = json.dumps(results, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(output)


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
