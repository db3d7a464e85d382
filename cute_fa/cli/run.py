"""``cute-fa run``: one problem, or many at random, checked against the fp64 reference."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import TYPE_CHECKING, Any

from cute_fa.cli import arguments
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import duration, pairs, print_json, size, styled, table
from cute_fa.cli.progress import Progress
from cute_fa.cli.simulate import Result, Settings, require_memory, run_case
from cute_fa.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.testing import Case, ErrorReport

SHOWN_LENGTHS = 6
SHOWN_COUNTERS = ("warp_instructions", "exponentials", "mma_flops", "barrier_waits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_generation(parser)
    arguments.add_problem(parser)
    parser.add_argument(
        "--random",
        type=int,
        metavar="COUNT",
        help="instead of one problem, COUNT of them drawn at random with --seed",
    )
    parser.add_argument(
        "--backend", choices=("sim", "cuda"), default="sim", help="where to run (default sim)"
    )
    arguments.add_simulation(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args, args.backend)
    cases = _cases(args)
    documents = []
    failed = 0
    with Progress("running", len(cases)) as progress:
        for number, case in enumerate(cases):
            progress.update(number, describe(case))
            result, report = _check(case, settings)
            good = report.ok and not result.hazards
            failed += not good
            documents.append((case, result, report, good))
    if args.json:
        print_json({"failed": failed, "runs": [_document(*entry[:3]) for entry in documents]})
    elif args.random is None:
        _print_one(*documents[0])
    else:
        _print_many(documents)
    return FAILED if failed else OK


def settings_of(args: argparse.Namespace, backend: str = "sim") -> Settings:
    """How the arguments of ``add_generation`` and ``add_simulation`` ask for it to be run."""
    from cute_fa.target import get_target

    arch = args.arch
    if arch is None and backend == "sim":
        arch = arguments.default_arch(args.generation, args.dtype)
    return Settings(
        generation=args.generation,
        arch=None if arch is None else get_target(arch).arch,
        backend=backend,
        completion=args.completion,
        checks=not args.no_checks,
        seed=args.seed,
    )


def describe(case: Case) -> str:
    """A problem in one line: B Sq×Sk, or that of each packed sequence, Hq/Hk D dtype, masks."""
    from cute_fa.varlen import VarlenProblem

    words = []
    if isinstance(case.problem, VarlenProblem):
        p, packing = case.problem.padded, case.problem.require_packing()
        words.append("varlen")
        lengths = zip(packing.rows_q, packing.rows_k, strict=True)
        words += [f"{len(q)}×{len(k)}" for q, k in islice(lengths, SHOWN_LENGTHS)]
        if packing.batch > SHOWN_LENGTHS:
            words.append(f"… {packing.batch} sequences")
    else:
        p = case.problem
        words += [f"b{p.batch}", f"s{p.seqlen_q}×{p.seqlen_k}"]
    dims = f"d{p.head_dim}" if p.head_dim == p.head_dim_v else f"d{p.head_dim}/{p.head_dim_v}"
    words += [f"h{p.heads_q}/{p.heads_k}", dims]
    words.append(p.dtype)
    if p.causal:
        words.append("causal")
    if p.window_left is not None or (not p.causal and p.window_right is not None):
        bounds = ("∞" if bound is None else str(bound) for bound in p.window)
        words.append("window " + ",".join(bounds))
    if p.softcap:
        words.append(f"softcap {p.softcap:g}")
    if p.softmax_scale is not None:
        words.append(f"scale {p.softmax_scale:g}")
    return " ".join(words)


def _cases(args: argparse.Namespace) -> list[Case]:
    from cute_fa.testing import Case, random_problems

    if args.random is None:
        return [Case("problem", arguments.problem_of(args), args.seed)]
    if args.random < 1:
        raise InvalidArgumentError(
            "--random is not usable",
            got=args.random,
            expected="how many problems to draw, ≥ 1",
            fix="as in --random 10",
        )
    if args.varlen:
        raise InvalidArgumentError(
            "--random draws its own lengths",
            got=f"--varlen {args.varlen}",
            expected="--varlen alone",
            fix="leave out the lengths, or --random",
        )
    arguments.refuse_problem(args, "--random")
    return random_problems(args.random, args.seed, varlen=args.varlen is not None)


def _check(case: Case, settings: Settings) -> tuple[Result, ErrorReport]:
    from cute_fa.build.registry import find
    from cute_fa.testing import check_attention

    _require_memory_of_reference(case)
    result = run_case(case, settings)
    report = check_attention(
        *(result.out, result.lse, *result.inputs, case.problem),
        exp2_error=find(result.generation).exp2_error,
        repro=case.repro,
    )
    return result, report


def _require_memory_of_reference(case: Case) -> None:
    """The fp64 reference keeps whole matrices of scores: each, masked, as weights, and again."""
    from cute_fa.varlen import VarlenProblem

    problem = case.problem
    one_by_one = problem.sequences() if isinstance(problem, VarlenProblem) else (problem,)
    scores = max((p.batch * p.heads_q * p.seqlen_q * p.seqlen_k for p in one_by_one), default=0)
    require_memory("scores of the fp64 reference", 4 * 8 * scores)


def _document(case: Case, result: Result, report: ErrorReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "problem": asdict(case.problem),
        "layouts": list(case.layouts),
        "generation": result.generation,
        "arch": result.arch,
        "ok": report.ok and not result.hazards,
        "max_err": report.max_err,
        "rms_err": report.rms_err,
        "ref_max_err": report.ref_max_err,
        "ref_rms_err": report.ref_rms_err,
        "lse_err": report.lse_err,
        "measures": [
            {"name": m.name, "error": m.error, "reference": m.reference, "allowed": m.allowed}
            for m in report.measures
        ],
        "problems": list(report.problems),
        "hazards": [str(hazard) for hazard in result.hazards],
        "counters": total_counters(result),
        "ideal_hbm_bytes": case.problem.ideal_hbm_bytes(),
        "standard_hbm_bytes": case.problem.standard_hbm_bytes(),
        "compile_seconds": result.compile_seconds,
        "seconds": result.seconds,
    }


def total_counters(result: Result) -> dict[str, int]:
    """All counters, summed over the launches."""
    total: dict[str, int] = {}
    for launch in result.launches:
        for name, count in launch.counters.as_dict().items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))


def _print_one(case: Case, result: Result, report: ErrorReport, good: bool) -> None:
    p = case.problem
    where = f"{result.generation} on {result.arch}"
    took = f"ready in {duration(result.compile_seconds)}, ran in {duration(result.seconds)}"
    print(f"{styled(where, 'bold')}  {describe(case)}  ({took})")
    print(report)
    if result.launches:
        read, written = (result.counter(f"global_bytes_{w}") for w in ("read", "written"))
        ideal, standard = p.ideal_hbm_bytes(), p.standard_hbm_bytes()
        lines: dict[str, object] = {
            "HBM bytes": f"{size(read)} read, {size(written)} written; "
            f"ideal {size(ideal)}, standard attention {size(standard)}",
            **{name.replace("_", " "): count for name, count in headline(result).items()},
            "hazards": len(result.hazards),
        }
        print(pairs(lines, indent="  "))
    for hazard in result.hazards:
        print(hazard)
    print(styled("passed", "green") if good else styled("FAILED", "red"))


def headline(result: Result) -> dict[str, int]:
    """The counters that papers talk about."""
    return {
        name: sum(
            getattr(launch.counters, name, launch.counters[name]) for launch in result.launches
        )
        for name in SHOWN_COUNTERS
    }


def _print_many(documents: list[tuple[Case, Result, ErrorReport, bool]]) -> None:
    rows = [
        (
            case.name,
            describe(case),
            result.generation,
            f"{report.max_err:.1e}",
            f"{report.ref_max_err:.1e}",
            f"{report.rms_err:.1e}",
            f"{report.ref_rms_err:.1e}",
            len(result.hazards),
            "passed" if good else "FAILED",
        )
        for case, result, report, good in documents
    ]
    header = ["case", "problem", "rung", "max err", "torch", "rms err", "torch", "hazards", ""]
    print(table(header, rows))
    for _, result, report, good in documents:
        if not good:
            print(report)
            for hazard in result.hazards:
                print(hazard)
    passed = sum(good for *_, good in documents)
    arch = documents[0][1].arch
    print(f"{passed} of {len(documents)} passed on {arch}")
