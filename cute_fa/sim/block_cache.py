"""Generated code of large kernels on disk, so that a new process need not generate it again.

An entry belongs to one PTX text, one kernel of it, one Python and one version of the simulator's
own sources: whatever changes, the name changes. Entries are written to a temporary file and
renamed; one that cannot be read is as good as none. Only directories that nobody else can write to
are used, because what they hold is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cute_fa import env

MIN_INSTRUCTIONS = 500
"""Kernels below are generated faster than they are worth a file."""

MAX_ENTRIES = 256
"""The oldest entries beyond are removed."""


@cache
def _sources_digest() -> str:
    """Digest of everything that generated code depends on: this package and the PTX reader."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256(sys.version.encode())
    for folder in (here, here.parent / "ptx"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def key_of(ptx_text: str, kernel: str) -> str:
    """The name of a kernel's entry."""
    digest = hashlib.sha256(_sources_digest().encode())
    digest.update(kernel.encode() + b"\0" + ptx_text.encode())
    return digest.hexdigest()


def _folder(*, create: bool) -> Path | None:
    """The cache directory, if it is ours alone."""
    folder = env.cache_dir() / "sim" / "blocks"
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    return folder if status.st_uid == os.getuid() and not status.st_mode & 0o022 else None


def load(key: str) -> Any | None:
    """What :func:`save` stored under ``key``, or None."""
    folder = _folder(create=False) if env.cache_enabled() else None
    if folder is None:
        return None
    path = folder / key
    try:
        value = pickle.loads(path.read_bytes())
        os.utime(path)
    except Exception:  # missing, cut short, or of another making: generate it again
        return None
    return value


def save(key: str, value: Any) -> None:
    """Store a value; a directory that cannot be written to is no error."""
    folder = _folder(create=True) if env.cache_enabled() else None
    if folder is None:
        return
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
            os.replace(temporary, folder / key)
        except BaseException:
            os.unlink(temporary)
            raise
        _prune(folder)


def _prune(folder: Path) -> None:
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in entries[:-MAX_ENTRIES]:
        path.unlink(missing_ok=True)
