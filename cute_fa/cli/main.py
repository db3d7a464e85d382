"""The ``cute-fa`` command: one subcommand per file, imported when it runs.

Exit codes: 0 fine, 1 a check failed, 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import cute_fa
from cute_fa.errors import (
    BundleError,
    CacheError,
    CuteFAError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingToolError,
    UnsupportedError,
)

OK, FAILED, USAGE = 0, 1, 2
_USAGE_ERRORS = (
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
    MissingToolError,
    CacheError,
    BundleError,
)

# Where the output goes is full; an error of a file has that file's name.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# command → (module, help); a module has add_arguments(parser) and run(args) -> exit code
COMMANDS = {
    "doctor": ("doctor", "what is installed, what is missing and how to mend it"),
    "list": ("kernels", "rungs of the ladder, what they serve and where"),
    "compile": ("compile", "compile kernels for any architecture and show their resources"),
    "run": ("run", "run a problem and check it against the reference"),
    "inspect": ("inspect", "what the compiler made of a kernel"),
    "diff": ("diff", "what two kernels differ in"),
    "sim": ("sim", "run a problem on the simulator and show what it counted and found"),
    "bench": ("bench", "time the forward beside other libraries on a GPU, or a launch's cost"),
    "aot": ("aot", "compile kernels into a bundle that needs no compiler, or check one"),
    "cache": ("cache", "the kernels kept on disk"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. ``--help`` and bad usage exit as argparse does; with
    ``--json`` bad usage is an error like any other."""
    words = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in words
    code = OK
    try:
        try:
            args = _parse(words, as_json=as_json)
            as_json = getattr(args, "json", False)
            code = args.run(args)
        except CuteFAError as error:
            code = USAGE if isinstance(error, _USAGE_ERRORS) else FAILED
            _report(error, as_json=as_json)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone (cute-fa list | head); keep Python from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"cute-fa: the output cannot be written: {error.strerror}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Commands' parsers are of this class too."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        if not self.as_json:
            super().error(message)
        raise InvalidArgumentError(
            "the command line is not usable",
            got=message,
            expected=" ".join(self.format_usage().split()),
            fix=f"{self.prog} --help says more",
        )


def _parse(argv: list[str], *, as_json: bool = False) -> argparse.Namespace:
    parser = _Parser(
        prog="cute-fa",
        description="FlashAttention 1 to 4 as CuTe DSL kernels, compiled, run and inspected "
        "with or without a GPU.",
    )
    parser.add_argument("--version", action="version", version=f"cute-fa {cute_fa.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Only the command that is asked for is imported, and it alone describes its arguments.
    asked = next((word for word in argv if not word.startswith("-")), None)
    known = parser
    for name, (module_name, text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + "."
        )
        if name == asked:
            module = importlib.import_module(f"cute_fa.cli.{module_name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
            known = subparser
    for each in (parser, known):
        each.as_json = as_json
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _report(error: CuteFAError, *, as_json: bool) -> None:
    if as_json:
        from cute_fa.cli.output import print_json

        print_json({"error": _as_dict(error)})
    else:
        print(f"cute-fa: {error}", file=sys.stderr)


def _as_dict(error: CuteFAError) -> dict[str, object]:
    return {
        "type": type(error).__name__,
        "what": error.what,
        "got": None if error.got is None else str(error.got),
        "expected": None if error.expected is None else str(error.expected),
        "fix": error.fix,
        "alternatives": list(error.alternatives),
    }
