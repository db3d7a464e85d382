"""Compiled kernels on disk: one directory per key, written whole or not at all.

Layout: ``<root>/<key>/`` holds the artefacts and ``meta.json`` with their checksums;
``<root>/.locks/<key>`` is locked while an entry is checked, compiled and stored, so that many
processes that start together compile once. Host functions are loaded from here as code: the
directory belongs to the user alone (0700), and one that others can write to is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cute_fa import env
from cute_fa.errors import CacheError

FORMAT = 1
META = "meta.json"
DEFAULT_MAX_BYTES = 2 * 1024**3
_KEY_DIGITS = 64
_ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class CacheEntry:
    """One stored kernel: its key, what it is, its size and when it was last used (Unix time)."""

    key: str
    label: str
    nbytes: int
    used: float


class KernelCache:
    """The disk cache under ``root``; nothing is created before the first store or lock."""

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root = root if root is not None else env.cache_dir() / "kernels"
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        """The folder of a kernel, there or not."""
        return self.root / key

    def load(self, key: str) -> tuple[dict[str, bytes], dict[str, Any]] | None:
        """(files by name, meta) of an entry, or None if it is absent or damaged."""
        self._check_owner()
        try:
            files, meta = _read(self.path(key))
        except _Damaged:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(key) / META)
        return files, meta

    def store(self, key: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Path:
        """Write an entry in one step, replacing a damaged one, and evict the least used beyond
        ``max_bytes``. Call it inside ``lock(key)``."""
        self._make_root()
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            for name, data in files.items():
                (staging / name).write_bytes(data)
            sums = {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                for name, data in files.items()
            }
            document = {"format": FORMAT, "files": sums, **meta}
            (staging / META).write_text(json.dumps(document, indent=1, sort_keys=True))
            self._remove(self.path(key))
            staging.rename(self.path(key))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._sweep()
        self._evict(keep=key)
        return self.path(key)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Keep other processes from compiling or removing this entry meanwhile."""
        self._make_root()
        path = self.root / ".locks" / key
        with _locked(path, blocking=True):
            yield

    def entries(self) -> list[CacheEntry]:
        """All entries, the most recently used first; damaged ones too, labelled so."""
        self._check_owner()
        found = []
        for path in self._directories():
            try:
                label = str(json.loads((path / META).read_text())["label"])
                used = (path / META).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                label, used = "damaged", 0.0
            found.append(CacheEntry(path.name, label, _tree_bytes(path), used))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def clear(self) -> int:
        """Remove every entry, half-written ones and the locks; the number of entries removed."""
        self._check_owner()
        paths = self._directories()
        for path in paths:
            self._remove(path)
        self._sweep()
        shutil.rmtree(self.root / ".locks", ignore_errors=True)
        return len(paths)

    def verify(self) -> dict[str, str]:
        """What is wrong with each damaged entry, by key; they are removed."""
        self._check_owner()
        problems = {}
        for path in self._directories():
            with self.lock(path.name):
                try:
                    _read(path)
                except _Damaged as damage:
                    problems[path.name] = str(damage)
                    self._remove(path)
        return problems

    def _directories(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [p for p in sorted(self.root.iterdir()) if len(p.name) == _KEY_DIGITS and p.is_dir()]

    def _sweep(self) -> None:
        """Remove what a process that died left half-written."""
        for leftover in list(self.root.glob(".new-*")):
            with contextlib.suppress(FileNotFoundError):
                # A young one may be another process's entry in the making.
                if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _evict(self, keep: str) -> None:
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in reversed(entries):
            if total <= self.max_bytes:
                return
            if entry.key == keep:
                continue
            with _locked(self.root / ".locks" / entry.key, blocking=False) as free:
                if free:
                    self._remove(self.path(entry.key))
                    total -= entry.nbytes

    def _remove(self, path: Path) -> None:
        # Renamed away first: a reader sees the whole entry or none.
        if not path.exists():
            return
        doomed = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        with contextlib.suppress(FileNotFoundError):
            path.rename(doomed / "entry")
        shutil.rmtree(doomed, ignore_errors=True)

    def _make_root(self) -> None:
        try:
            for path in (self.root.parent, self.root, self.root / ".locks"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(str(error)) from error
        self._check_owner()

    def _check_owner(self) -> None:
        try:
            status = self.root.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(str(error)) from error
        if not stat.S_ISDIR(status.st_mode):
            raise _unusable(f"{self.root} is not a directory")
        if status.st_uid != os.getuid():
            raise CacheError(
                "the kernel cache belongs to another user; loading from it would run their code",
                got=f"{self.root} of uid {status.st_uid}",
                expected=f"uid {os.getuid()}",
                fix="set CUTE_FA_CACHE_DIR to a directory of your own",
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                "other users can write to the kernel cache; loading from it would run their code",
                got=f"{self.root} with mode {stat.S_IMODE(status.st_mode):04o}",
                expected="mode 0700",
                fix=f"chmod 700 {self.root}",
            )


def _unusable(why: str) -> CacheError:
    return CacheError(
        "the kernel cache cannot be used where it is",
        got=why,
        fix="set CUTE_FA_CACHE_DIR to a directory of your own, or CUTE_FA_CACHE=0 for none",
    )


class _Damaged(Exception):
    """An entry that is absent, or not what its checksums say."""


def _read(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    try:
        meta = json.loads((path / META).read_text())
        if meta["format"] != FORMAT:
            raise _Damaged(f"format {meta['format']}, expected {FORMAT}")
        files = {name: (path / name).read_bytes() for name in meta["files"]}
        for name, data in files.items():
            if hashlib.sha256(data).hexdigest() != meta["files"][name]["sha256"]:
                raise _Damaged(f"{name} does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    return files, meta


@contextlib.contextmanager
def _locked(path: Path, *, blocking: bool) -> Iterator[bool]:
    """Hold a file lock; yields False if it is taken and ``blocking`` is not asked for."""
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            # ``clear`` may have removed the file while we waited: then nobody else sees our lock.
            if not _same_file(handle, path):
                continue
            yield True
            return
        finally:
            os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _tree_bytes(path: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        total = sum(item.stat().st_size for item in path.iterdir())
    return total


def age(entry: CacheEntry) -> float:
    """Seconds since the entry was last used."""
    return time.time() - entry.used
