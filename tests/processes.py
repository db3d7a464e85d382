"""Python programs in processes of their own: what they load or set stays theirs."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    """The program's output, after it has ended well within two minutes."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result
