"""NVIDIA's command-line tools, found in the installed wheels or on PATH."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from cute_fa.errors import CompileError, MissingToolError

_DISTRIBUTIONS = {"nvdisasm": "nvidia-cuda-nvdisasm", "cuobjdump": "nvidia-cuda-cuobjdump"}
_TIMEOUT_S = 120


@lru_cache
def find_tool(name: str) -> Path:
    """The executable ``nvdisasm`` or ``cuobjdump``: of the pinned wheel, else of PATH.

    Raises:
        MissingToolError: neither is there.
    """
    try:
        files = importlib.metadata.files(_DISTRIBUTIONS[name]) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.parent.name == "bin" and file.stem == name:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    raise MissingToolError(
        f"{name} is not installed",
        expected=f"{name} in the package {_DISTRIBUTIONS[name]} or on PATH",
        fix='pip install "cute-fa[inspect]"',
    )


@lru_cache(maxsize=16)
def run_on_cubin(name: str, cubin: bytes, *options: str) -> str:
    """What the tool prints about ``cubin``; the last few answers are kept.

    Raises:
        MissingToolError: the tool is not installed.
        CompileError: the tool refuses the cubin.
    """
    tool = find_tool(name)
    with tempfile.TemporaryDirectory(prefix="cute_fa_") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [tool, *options, file], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    if done.returncode:
        raise CompileError(
            f"{name} cannot read this cubin",
            got=done.stderr.strip() or f"exit status {done.returncode}",
            expected="a cubin of an architecture that this version knows",
            fix='pip install --upgrade "cute-fa[inspect]"',
        )
    return done.stdout
