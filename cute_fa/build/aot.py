"""Make a bundle: compile a selection of kernels and write them so that no compiler is needed.

``write_bundle`` works in a directory beside the output and renames it when it is complete: whoever
looks sees the old bundle, the new one, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cute_fa
from cute_fa.build import keys, manifest
from cute_fa.build.bundle import TUNED, Bundle
from cute_fa.build.compiled import Compiled
from cute_fa.build.host import HOST_NAME
from cute_fa.build.parallel import Progress, compile_many
from cute_fa.build.presets import CANDIDATE, LeftOut, Selected, select
from cute_fa.build.toolchain import link_shared, runtime_library, toolchain
from cute_fa.errors import BundleError, CompileError, CuteFAError, UnsupportedError
from cute_fa.target import get_target

RUNTIME_FOLDER = "runtime"
KERNEL_FOLDER = "kernels"
_KEY_DIGITS = 12
_ELF_HEADER_BYTES = 64
_PTX_COMPILER = re.compile(r"Cuda compilation tools, release ([\d.]+)")

# Adds files to a bundle that is complete but for them: (folder, bundle) → what the manifest says.
Extension = Callable[[Path, Bundle], dict[str, Any]]


@dataclass(frozen=True)
class Written:
    """A bundle that has been written.

    Attributes:
        bundle: loaded from where it lies now.
        left_out: what the presets ask for that no kernel serves, and useless candidates.
    """

    bundle: Bundle
    left_out: tuple[LeftOut, ...]


def write_bundle(
    output: Path,
    *,
    archs: Sequence[str],
    presets: Sequence[str],
    jobs: int | None = None,
    with_runtime: bool = True,
    progress: Progress | None = None,
    extend: Extension | None = None,
) -> Written:
    """Compile the kernels of some presets for some architectures into a bundle.

    Args:
        output: the directory to make. A bundle that is there is replaced, its table of tuned
            kernels too; anything else is not.
        archs, presets: names of ``cute_fa.target.TARGETS`` and ``presets.PRESETS``.
        jobs, progress: of ``compile_many``.
        with_runtime: put the DSL's runtime library (44 MB) into the bundle; without it, the
            machine that loads the bundle must have the very same one installed.
        extend: adds files, e.g. results of the simulator.

    Raises:
        InvalidArgumentError: an unknown preset or architecture.
        UnsupportedError: nothing of the presets is served on the architectures.
        BundleError: something else than a bundle is in the way, or it cannot be written.
        CompileError, MissingToolError: the compiler or the linker failed, or is not there.
    """
    output = output.resolve() if output.is_dir() else output.absolute()
    _check_replaceable(output)
    selected, left_out = select(presets, archs)
    if not selected:
        raise UnsupportedError(
            "no kernel serves what the presets ask for on these architectures",
            got=left_out[0].reason if left_out else None,
        )
    _check_writable(output)
    sources = keys.source_digest(("cute_fa",))  # of what is compiled: that takes minutes
    kernels, failed = _compile(selected, jobs, progress)
    left_out += failed
    document: dict[str, Any] = {
        "cute_fa": cute_fa.__version__,
        "sources": sources,
        "toolchain": toolchain().key_parts(),
        "cuda": {
            "libraries": toolchain().flavour.removeprefix("cu"),
            "code generator": _code_generator(kernels[0][1]),
        },
        "archs": [arch for arch in _names(archs) if any(k.arch == arch for _, k in kernels)],
        "presets": list(presets),
        "left_out": [asdict(each) for each in left_out],
        "runtime": _runtime_document(with_runtime),
    }
    with _staging(output) as folder:
        if with_runtime:
            (folder / RUNTIME_FOLDER).mkdir()
            shutil.copyfile(runtime_library(), folder / document["runtime"]["file"])
        (folder / KERNEL_FOLDER).mkdir()
        document["kernels"] = [_add_kernel(folder, each, kernel) for each, kernel in kernels]
        manifest.seal(folder, document)
        bundle = Bundle(folder)
        for kernel in bundle.kernels:
            kernel.load_library()  # a library that does not load must not be shipped
        if extend is not None:
            manifest.seal(folder, {**document, **extend(folder, bundle)})
    return Written(Bundle(output), left_out)


def _names(archs: Sequence[str]) -> Iterable[str]:
    return dict.fromkeys(get_target(arch).arch for arch in archs)


def _compile(
    selected: Sequence[Selected], jobs: int | None, progress: Progress | None
) -> tuple[list[tuple[Selected, Compiled]], tuple[LeftOut, ...]]:
    """The kernels, and the candidates that are not worth trying: those that the compiler refuses,
    and those that spill registers, in whose hot loops nothing is to spare for local memory.

    Raises:
        CuteFAError: a default kernel does not compile.
    """
    requests = [each.request for each in selected]
    results = compile_many(requests, jobs=jobs, progress=progress, return_errors=True)
    kernels, failed = [], []
    for each, result in zip(selected, results, strict=True):
        reason = _not_worth_trying(result) if each.role == CANDIDATE else None
        if reason is not None:
            what = f"{each.request.label} {dict(each.request.overrides)}"
            failed.append(LeftOut(what, reason))
        elif isinstance(result, CuteFAError):
            raise result
        else:
            kernels.append((each, result))
    if not kernels:
        raise CompileError("no candidate is of use", got=failed[0].reason)
    return kernels, tuple(failed)


def _not_worth_trying(result: Compiled | CuteFAError) -> str | None:
    """Why a candidate is left out, or None."""
    if isinstance(result, CuteFAError):
        return str(result)
    if result.resources.spills:
        return f"it spills registers: {result.resources.stack_bytes} bytes of stack per thread"
    return None


def _add_kernel(folder: Path, selected: Selected, kernel: Compiled) -> dict[str, Any]:
    """Write a kernel's files; its document in the manifest."""
    name = "-".join((kernel.generation, kernel.direction, kernel.arch, kernel.key[:_KEY_DIGITS]))
    stem = f"{KERNEL_FOLDER}/{name}"
    files = {"library": f"{stem}.so", "ptx": f"{stem}.ptx.xz", "object": f"{stem}.o.xz"}
    _link(kernel.host_object, folder / files["library"])
    (folder / files["ptx"]).write_bytes(lzma.compress(kernel.ptx.encode(), preset=9))
    (folder / files["object"]).write_bytes(lzma.compress(_without_machine_code(kernel), preset=9))
    return {
        "name": name,
        "label": kernel.label,
        "role": selected.role,
        "generation": kernel.generation,
        "direction": kernel.direction,
        "arch": kernel.arch,
        "variant": keys.plain(kernel.variant),
        "config": {"class": type(kernel.config).__name__, "fields": asdict(kernel.config)},
        "kernel_name": kernel.kernel_name,
        "host_name": HOST_NAME,
        "options": kernel.options,
        "key": kernel.key,
        "resources": kernel.resources.as_dict(),
        "files": files,
    }


def _without_machine_code(kernel: Compiled) -> bytes:
    """The launch code with a checksum and zeros in place of the GPU's machine code, which is two
    thirds of it when compressed: the simulator runs the PTX, and knows images by their bytes."""
    kept = kernel.cubin[:_ELF_HEADER_BYTES] + hashlib.sha256(kernel.cubin).digest()
    return kernel.host_object.replace(kernel.cubin, kept.ljust(len(kernel.cubin), b"\0"))


def _link(host_object: bytes, output: Path) -> None:
    import tvm_ffi

    with tempfile.TemporaryDirectory(prefix="cute_fa-") as scratch:
        source = Path(scratch, "host.o")
        source.write_bytes(host_object)
        libraries = [runtime_library(), Path(tvm_ffi.libinfo.find_libtvm_ffi())]
        link_shared([source], libraries, output, search_path=f"$ORIGIN/../{RUNTIME_FOLDER}")


def _runtime_document(bundled: bool) -> dict[str, Any]:
    path = runtime_library()
    file = f"{RUNTIME_FOLDER}/{path.name}"
    return {"file": file, "bundled": bundled, **manifest.checksum(path)}


def _code_generator(kernel: Compiled) -> str | None:
    """CUDA release of the compiler that wrote the PTX, as its first lines say."""
    found = _PTX_COMPILER.search(kernel.ptx)
    return found[1] if found else None


def _check_replaceable(output: Path) -> None:
    """That nothing but a bundle would be lost.

    Raises:
        BundleError: the output is there and is not a bundle, or has something else in it.
    """
    if not output.exists() and not output.is_symlink():
        return
    try:
        if output.is_dir() and not any(output.iterdir()):
            return
        others = manifest.strangers(output, allowed=[TUNED])
    except (OSError, BundleError) as error:
        raise BundleError(
            "something that is not a bundle is in the way",
            got=str(output),
            expected="a name that is free, an empty directory or a bundle to replace",
            fix="choose another output, or remove it",
        ) from error
    if others:
        raise BundleError(
            "the bundle to replace has something else in it",
            got=", ".join(others[:8]) + (", …" if others[8:] else ""),
            expected="what cute-fa aot wrote, and tuned.json",
            fix="move it elsewhere, or choose another output",
        )


def _check_writable(output: Path) -> None:
    """That a directory can be made beside ``output``: better known before compiling than after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent):
            pass
    except OSError as error:
        raise BundleError(
            "a bundle cannot be written here", got=str(error), fix="choose another output"
        ) from error


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` that takes its place if the block ends without an error."""
    _check_writable(output)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = scratch / "new"
        folder.mkdir(mode=0o755)
        yield folder
        _check_replaceable(output)
        with contextlib.ExitStack() as undo:
            if output.exists():
                output.rename(scratch / "old")
                undo.callback((scratch / "old").rename, output)
            folder.rename(output)
            undo.pop_all()
    except OSError as error:
        raise BundleError(
            "a bundle could not be written", got=str(error), fix="what was there is untouched"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
