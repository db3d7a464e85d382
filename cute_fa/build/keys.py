"""Content keys of compiled kernels: a digest over primitives and nothing else.

A key names everything that the artefact depends on. A tensor, a symbolic integer or a numpy
scalar in it would make every call its own entry, so anything but plain values is refused.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from cute_fa.errors import InvalidTypeError

_PLAIN = (str, int, bool, float, type(None))


def digest(parts: Any) -> str:
    """sha256 in hex of a nest of dicts, lists, tuples and plain values.

    Raises:
        InvalidTypeError: something in ``parts`` is not a plain value; the message names where.
    """
    text = json.dumps(plain(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, where: str = "key") -> Any:
    """``value`` as JSON types; dataclasses become dicts of their fields, enums their values."""
    if type(value) in _PLAIN:
        return value.hex() if type(value) is float else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields}
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, dict):
        for name in value:
            if type(name) is not str:
                raise _not_plain(f"a name in {where}", name)
        return {name: plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise _not_plain(where, value)


def _not_plain(where: str, value: Any) -> InvalidTypeError:
    return InvalidTypeError(
        f"{where} is not a plain value, so it cannot be part of a kernel's key",
        got=f"{value!r} of type {type(value).__module__}.{type(value).__qualname__}",
        expected="str, int, bool, float or None, or a dataclass, dict or list of these",
        fix="convert it, e.g. int(x) or x.item()",
    )


@cache
def source_digest(modules: tuple[str, ...]) -> str:
    """sha256 over the names and contents of the Python files of packages and modules.

    Finding a module imports the packages above it, not the module itself. Read once per process:
    a process runs the sources that it loaded.
    """
    total = hashlib.sha256()
    for path in sorted(path for module in modules for path in _files(module)):
        total.update(path.name.encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {module!r}", name=module)
    path = Path(spec.origin)
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
