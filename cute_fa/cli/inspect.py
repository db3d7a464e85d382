"""``cute-fa inspect``: identity, resources, instruction mix, loops and red flags of a kernel."""

from __future__ import annotations

import argparse

from cute_fa.cli import arguments
from cute_fa.cli.main import OK
from cute_fa.cli.output import print_json, styled
from cute_fa.cli.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-g", "--generation", default="auto", help="fa1, fa2, … or auto (default): the newest"
    )
    parser.add_argument(
        "-a", "--arch", help="architecture; default the generation's first (sm_80 for auto)"
    )
    parser.add_argument("-d", "--head-dim", type=int, default=128)
    parser.add_argument("--head-dim-v", type=int, help="of V, if it differs")
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16 (default), float16, float8_e4m3fn"
    )
    arguments.add_kernel(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ptx", action="store_true", help="print the PTX and nothing else")
    what.add_argument("--sass", action="store_true", help="print the SASS and nothing else")
    arguments.add_json(what)


def run(args: argparse.Namespace) -> int:
    from cute_fa.asm import inspect_kernel
    from cute_fa.build import compile_many

    spec = {
        "generation": args.generation,
        "arch": args.arch or arguments.default_arch(args.generation, args.dtype),
        "dtype": args.dtype,
        "head_dim": args.head_dim,
        "head_dim_v": args.head_dim_v,
        **arguments.kernel_of(args),
    }
    with Progress("compiling"):
        [compiled] = compile_many([spec])
    if args.ptx:
        print(compiled.ptx)
        return OK
    if args.sass:
        print(compiled.sass)
        return OK
    found = inspect_kernel(
        compiled.ptx,
        compiled.cubin,
        threads=compiled.config.num_threads,
        dynamic_smem_bytes=compiled.config.smem_bytes,
        target=compiled.target,
        kernel=compiled.kernel_name,
    )
    identity = {
        "label": compiled.label,
        "key": compiled.key,
        "options": compiled.options,
        "config": dict(vars(compiled.config)),
        "toolchain": dict(compiled.toolchain),
    }
    if args.json:
        print_json({**identity, **found.as_dict()})
        return OK
    tools = compiled.toolchain
    print(styled(compiled.label, "bold"))
    print(f"{'compiled by':<18}CuTe DSL {tools['dsl']}, ptxas of {tools['ptxas']}")
    print(f"{'config':<18}{_config(compiled.config)}")
    print(found.render())
    return OK


def _config(config: object) -> str:
    """The config's numbers, which are what a reader compares; dtype and masks are in the label."""
    numbers = {name: value for name, value in vars(config).items() if type(value) is int}
    return " ".join(f"{name}={value}" for name, value in numbers.items())
