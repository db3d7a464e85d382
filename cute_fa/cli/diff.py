"""``cute-fa diff``: two kernels side by side, compiled here or read from files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cute_fa.cli import arguments
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import print_json, styled, table
from cute_fa.cli.progress import Progress
from cute_fa.errors import CuteFAError, InvalidArgumentError

if TYPE_CHECKING:
    from cute_fa.asm.diff import Difference, Version
    from cute_fa.build.compile import Request

_FILES = (".ptx", ".cubin")
_FLAGS = {
    "causal": {"causal": True},
    "window-left": {"has_window_left": True},
    "window-right": {"has_window_right": True},
    "softcap": {"has_softcap": True},
    "varlen": {"is_varlen": True},
    "used-q": {"has_seqused_q": True},
    "used-k": {"has_seqused_k": True},
    "block-descales": {"has_block_descales": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What two kernels differ in. A and B are kernels in the words that cute-fa compile prints, "
        "with fields of the config (--set) added as NAME=VALUE, e.g. 'fa2 sm_80 bfloat16 d128 "
        "causal tile_n=64'; or a .ptx or .cubin file, beside which the other one is taken too if "
        "it has the same name. Exit code 1 if they differ."
    )
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument(
        "--registers",
        action="store_true",
        help="keep the numbers of registers and labels in the diff of the PTX",
    )
    parser.add_argument("--all", action="store_true", help="show the figures that are equal too")
    parser.add_argument("--no-ptx", action="store_true", help="leave out the diff of the PTX")
    parser.add_argument(
        "-U", "--context", type=int, default=3, metavar="LINES", help="around each change"
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from cute_fa.asm.diff import diff

    if args.context < 0:
        raise InvalidArgumentError(
            "--context is negative", got=args.context, expected="≥ 0", fix="--context 3"
        )
    with Progress("compiling"):
        first, second = _versions([args.first, args.second])
    found = diff(first, second, registers=args.registers, context=args.context)
    if args.json:
        print_json(found.as_dict())
    else:
        _print(found, show_all=args.all, show_ptx=not args.no_ptx)
    return OK if found.is_empty else FAILED


def _versions(words: list[str]) -> list[Version]:
    """Both sides; what must be compiled is compiled together."""
    from cute_fa.asm.diff import Version
    from cute_fa.build import compile_many

    requests = {text: request_of(text) for text in words if not text.endswith(_FILES)}
    compiled = dict(zip(requests, compile_many(list(requests.values())), strict=True))
    versions = []
    for text in words:
        if text in compiled:
            kernel = compiled[text]
            launch = {
                "threads": kernel.config.num_threads,
                "dynamic_smem_bytes": kernel.config.smem_bytes,
                "ctas_per_sm": kernel.resources.ctas_per_sm,
            }
            versions.append(Version(text, kernel.ptx, kernel.cubin, launch))
        else:
            versions.append(_from_file(Path(text)))
    return versions


def request_of(text: str) -> Request:
    """The kernel that a label as ``cute-fa compile`` prints it names, with config fields.

    Raises:
        InvalidArgumentError: a word that means nothing here, or a part that is missing.
        UnsupportedError: the rung does not serve it.
    """
    from cute_fa.build.compile import Request, dtype_name
    from cute_fa.build.registry import GENERATIONS, find
    from cute_fa.problem import KernelVariant
    from cute_fa.target import get_target

    fields: dict[str, Any] = {"dtype": "bfloat16"}
    generation = arch = None
    settings = []
    for word in text.replace(",", " ").split():
        dims = word.removeprefix("d").split("/")
        if word in GENERATIONS:
            generation = word
        elif word.startswith("sm_"):
            arch = get_target(word)
        elif "=" in word:
            settings.append(word)
        elif word in _FLAGS:
            fields |= _FLAGS[word]
        elif word.startswith("packed-") and word.removeprefix("packed-").isdigit():
            fields["packed_group"] = int(word.removeprefix("packed-"))
        elif word.startswith("d") and all(part.isdigit() for part in dims) and len(dims) < 3:
            fields |= {"head_dim": int(dims[0]), "head_dim_v": int(dims[-1])}
        elif word != "fwd":
            try:
                fields["dtype"] = dtype_name(word)
            except CuteFAError:
                raise InvalidArgumentError(
                    "a word of a kernel's description means nothing",
                    got=f"{word!r} in {text!r}",
                    expected=f"{', '.join(GENERATIONS)}, sm_…, a dtype, d128 or d192/128, "
                    f"{', '.join(_FLAGS)}, NAME=VALUE; or a .ptx or .cubin file",
                    fix="as in 'fa2 sm_80 bfloat16 d128 causal tile_n=64'",
                ) from None
    missing = [
        name
        for name, value in (
            ("a generation", generation),
            ("an architecture", arch),
            ("head dims", fields.get("head_dim")),
        )
        if value is None
    ]
    if generation is None or arch is None or missing:
        raise InvalidArgumentError(
            f"a kernel's description lacks {' and '.join(missing)}",
            got=repr(text),
            expected="generation, architecture, dtype, head dim, and then features",
            fix="as in 'fa2 sm_80 bfloat16 d128 causal'",
        )
    entry = find(generation, "fwd")
    request = Request(entry, KernelVariant(**fields), arch, arguments.settings(settings))
    request.config  # noqa: B018  raises if the kernel does not serve the variant
    return request


def _from_file(path: Path) -> Version:
    from cute_fa.asm.diff import Version

    ptx, cubin = (path.with_suffix(suffix) for suffix in _FILES)
    try:
        path.open("rb").close()
        return Version(
            str(path),
            ptx.read_text() if ptx.exists() else None,
            cubin.read_bytes() if cubin.exists() else None,
        )
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            "a file cannot be read",
            got=f"{path}: {error}",
            expected="a .ptx or .cubin file",
            fix="check the path, or describe a kernel: 'fa2 sm_80 bfloat16 d128 causal'",
        ) from error


def _print(found: Difference, *, show_all: bool, show_ptx: bool) -> None:
    print(f"A  {found.labels[0]}\nB  {found.labels[1]}")
    for section, figures in (found.figures if show_all else found.changed).items():
        rows = [
            (name, *pair, None if None in pair else f"{pair[1] - pair[0]:+,}")  # type: ignore
            for name, pair in figures.items()
        ]
        print()
        print(table([section, "A", "B", "B − A"], rows))
    if show_ptx and found.ptx:
        print()
        for line in found.ptx:
            style = {"+": "green", "-": "red", "@": "dim"}.get(line[:1])
            print(styled(line, style) if style else line)
    for note in found.notes:
        print(f"note: {note}")
    if found.is_empty:
        print("no difference")
