#!/usr/bin/env python3
"""Set-up, demo and tests with one command, on a bare machine.

    python3 tools/dev.py demo            compile every rung, run it, check it, print one table
    python3 tools/dev.py test [ARGS …]   run the test suite; ARGS go to pytest
    python3 tools/dev.py test -m slow    run what takes minutes and the suite leaves out
    python3 tools/dev.py setup           only make .venv and install the pinned dependencies

Needs Linux x86-64, Python 3.10 or newer with venv, and a C compiler. No GPU, no CUDA toolkit and
no environment variables. Uses the standard library only, because nothing is installed yet.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
TEST_PACKAGES = ROOT / "tools" / "third_party.txt"
MIN_PYTHON = (3, 10)


class SetupError(Exception):
    """Something that this machine lacks, with what to do about it."""


def check_machine() -> None:
    if sys.version_info < MIN_PYTHON:
        raise SetupError(
            f"Python {platform.python_version()} is too old: need {MIN_PYTHON[0]}.{MIN_PYTHON[1]} "
            "or newer. Run this script with a newer python3."
        )
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(
            f"{sys.platform} on {platform.machine()} is not supported: the CuTe DSL's compiler "
            "libraries pinned here are built for Linux x86-64."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "this Python has no venv module. On Debian and Ubuntu: apt install python3-venv"
        ) from None
    compiler = os.environ.get("CC") or next(
        (name for name in ("cc", "gcc", "clang") if shutil.which(name)), None
    )
    if compiler is None or shutil.which(compiler) is None:
        raise SetupError(
            "no C compiler found (looked for $CC, cc, gcc, clang); the simulator's runtime is "
            "built with it. On Debian and Ubuntu: apt install gcc"
        )


def fingerprint() -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, TEST_PACKAGES, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_step(title: str, command: list[str]) -> None:
    print(f"[setup] {title} …", file=sys.stderr, flush=True)
    start = time.monotonic()
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SetupError(f"'{title}' failed; its output is above. Command: {' '.join(command)}")
    print(f"[setup] {title}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def ensure_venv() -> Path:
    """Make .venv and install everything, unless the last finished set-up was the same."""
    python = VENV / "bin" / "python"
    stamp = VENV / "cute_fa_setup.sha256"
    want = fingerprint()
    VENV.parent.mkdir(exist_ok=True)
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == want and python.exists():
            return python
        check_machine()
        stamp.unlink(missing_ok=True)
        run_step("make .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        pins = ["-c", str(CONSTRAINTS)]
        run_step("install build tools", [*pip, "-q", *pins, "pip", "setuptools", "wheel"])
        run_step("install torch", [*pip, *pins, "torch"])
        run_step(
            "install cute_fa and its dependencies",
            [*pip, *pins, "--no-build-isolation", "-e", f"{ROOT}[inspect,dev]"],
        )
        # Their own dependencies reach far beyond the kernels that the tests run: --no-deps.
        run_step(
            "install third-party CuTe DSL programs for the tests",
            [*pip, "-q", "--no-deps", "-r", str(TEST_PACKAGES)],
        )
        partial = stamp.with_suffix(".partial")
        partial.write_text(want)
        partial.replace(stamp)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("setup", "demo", "test"))
    parser.add_argument("args", nargs=argparse.REMAINDER, help="passed on to the demo or pytest")
    options = parser.parse_args()
    try:
        python = ensure_venv()
    except SetupError as error:
        print(f"tools/dev.py: {error}", file=sys.stderr)
        return 2
    if options.command == "setup":
        return 0
    environment = dict(os.environ)
    if options.command == "demo":
        command = [str(python), str(ROOT / "tools" / "demo.py"), *options.args]
    else:
        command = [str(python), "-m", "pytest", *(options.args or default_test_args())]
        if not options.args:
            # A process per core leaves none for torch's threads, which would wait for one another.
            environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def default_test_args() -> list[str]:
    """A process per core, each with whole files, in the order of ``tests/conftest.py``.

    Complete fault surveys are left out (``slow``); a fixed part of each is in.
    """
    processes = str(len(os.sched_getaffinity(0)))
    distribution = ["-n", processes, "--dist", "loadfile", "--no-loadscope-reorder"]
    return [*distribution, "-m", "not slow", "-q"]


if __name__ == "__main__":
    sys.exit(main())
