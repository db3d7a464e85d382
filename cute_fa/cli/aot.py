"""``cute-fa aot``: compile kernels into a bundle that needs no compiler, or check one."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.cli import arguments
from cute_fa.cli.main import OK
from cute_fa.cli.output import pairs, print_json, size, table
from cute_fa.cli.progress import Progress
from cute_fa.errors import CuteFAError, InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.build.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cute_fa.build.presets import PRESETS

    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    parser.add_argument(
        "-a",
        "--arch",
        default="sm_80,sm_90a,sm_100a",
        help="comma-separated, or all (default sm_80,sm_90a,sm_100a)",
    )
    parser.add_argument(
        "-p",
        "--preset",
        default="benchmark",
        help=f"comma-separated. {presets}",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, metavar="DIR", help="the bundle to write")
    where.add_argument("--verify", type=Path, metavar="DIR", help="check a bundle instead")
    parser.add_argument("-j", "--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--no-runtime",
        action="store_true",
        help="leave out the DSL's runtime library: the machine that loads it must have the same",
    )
    parser.add_argument(
        "--no-agreement",
        action="store_true",
        help="do not record what the simulator computes, which gpu_check compares with",
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.verify is not None:
        return _verify(args)
    from cute_fa.build.aot import write_bundle
    from cute_fa.build.registry import COMPILED

    with Progress("compiling", 0) as progress:

        def report(done: int, total: int, label: str) -> None:
            progress.total = total
            progress.update(done, label)

        written = write_bundle(
            args.output,
            archs=COMPILED if args.arch == "all" else arguments.words(args.arch),
            presets=arguments.words(args.preset),
            jobs=args.jobs,
            with_runtime=not args.no_runtime,
            progress=report,
            extend=None if args.no_agreement else _record(progress),
        )
    document = _describe(written.bundle)
    document["left_out"] = [f"{each.what}: {each.reason}" for each in written.left_out]
    if args.json:
        print_json(document)
        return OK
    _print(written.bundle, document)
    if written.left_out:
        print(f"left out: {len(written.left_out)} not served, or of no use (see the manifest)")
    return OK


def _record(progress: Progress):
    """What runs the small problems in the simulator, for a bundle that is complete but for them."""
    from cute_fa.gpu_check.agreement import record

    def extend(folder: Path, bundle: Bundle) -> dict[str, Any]:
        progress.title = "simulating"
        return record(folder, bundle, progress=progress.update)

    return extend


def _verify(args: argparse.Namespace) -> int:
    from cute_fa.build.bundle import Bundle, check_driver

    with Progress("checking"):
        bundle = Bundle(args.verify)
        for kernel in bundle.kernels:
            kernel.load_library()
    document = _describe(bundle)
    try:
        driver = ".".join(map(str, check_driver(bundle)))
    except CuteFAError as error:
        driver = f"none that serves: {error.what}"
    document["driver"] = driver
    document["notes"] = bundle.notes()
    if args.json:
        print_json(document)
        return OK
    _print(bundle, document)
    print(f"every file is whole and every library loads; CUDA driver: {driver}")
    for note in bundle.notes():
        print(f"note: {note}")
    return OK


def _describe(bundle: Bundle) -> dict[str, Any]:
    runtime = bundle.document["runtime"]
    return {
        "path": str(bundle.folder),
        "bytes": bundle.nbytes,
        "runtime_bytes": runtime["bytes"] if runtime["bundled"] else 0,
        "archs": list(bundle.archs),
        "presets": bundle.document["presets"],
        "toolchain": bundle.document["toolchain"],
        "agreement_cases": len(bundle.document.get("agreement", [])),
        "kernels": [{"label": k.label, "name": k.name, "role": k.role} for k in bundle.kernels],
    }


def _print(bundle: Bundle, document: dict[str, Any]) -> None:
    counts = Counter((k.generation, k.arch, k.role) for k in bundle.kernels)
    rows = [(*key, count) for key, count in sorted(counts.items())]
    print(table(["rung", "arch", "role", "kernels"], rows))
    tools = document["toolchain"]
    lines = {
        "bundle": document["path"],
        "size": f"{size(document['bytes'])} ({document['bytes'] / 1e6:.1f} MB), "
        f"{size(document['runtime_bytes'])} of it the runtime library",
        "compiled by": f"CuTe DSL {tools['dsl']}, ptxas of {tools['ptxas']}, "
        f"TVM-FFI {tools['tvm_ffi']}",
        "simulated": f"{document['agreement_cases']} small problems",
    }
    print(pairs(lines))


def open_bundle(path: Path | None) -> Bundle | None:
    """The bundle that ``--bundle`` names, if it was given.

    Raises:
        InvalidArgumentError: it is not a directory.
    """
    if path is None:
        return None
    if not path.is_dir():
        raise InvalidArgumentError(
            "--bundle is not a directory",
            got=str(path),
            expected="what cute-fa aot wrote",
            fix="make one with cute-fa aot … -o DIR",
        )
    from cute_fa.ops.bundle import load_bundle

    return load_bundle(path)
