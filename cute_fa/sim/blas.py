"""numpy's BLAS on one thread while a launch runs.

The simulator's matrix products are small: threads cost more than they bring, and forked processes
that each start a set of them get in one another's way. numpy has no switch for it, so the one of
the OpenBLAS that it loaded is called; another BLAS is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "")

_Switch = tuple[Callable[[], int], Callable[[int], None]]


@cache
def _switches() -> tuple[_Switch, ...]:
    """(get, set) thread-count functions of every OpenBLAS that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line.lower()}
    found = []
    for path in sorted(paths):
        try:
            loaded = ctypes.CDLL(path)
        except OSError:
            continue
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                get = getattr(loaded, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(loaded, f"{prefix}_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    found.append((get, put))
    return tuple(found)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run the body with numpy's OpenBLAS on one thread; the former number comes back after it."""
    former = [(put, int(get())) for get, put in _switches()]
    for put, _ in former:
        put(1)
    try:
        yield
    finally:
        for put, count in former:
            put(count)
