"""The only reader of os.environ in cute_fa.

Every variable also has a Python argument or a command-line option; README lists them.
"""

from __future__ import annotations

import os
from pathlib import Path

from cute_fa.errors import InvalidArgumentError


def cache_dir() -> Path:
    """Directory for compiled kernels and the simulator's runtime (``CUTE_FA_CACHE_DIR``)."""
    override = os.environ.get("CUTE_FA_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cute_fa"


def cache_enabled() -> bool:
    """Whether compiled kernels are kept on disk (``CUTE_FA_CACHE``, default yes)."""
    return _flag("CUTE_FA_CACHE", default=True)


def sim_workers() -> int:
    """Processes that one simulated launch may use (``CUTE_FA_SIM_WORKERS``, default all cores)."""
    raw = os.environ.get("CUTE_FA_SIM_WORKERS")
    if raw is None:
        return len(os.sched_getaffinity(0))
    if not raw.isdigit() or int(raw) < 1:
        raise InvalidArgumentError(
            "CUTE_FA_SIM_WORKERS is not a positive number of processes",
            got=repr(raw),
            expected="an integer of at least 1",
            fix="unset it to use every core",
        )
    return int(raw)


def c_compiler() -> str | None:
    """The C compiler asked for with ``CC``, or None for the system's."""
    return os.environ.get("CC") or None


def dsl_settings() -> dict[str, str]:
    """The ``CUTE_DSL_*`` variables that can change what the DSL compiles, for the kernel's key.

    Left out are the target (always named explicitly), the runtime library and where or what the
    DSL logs, dumps and caches.
    """
    prefix = "CUTE_DSL_"
    neutral = ("ARCH", "LIBS", "KEEP", "DUMP_DIR", "CACHE_DIR", "NO_CACHE", "LOG_", "DISABLE_FILE")
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(neutral)
    }


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's with ``changes``."""
    return {**os.environ, **changes}


def no_color() -> bool:
    """Whether the user asked for plain output (``NO_COLOR``)."""
    return bool(os.environ.get("NO_COLOR"))


def _flag(name: str, *, default: bool) -> bool:
    raw = os.environ.get(name)
    if raw is None:
        return default
    value = raw.strip().lower()
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise InvalidArgumentError(
        f"{name} is not a switch", got=repr(raw), expected="1/0, on/off, true/false or yes/no"
    )
