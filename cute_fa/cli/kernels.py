"""``cute-fa list``: the registry as a table."""

from __future__ import annotations

import argparse

from cute_fa.cli.arguments import add_json
from cute_fa.cli.main import OK
from cute_fa.cli.output import print_json, styled, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from cute_fa.build import registry
    from cute_fa.target import TARGETS

    rows = registry.rows()
    if args.json:
        print_json({"kernels": rows})
        return OK
    features = list(dict.fromkeys(name for row in rows for name in row["features"]))
    names = [f"{row['generation']} {row['direction']}" for row in rows]
    for name, row in zip(names, rows, strict=True):
        note = "" if row["automatic"] else "  (only when asked for)"
        print(f"{styled(name, 'bold')}  {row['summary']}{note}")
    print()
    print(table(["feature", *names], [_marks(f, rows, "features") for f in features]))
    print()
    print(table(["arch", "part", *names], [_arch_marks(arch, rows) for arch in TARGETS]))
    return OK


def _marks(name: str, rows: list[dict], field: str) -> list[object]:
    return [name, *("yes" if name in row[field] else "-" for row in rows)]


def _arch_marks(arch: str, rows: list[dict]) -> list[object]:
    from cute_fa.target import TARGETS

    name, *marks = _marks(arch, rows, "archs")
    return [name, TARGETS[arch].part, *marks]
