"""What the commands print: tables, JSON and sizes; colour only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cute_fa import env

_STYLES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


def styled(text: str, style: str) -> str:
    """``text`` in a style if stdout is a terminal that may show it."""
    if not sys.stdout.isatty() or env.no_color():
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def print_json(document: Any) -> None:
    """One JSON document on stdout; infinities and NaN, which JSON has not, become strings."""
    print(json.dumps(_finite(document), indent=2, sort_keys=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two spaces apart; a column of numbers is flush right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[column], int | float | None) for row in rows)
        for column in range(len(header))
    ]
    widths = [
        max(len(header[column]), *(len(row[column]) for row in cells), 0)
        for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([styled(line(header), "bold"), *(line(row) for row in cells)])


def pairs(items: Mapping[str, object], indent: str = "") -> str:
    """``name  value`` lines with the values aligned."""
    width = max((len(name) for name in items), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}  {_cell(v)}" for name, v in items.items())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def count(number: int, noun: str) -> str:
    """A number of things, "1 kernel" or "3 kernels"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(nbytes: int) -> str:
    """Bytes for people, in binary units."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: one unit, the largest that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
