"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import ast
from typing import TYPE_CHECKING, Any

from cute_fa.errors import InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.problem import AttentionProblem
    from cute_fa.varlen import Packing, VarlenProblem


DEFAULT_DTYPE = "bfloat16"

# What ``add_problem`` adds, but for --varlen: what each is called, and its value if it is left out.
_OF_ONE_PROBLEM = {
    "--batch": None,
    "--seqlen": None,
    "--seqlen-k": None,
    "--heads": None,
    "--heads-k": None,
    "--head-dim": None,
    "--head-dim-v": None,
    "--dtype": None,
    "--scale": None,
    "--causal": False,
    "--window": (-1, -1),
    "--softcap": 0.0,
    "--varlen-k": None,
    "--seqused-q": None,
    "--seqused-k": None,
}


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_kernel(parser: argparse.ArgumentParser) -> None:
    """What decides, with rung, architecture, dtype and head dims, which kernel it is."""
    add_masks(parser)
    parser.add_argument("--varlen", action="store_true", help="for packed sequences")
    for side, what in (("q", "queries"), ("k", "keys")):
        parser.add_argument(
            f"--seqused-{side}",
            action="store_true",
            help=f"of which only the first {what} count, as each call says",
        )
    parser.add_argument(
        "--block-descales",
        action="store_true",
        help="for FP8 inputs with a descale for every 128 rows",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the config"
    )
    parser.add_argument("--line-info", action="store_true", help="relate PTX to source lines")


def kernel_of(args: argparse.Namespace) -> dict[str, Any]:
    """``add_kernel``'s arguments as ``build.compile`` takes them."""
    return {
        "causal": args.causal,
        "window_size": tuple(args.window),
        "softcap": args.softcap,
        "varlen": args.varlen,
        "seqused_q": args.seqused_q,
        "seqused_k": args.seqused_k,
        "block_descales": args.block_descales,
        "line_info": args.line_info,
        **settings(args.set),
    }


def add_masks(parser: argparse.ArgumentParser) -> None:
    """Causality, window and softcap."""
    parser.add_argument("--causal", action="store_true", help="bottom-right aligned causal mask")
    parser.add_argument(
        "--window",
        nargs=2,
        type=int,
        default=(-1, -1),
        metavar=("LEFT", "RIGHT"),
        help="inclusive sliding window around the diagonal, -1: unbounded",
    )
    parser.add_argument("--softcap", type=float, default=0.0, help="0 (default): none")


def add_problem(parser: argparse.ArgumentParser) -> None:
    """One attention problem: shapes, dtype, masking."""
    shapes = parser.add_argument_group("problem")
    shapes.add_argument("-b", "--batch", type=int, help="default 1")
    shapes.add_argument("-s", "--seqlen", type=int, help="of queries, and of keys; default 128")
    shapes.add_argument("--seqlen-k", type=int, help="of keys, if it differs")
    shapes.add_argument("-H", "--heads", type=int, help="query heads; default 2")
    shapes.add_argument("--heads-k", type=int, help="K/V heads, if fewer (GQA, MQA)")
    shapes.add_argument("-d", "--head-dim", type=int, help="of Q, K and V; default 64")
    shapes.add_argument("--head-dim-v", type=int, help="of V, if it differs")
    shapes.add_argument("--dtype", help="bfloat16 (default), float16, float8_e4m3fn")
    shapes.add_argument("--scale", type=float, help="softmax scale; default head_dim ** -0.5")
    add_masks(parser)
    packed = parser.add_argument_group("packed sequences, in place of --batch and --seqlen")
    packed.add_argument(
        "--varlen",
        nargs="?",
        const="",
        metavar="LENGTHS",
        help="how many queries, and keys, each sequence has, as 100,0,37; none with --random",
    )
    packed.add_argument("--varlen-k", metavar="LENGTHS", help="how many keys, if it differs")
    for side, what in (("q", "queries"), ("k", "keys")):
        packed.add_argument(
            f"--seqused-{side}", metavar="LENGTHS", help=f"how many of each one's {what} count"
        )


def refuse_problem(args: argparse.Namespace, instead: str) -> None:
    """That no argument of ``add_problem`` but --varlen is given.

    Raises:
        InvalidArgumentError: one is, and ``instead`` settles it.
    """
    for name, left_out in _OF_ONE_PROBLEM.items():
        value = getattr(args, name[2:].replace("-", "_"))
        if value != left_out:
            raise InvalidArgumentError(
                f"{instead} draws problems of all kinds",
                got=f"it and {name}" if value is True else f"it and {name} {value}",
                expected="one of them",
                fix=f"leave out {name}, or {instead} to run that one problem",
            )


def add_simulation(parser: argparse.ArgumentParser) -> None:
    """How the simulator runs it."""
    group = parser.add_argument_group("simulator")
    group.add_argument(
        "--completion",
        choices=("eager", "late", "random"),
        default="eager",
        help="when asynchronous copies complete: at issue, as late as legal, or at random",
    )
    group.add_argument("--seed", type=int, default=0, help="of the inputs and of the simulation")
    group.add_argument(
        "--no-checks", action="store_true", help="look for no hazards beyond bad addresses"
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-g", "--generation", default="auto", help="fa1, fa2, … (default auto)")
    parser.add_argument(
        "-a",
        "--arch",
        help="architecture; default the generation's first on the simulator (for auto sm_80, with "
        "float8_e4m3fn sm_90a), the GPU's own on a GPU",
    )


def default_arch(generation: str, dtype: str | None) -> str:
    """The architecture for a generation if nobody names one, as the public functions have it."""
    from cute_fa.build.compile import dtype_name
    from cute_fa.ops.checks import GENERATIONS
    from cute_fa.ops.checks import default_arch as of_call

    known = generation if generation in GENERATIONS else "auto"
    return of_call(known, dtype_name(dtype or DEFAULT_DTYPE))


def problem_of(args: argparse.Namespace) -> AttentionProblem | VarlenProblem:
    """The problem that ``add_problem``'s arguments describe.

    Raises:
        CuteFAError: they describe none.
    """
    from cute_fa.build.compile import dtype_name
    from cute_fa.problem import AttentionProblem, normalise_window
    from cute_fa.varlen import VarlenProblem

    packing = _packing_of(args)
    left, right = normalise_window(args.causal, tuple(args.window))
    seqlen = 128 if args.seqlen is None else args.seqlen
    heads = 2 if args.heads is None else args.heads
    head_dim = 64 if args.head_dim is None else args.head_dim
    problem = AttentionProblem(
        batch=1 if args.batch is None else args.batch,
        seqlen_q=seqlen,
        seqlen_k=seqlen if args.seqlen_k is None else args.seqlen_k,
        heads_q=heads,
        heads_k=heads if args.heads_k is None else args.heads_k,
        head_dim=head_dim,
        head_dim_v=head_dim if args.head_dim_v is None else args.head_dim_v,
        dtype=dtype_name(args.dtype or DEFAULT_DTYPE),
        causal=args.causal,
        window_left=left,
        window_right=right,
        softcap=args.softcap,
        softmax_scale=args.scale,
    )
    return problem if packing is None else VarlenProblem.of(problem, packing)


def _packing_of(args: argparse.Namespace) -> Packing | None:
    """The packed sequences that the arguments describe, if any."""
    from cute_fa.varlen import Packing

    if args.varlen is None:
        for name in ("varlen_k", "seqused_q", "seqused_k"):
            if getattr(args, name) is not None:
                raise InvalidArgumentError(
                    f"--{name.replace('_', '-')} belongs to packed sequences",
                    got="it without --varlen",
                    expected="--varlen LENGTHS with it",
                    fix="as in --varlen 100,0,37",
                )
        return None
    for name in ("batch", "seqlen", "seqlen_k"):
        if getattr(args, name) is not None:
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')} is of dense tensors",
                got=f"it and --varlen {args.varlen}",
                expected="one of them",
                fix="the lengths say how many sequences there are and how long each is",
            )
    lengths_q = _lengths("--varlen", args.varlen)
    lengths_k = lengths_q if args.varlen_k is None else _lengths("--varlen-k", args.varlen_k)
    used_q, used_k = (
        None if text is None else _lengths(name, text)
        for name, text in (("--seqused-q", args.seqused_q), ("--seqused-k", args.seqused_k))
    )
    return Packing.of_lengths(lengths_q, lengths_k, used_q, used_k)


def _lengths(name: str, text: str) -> list[int]:
    """Comma-separated numbers."""
    lengths = words(text)
    if not lengths or not all(word.isdecimal() for word in lengths):
        raise InvalidArgumentError(
            f"{name} is no list of lengths",
            got=repr(text),
            expected="numbers and commas",
            fix=f"as in {name} 100,0,37",
        )
    return [int(word) for word in lengths]


def settings(items: list[str]) -> dict[str, Any]:
    """``name=value`` words as config fields; values are Python literals, or else strings."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidArgumentError(
                "--set takes a field of the kernel's config",
                got=repr(item),
                expected="name=value",
                fix="as in --set tile_n=64",
            )
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def words(text: str) -> list[str]:
    """A comma-separated list without its blanks."""
    return [word.strip() for word in text.split(",") if word.strip()]
