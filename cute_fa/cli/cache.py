"""``cute-fa cache``: the compiled kernels kept on disk."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from cute_fa.cli.arguments import add_json
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import count, duration, print_json, size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("ls", "clear", "verify", "path"),
        help="ls: show entries; clear: remove all; verify: check checksums and remove damaged "
        "entries; path: print the directory",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from cute_fa.build.cache import KernelCache

    cache = KernelCache()
    return _ACTIONS[args.action](cache, args.json)


def _path(cache, as_json: bool) -> int:
    if as_json:
        print_json({"path": str(cache.root)})
    else:
        print(cache.root)
    return OK


def _ls(cache, as_json: bool) -> int:
    from cute_fa.build.cache import age

    entries = cache.entries()
    total = sum(entry.nbytes for entry in entries)
    if as_json:
        listed = [asdict(entry) for entry in entries]
        print_json({"path": str(cache.root), "bytes": total, "entries": listed})
        return OK
    if entries:
        rows = [(e.key[:12], e.label, size(e.nbytes), f"{duration(age(e))} ago") for e in entries]
        print(table(["key", "kernel", "size", "used"], rows))
    print(f"{count(len(entries), 'kernel')}, {size(total)} in {cache.root}")
    return OK


def _clear(cache, as_json: bool) -> int:
    removed = cache.clear()
    if as_json:
        print_json({"path": str(cache.root), "removed": removed})
    else:
        print(f"removed {count(removed, 'kernel')} from {cache.root}")
    return OK


def _verify(cache, as_json: bool) -> int:
    checked = len(cache.entries())
    problems = cache.verify()
    if as_json:
        print_json({"path": str(cache.root), "checked": checked, "damaged": problems})
    else:
        for key, problem in problems.items():
            print(f"{key[:12]}  {problem}; removed")
        print(f"{count(checked, 'kernel')} checked, {len(problems)} damaged")
    return FAILED if problems else OK


_ACTIONS = {"ls": _ls, "clear": _clear, "verify": _verify, "path": _path}
