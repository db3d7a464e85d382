"""``cute-fa sim``: what the simulator counted and found, launch by launch."""

from __future__ import annotations

import argparse
from typing import Any

from cute_fa.cli import arguments
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import duration, pairs, print_json, styled
from cute_fa.cli.progress import Progress
from cute_fa.cli.run import describe, settings_of
from cute_fa.cli.simulate import run_case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_generation(parser)
    arguments.add_problem(parser)
    arguments.add_simulation(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from cute_fa.testing import Case

    case = Case("problem", arguments.problem_of(args), args.seed)
    with Progress(f"simulating {describe(case)}"):
        result = run_case(case, settings_of(args))
    if args.json:
        launches = [_document(launch) for launch in result.launches]
        print_json({"generation": result.generation, "arch": result.arch, "launches": launches})
    else:
        print(f"{styled(f'{result.generation} on {result.arch}', 'bold')}  {describe(case)}")
        for number, launch in enumerate(result.launches):
            _print(number, launch)
        if not result.launches:
            print("nothing to compute: no launch")
    return FAILED if any(hazard.severity == "error" for hazard in result.hazards) else OK


def _print(number: int, launch: Any) -> None:
    ctas = launch.grid[0] * launch.grid[1] * launch.grid[2]
    print(f"\nlaunch {number}  {launch.kernel}")
    shape = {
        "grid": f"{_extent(launch.grid)} = {ctas} CTAs",
        "block": _extent(launch.block),
        "cluster": _extent(launch.cluster),
        "shared memory": f"{launch.smem_bytes:,} bytes dynamic",
        "simulated in": duration(launch.seconds),
    }
    print(pairs(shape, indent="  "))
    print(pairs(launch.counters.as_dict(), indent="  "))
    print(f"  {len(launch.hazards)} hazards")
    for hazard in launch.hazards:
        print(hazard)


def _extent(extent: tuple[int, ...]) -> str:
    return " × ".join(map(str, extent))


def _document(launch: Any) -> dict[str, Any]:
    return {
        "kernel": launch.kernel,
        "grid": list(launch.grid),
        "block": list(launch.block),
        "cluster": list(launch.cluster),
        "smem_bytes": launch.smem_bytes,
        "seconds": launch.seconds,
        "counters": launch.counters.as_dict(),
        "hazards": [str(hazard) for hazard in launch.hazards],
    }
