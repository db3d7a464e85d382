"""The manifest of a bundle: what is in it, checksums of every file, and of the manifest itself.

``manifest.json`` at the top of a bundle::

    format        1
    cute_fa       version of this package that made it, and that may load it
    toolchain     versions of the compiler: DSL, CUDA flavour, ptxas, TVM-FFI, Python, platform
    cuda          CUDA toolkit of the flavour and of the code generator
    archs, presets, left_out
    kernels       one document per kernel: identity, variant, config, and the names of its files
    runtime       file name of the DSL's runtime library, its checksum, whether it is in the bundle
    agreement     results of the simulator on small problems, if they were recorded
    files         name → sha256 and bytes, for every other file of the bundle
    digest        sha256 of the document without this field

Names of files are relative to the bundle. A bundle holds code that is run by whoever loads it:
checksums show damage, they do not show who made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cute_fa.errors import BundleError

FORMAT = 1
NAME = "manifest.json"
KEYS = ("cute_fa", "toolchain", "archs", "presets", "kernels", "runtime", "files")
"""What every manifest has, beside what ``read`` asks for."""

MAKE_AGAIN = "make or copy the bundle again (cute-fa aot … -o DIR)"


def seal(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of the files that are in ``folder`` now; the document as written."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / NAME
    )
    files = {name: checksum(folder / name) for name in names}
    sealed: dict[str, Any] = {"format": FORMAT, **document, "files": files}
    sealed.pop("digest", None)
    sealed["digest"] = _digest(sealed)
    (folder / NAME).write_text(json.dumps(sealed, indent=1) + "\n")
    return sealed


def strangers(folder: Path, allowed: Collection[str] = ()) -> list[str]:
    """Files in the folder of a bundle that its manifest does not list and that are not ``allowed``.

    Raises:
        BundleError: there is no manifest of a bundle, be it of another version.
    """
    try:
        document = json.loads((folder / NAME).read_text())
        listed = {NAME, *document["files"], *allowed}
        is_ours = "cute_fa" in document and "format" in document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_bundle(folder) from error
    if not is_ours:
        raise _no_bundle(folder)
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name not in listed)


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, found to be whole.

    Raises:
        BundleError: there is none, it is damaged, or it has another format.
    """
    path = folder / NAME
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise _no_bundle(folder) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            "a bundle cannot be read",
            got=str(error),
            expected=f"a {NAME} in UTF-8 that may be read",
            fix=MAKE_AGAIN,
        ) from error
    try:
        document = json.loads(text)
        if isinstance(document, dict) and not {"cute_fa", "digest", "format"} & set(document):
            raise _no_bundle(folder, f"a {NAME} of something else")
        found, version = document.pop("digest"), document["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise BundleError(
            "this bundle has another format",
            got=f"format {version!r} in {path}",
            expected=f"format {FORMAT}",
            fix="make it again with the cute_fa that is installed here",
        )
    if found != _digest(document):
        raise _damaged(path, "its contents do not match its digest")
    return {**document, "digest": found}


def check_files(folder: Path, document: Mapping[str, Any]) -> None:
    """Compare every file with its checksum.

    Raises:
        BundleError: files are missing or damaged; all of them are named.
    """
    problems = []
    for name, expected in document["files"].items():
        try:
            found = checksum(folder / name)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
        else:
            if found["bytes"] != expected["bytes"]:
                problems.append(f"{name} has {found['bytes']} bytes, not {expected['bytes']}")
            elif found != expected:
                problems.append(f"{name} does not match its checksum")
    if problems:
        raise BundleError(
            "a bundle is damaged",
            got="; ".join(problems[:8]) + (f"; {len(problems) - 8} more" if problems[8:] else ""),
            expected=f"the files that {folder / NAME} lists",
            fix=MAKE_AGAIN,
        )


def checksum(path: Path) -> dict[str, Any]:
    """sha256 in hex, and the size in bytes, of a file."""
    total = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
            size += len(block)
    return {"sha256": total.hexdigest(), "bytes": size}


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _no_bundle(folder: Path, got: str | None = None) -> BundleError:
    if got is None:
        got = f"no usable {NAME}" if folder.is_dir() else "no directory"
    return BundleError(
        f"this is not a bundle: {folder}",
        got=got,
        expected="a directory that cute-fa aot wrote",
        fix="make one with cute-fa aot -o DIR",
    )


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(f"the manifest of a bundle is damaged: {path}", got=why, fix=MAKE_AGAIN)
