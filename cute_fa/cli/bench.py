"""``cute-fa bench``: this library's forward beside others on a GPU, or what a launch costs here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.cli import arguments
from cute_fa.cli.aot import open_bundle
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import pairs, print_json, table
from cute_fa.cli.progress import Progress
from cute_fa.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.bench.shapes import Shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", default="papers", help="papers (default), gqa, varlen or all; comma-separated"
    )
    parser.add_argument(
        "--dtype", default="float16,bfloat16", help="comma-separated; float8_e4m3fn too"
    )
    papers = parser.add_argument_group("shapes of the papers; gqa and varlen have their own")
    papers.add_argument("-d", "--head-dim", help="comma-separated (default 64,128,256)")
    papers.add_argument("-s", "--seqlen", help="comma-separated (default 512 … 16384)")
    papers.add_argument("--mask", choices=("full", "causal", "both"), help="default both")
    parser.add_argument("--providers", help="comma-separated names (default: all there are)")
    parser.add_argument("--bundle", type=Path, help="take our kernels from this bundle")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each that are timed")
    parser.add_argument("-o", "--output", type=Path, help="directory for JSON, CSV and plots")
    parser.add_argument("--no-plots", action="store_true", help="write no plots")
    parser.add_argument(
        "--host",
        action="store_true",
        help="time what a call costs on the host instead; needs no GPU",
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.host:
        _refuse_what_host_ignores(args)
        return _host(args)
    import cute_fa
    from cute_fa.bench import benchmark, gpu_state, providers, report
    from cute_fa.bench.timing import CudaTimer, Policy

    # What can be said without a GPU is said first.
    shapes = shapes_of(args)
    if args.rounds < 1:
        raise InvalidArgumentError(
            "--rounds times nothing", got=args.rounds, expected="at least 1", fix="--rounds 30"
        )
    bundle = open_bundle(args.bundle)
    names = None if args.providers is None else arguments.words(args.providers)
    competitors = providers.providers(names, cute_fa if bundle is None else bundle)
    gpu_state.require_gpu()

    def keep(results: benchmark.Results) -> None:
        # After every shape: what follows may hang, or end this process.
        if args.output is not None:
            report.write_numbers(results, args.output)

    with Progress("timing", len(shapes)) as progress:
        results = benchmark.run(
            shapes,
            competitors,
            CudaTimer(),
            policy=Policy(rounds=args.rounds),
            progress=lambda done, total, label: progress.update(done, label),
            changed=keep,
        )
    if args.output is not None:
        report.write_all(results, args.output, plots=not args.no_plots)
    if args.json:
        print_json(results.as_dict())
    else:
        print(table(*report.summary(results)))
        print(f"TFLOP/s, median ± half the 20–80 % span; {results.device['name']}")
        for row in results.wrong:
            print(f"WRONG: {row.provider} on {row.shape}: {row.reason}")
    return FAILED if results.wrong else OK


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """The shapes that the arguments name.

    Raises:
        CuteFAError: they name none.
    """
    from cute_fa.bench import shapes
    from cute_fa.build.compile import dtype_name

    asked = arguments.words(args.set)
    names = shapes.SETS if asked == ["all"] else asked
    given = [n for n in ("head_dim", "seqlen", "mask") if getattr(args, n) is not None]
    if given and names and set(names) <= {"gqa", "varlen"}:
        raise InvalidArgumentError(
            "these shapes have sizes and masks of their own",
            got=f"--set {args.set} with {_options(given)}",
            expected="--set papers, whose shapes can be chosen",
            fix="leave them out",
        )
    dtypes = [dtype_name(word) for word in arguments.words(args.dtype)]
    found: list[Shape] = []
    for name in names:
        if name == "papers":
            seqlens = shapes.SEQLENS if args.seqlen is None else _integers(args.seqlen)
            masks = {"full": (False,), "causal": (True,)}.get(args.mask, (False, True))
            dims = shapes.HEAD_DIMS if args.head_dim is None else _integers(args.head_dim)
            found += shapes.paper_shapes(dtypes, dims, seqlens, masks)
        elif name == "gqa":
            found += [shape for dtype in dtypes for shape in shapes.gqa_shapes(dtype)]
        elif name == "varlen":
            found += [shape for dtype in dtypes for shape in shapes.varlen_shapes(dtype)]
        else:
            raise InvalidArgumentError(
                "unknown set of shapes",
                got=repr(name),
                expected=", ".join((*shapes.SETS, "all")),
                fix="--set all takes every set",
            )
    if not found:
        raise InvalidArgumentError(
            "there is no shape to time",
            got=f"--set {args.set!r} --dtype {args.dtype!r}",
            expected="at least one of each",
            fix="leave them out for the papers' shapes in float16 and bfloat16",
        )
    return found


def _refuse_what_host_ignores(args: argparse.Namespace) -> None:
    """--host times the same calls whatever else is asked for."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plain = vars(parser.parse_args(["--host", *(["--json"] if args.json else [])]))
    given = [name for name, value in plain.items() if getattr(args, name) != value]
    if given:
        raise InvalidArgumentError(
            "--host takes no other argument than --json",
            got=_options(given),
            expected="--host, or --host --json",
            fix="leave them out; benchmarks/bench_host.py --output FILE keeps the result",
        )


def _options(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _integers(text: str) -> list[int]:
    words = arguments.words(text)
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise InvalidArgumentError(
            "a list of numbers is not usable",
            got=repr(text),
            expected="positive numbers and commas",
            fix="as in -s 512,1024 or -d 64,128",
        )
    return [int(word) for word in words]


def _host(args: argparse.Namespace) -> int:
    from cute_fa.bench.host_cost import host_cost

    costs = host_cost()
    if args.json:
        print_json({name: vars(timing) for name, timing in costs.items()})
        return OK
    lines: dict[str, Any] = {
        name: f"{timing.median * 1e6:.1f} µs (20–80 %: {timing.p20 * 1e6:.1f}–"
        f"{timing.p80 * 1e6:.1f}, at least {timing.minimum * 1e6:.1f}, {timing.count} samples)"
        for name, timing in costs.items()
    }
    print(pairs(lines))
    print("CPU time of the calling thread; nothing of the CUDA driver is in it")
    return OK
