"""``cute-fa compile``: one kernel or a whole grid of them, for any architecture."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.cli import arguments
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import print_json, size, table
from cute_fa.cli.progress import Progress
from cute_fa.errors import CuteFAError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from cute_fa.build import Compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-g", "--generation", default="all", help="fa1,fa2,… or all (default): every rung"
    )
    parser.add_argument(
        "-a", "--arch", default="sm_80", help="comma-separated, or all (default sm_80)"
    )
    parser.add_argument("-d", "--head-dim", default="64,128", help="comma-separated; 192/128: D/Dv")
    parser.add_argument("--dtype", default="bfloat16", help="comma-separated (default bfloat16)")
    arguments.add_kernel(parser)
    parser.add_argument("-j", "--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("-o", "--output", type=Path, help="directory to write .ptx and .cubin to")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from cute_fa.build import compile_many
    from cute_fa.build.compile import make_request

    requests, skipped = [], []
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise _unwritable(args.output, "is a file")
    for spec in _specs(args):
        try:
            requests.append(make_request(spec.pop("generation"), "fwd", **spec))
        except UnsupportedError as error:
            skipped.append(error)
    if not requests and skipped:
        raise skipped[0]
    with Progress("compiling", len(requests)) as progress:
        results = compile_many(
            requests,
            jobs=args.jobs,
            progress=lambda done, total, label: progress.update(done, label),
            return_errors=True,
        )
    errors = [result for result in results if isinstance(result, CuteFAError)]
    kernels = [result for result in results if not isinstance(result, CuteFAError)]
    described = [_describe(kernel) for kernel in kernels]
    if args.output is not None:
        for kernel, row in zip(kernels, described, strict=True):
            row["files"] = _write(kernel, args.output)
    if args.json:
        messages = [str(error) for error in errors]
        print_json(
            {"kernels": described, "errors": messages, "unsupported": list(map(str, skipped))}
        )
    else:
        _print(described, errors, skipped)
    return FAILED if errors else OK


def _specs(args: argparse.Namespace) -> list[dict[str, Any]]:
    from cute_fa.build.registry import KERNELS
    from cute_fa.target import TARGETS

    generations = (
        [entry.generation for entry in KERNELS if entry.direction == "fwd"]
        if args.generation == "all"
        else arguments.words(args.generation)
    )
    archs = list(TARGETS) if args.arch == "all" else arguments.words(args.arch)
    dims = [_dims(word) for word in arguments.words(args.head_dim)]
    common = arguments.kernel_of(args)
    dtypes = arguments.words(args.dtype)
    if not (generations and archs and dims and dtypes):
        raise InvalidArgumentError(
            "there is no kernel to compile",
            got=f"-g {args.generation!r} -a {args.arch!r} -d {args.head_dim!r} "
            f"--dtype {args.dtype!r}",
            expected="at least one of each",
            fix="leave out what is empty, for its default",
        )
    grid = itertools.product(generations, archs, dtypes, dims)
    return [
        {"generation": g, "arch": a, "dtype": t, "head_dim": d, "head_dim_v": dv, **common}
        for g, a, t, (d, dv) in grid
    ]


def _dims(word: str) -> tuple[int, int]:
    head_dim, _, head_dim_v = word.partition("/")
    if not head_dim.isdigit() or not (head_dim_v or head_dim).isdigit():
        raise InvalidArgumentError(
            "--head-dim is not usable",
            got=repr(word),
            expected="a number, or D/Dv",
            fix="as in -d 64,128,192/128",
        )
    return int(head_dim), int(head_dim_v or head_dim)


def _describe(kernel: Compiled) -> dict[str, Any]:
    return {
        "kernel": kernel.label,
        "arch": kernel.arch,
        "key": kernel.key,
        "symbol": kernel.kernel_name,
        "resources": kernel.resources.as_dict(),
        "config": dict(vars(kernel.config)),
        "toolchain": dict(kernel.toolchain),
        "cubin_bytes": len(kernel.cubin),
        "directory": str(kernel.directory) if kernel.directory else None,
    }


def _write(kernel: Compiled, folder: Path) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / kernel.label.replace(" ", "-").replace("/", "-")
        ptx, cubin = stem.with_name(stem.name + ".ptx"), stem.with_name(stem.name + ".cubin")
        ptx.write_text(kernel.ptx)
        cubin.write_bytes(kernel.cubin)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return [str(ptx), str(cubin)]


def _unwritable(folder: Path, reason: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        "the output cannot be written",
        got=f"{folder}: {reason}",
        expected="a directory, which is made if it is missing",
        fix="choose another --output",
    )


_HEADER = ("kernel", "regs", "stack", "spills", "smem", "threads", "CTAs/SM", "limited by", "key")


def _print(
    described: list[dict[str, Any]], errors: list[CuteFAError], skipped: list[UnsupportedError]
) -> None:
    rows = []
    for row in described:
        found = row["resources"]
        smem = found["static_smem_bytes"] + found["dynamic_smem_bytes"]
        spills = found["spill_store_bytes"] + found["spill_load_bytes"]
        rows.append(
            (
                row["kernel"],
                found["registers"],
                found["stack_bytes"],
                spills,
                size(smem),
                found["threads"],
                found["ctas_per_sm"],
                found["limited_by"],
                row["key"][:12],
            )
        )
    if rows:
        print(table(list(_HEADER), rows))
    for title, failures in (("not served", skipped), ("failed", errors)):
        for error in failures:
            print(f"{title}: {error}")
