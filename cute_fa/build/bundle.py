"""Kernels compiled ahead of time: a directory that runs without a compiler and without the DSL.

The launch code of each kernel is a shared object that needs the DSL's runtime library, which is in
the bundle, and libtvm_ffi, which the package apache-tvm-ffi brings. PTX and the unlinked launch
code are kept beside it, compressed: with them the same kernels run in the simulator.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import cute_fa
from cute_fa.build import keys, manifest, registry
from cute_fa.build.compiled import LaunchableKernel, label
from cute_fa.build.host import load_host, load_library
from cute_fa.build.toolchain import cuda_driver_version, runtime_library
from cute_fa.errors import (
    BundleError,
    CuteFAError,
    InvalidTypeError,
    MissingToolError,
    UnsupportedError,
)
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import Target, get_target, runs_on
from cute_fa.varlen import VarlenProblem

TUNED = "tuned.json"
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class BundleKernel(LaunchableKernel):
    """One kernel of a bundle; stands in for a ``Compiled`` wherever kernels are launched.

    Attributes:
        name: of its files, and in tables of tuned choices.
        role: "default", or "candidate" for one that only tuning tries.
        resources: registers, spills, shared memory and so on, as a dict.
    """

    name: str
    role: str
    resources: Mapping[str, Any] = field(repr=False)
    _bundle: Bundle = field(repr=False)
    _files: Mapping[str, str] = field(repr=False)

    @cached_property
    def ptx(self) -> str:
        """PTX text."""
        return lzma.decompress(self._path("ptx").read_bytes()).decode()

    def _load_host(self, backend: str) -> Any:
        if backend == "cuda":
            check_driver(self._bundle)
            return self.load_library()
        return load_host(backend, lzma.decompress(self._path("object").read_bytes()), None)

    def load_library(self) -> Any:
        """The launch function for a GPU, whether or not there is one."""
        return load_library(self._path("library"), self._bundle.runtime)

    def _path(self, kind: str) -> Path:
        return self._bundle.folder / self._files[kind]


class Bundle:
    """A bundle on disk whose files, versions and runtime library have been checked.

    Attributes:
        folder: where it lies.
        document: its manifest.
        kernels: in the order of the manifest.
        runtime: the runtime library that its launch code calls.
        tuned: kernel names that tuning on this machine's GPU chose, by label.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open a bundle.

        Raises:
            InvalidTypeError: the folder is no path.
            BundleError: it is damaged, or made by or for other versions or another platform.
            MissingToolError: something that it needs is not installed.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise InvalidTypeError(
                "the folder of a bundle is no path",
                got=type(folder).__name__,
                expected="a string or a pathlib.Path",
            )
        self.folder = Path(folder).absolute()
        self.document = manifest.read(self.folder)
        _check_versions(self.document)
        manifest.check_files(self.folder, self.document)
        try:
            self.kernels = tuple(self._kernel(each) for each in self.document["kernels"])
        except (CuteFAError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise BundleError(
                "a bundle lists a kernel that this cute_fa does not know",
                got=f"{type(error).__name__}: {error}",
                expected="kernels of the sources that are installed here",
                fix=manifest.MAKE_AGAIN,
            ) from error
        self.runtime = self._find_runtime()
        self.tuned, self._tuned_on = self._read_tuned()
        self._chosen: dict[tuple[str, str, KernelVariant], BundleKernel] = {}

    def __repr__(self) -> str:
        archs = ", ".join(self.archs)
        return f"Bundle({str(self.folder)!r}: {len(self.kernels)} kernels for {archs})"

    @property
    def archs(self) -> tuple[str, ...]:
        return tuple(self.document["archs"])

    @property
    def nbytes(self) -> int:
        """Size of all files, the manifest left out."""
        return sum(entry["bytes"] for entry in self.document["files"].values())

    def leave_out(self, names: Collection[str]) -> None:
        """From now on, launch none of these kernels."""
        self.kernels = tuple(kernel for kernel in self.kernels if kernel.name not in names)
        self._chosen.clear()

    def notes(self) -> list[str]:
        """What is unusual about the bundle, though it may be used."""
        found = []
        if self.document["sources"] != keys.source_digest(("cute_fa",)):
            found.append("it was made by other sources of the same version of cute_fa")
        if self.tuned:
            where = f", which was tuned on {self._tuned_on}"
            found.append(f"default kernels replaced by {TUNED}{where}: {len(self.tuned)}")
        return found

    def choose_generation(
        self, problem: AttentionProblem | VarlenProblem, target: Target, generation: str
    ) -> str:
        """The generation that runs the problem: the one asked for, or the newest in the bundle.

        Raises:
            UnsupportedError: no kernel of the bundle does; says which come closest.
        """
        variant = problem.variant
        asked = reversed(registry.GENERATIONS) if generation == "auto" else (generation,)
        for name in asked:
            automatic = generation != "auto" or _is_automatic(name)
            if automatic and self._serving(name, target, variant):
                return name
        raise self._no_kernel(generation, target, variant)

    def check_variant(self, generation: str, target: Target, variant: KernelVariant) -> None:
        """That a kernel of the bundle serves a variant.

        Raises:
            UnsupportedError: none does.
        """
        self.kernel(generation, target.arch, variant)

    def kernel(self, generation: str, arch: str, variant: KernelVariant) -> BundleKernel:
        """The kernel that serves a variant on an architecture: the tuned one, or the default.

        Raises:
            UnsupportedError: the bundle has none.
        """
        key = (generation, arch, variant)
        if key not in self._chosen:
            found = self._serving(generation, get_target(arch), variant)
            if not found:
                raise self._no_kernel(generation, get_target(arch), variant)
            self._chosen[key] = self._preferred(found)
        return self._chosen[key]

    def candidates(
        self, generation: str, target: Target, variant: KernelVariant
    ) -> tuple[BundleKernel, ...]:
        """Every kernel that serves a variant on a target, the defaults first."""
        found = self._matching(generation, target, variant)
        return tuple(sorted(found, key=lambda kernel: kernel.role != "default"))

    def _serving(
        self, generation: str, target: Target, variant: KernelVariant
    ) -> list[BundleKernel]:
        found = self._matching(generation, target, variant)
        names = set(self.tuned.values())
        return [kernel for kernel in found if kernel.role == "default" or kernel.name in names]

    def _matching(
        self, generation: str, target: Target, variant: KernelVariant
    ) -> list[BundleKernel]:
        return [
            kernel
            for kernel in self.kernels
            if kernel.generation == generation
            and kernel.variant == variant
            and runs_on(kernel.arch, target)
            and kernel.config.smem_bytes <= target.smem_per_block_bytes
        ]

    def _preferred(self, found: list[BundleKernel]) -> BundleKernel:
        """Of kernels for one variant: the architecture's own, the tuned one, the default."""
        return max(
            found,
            key=lambda kernel: (
                specificity(kernel.target),
                self.tuned.get(kernel.label) == kernel.name,
                kernel.role == "default",
            ),
        )

    def _no_kernel(
        self, generation: str, target: Target, variant: KernelVariant
    ) -> UnsupportedError:
        usable = [kernel for kernel in self.kernels if runs_on(kernel.arch, target)]
        if not usable:
            return UnsupportedError(
                "no kernel of this bundle runs on this architecture",
                got=target.arch,
                expected=", ".join(self.archs),
                fix=f"make one with cute-fa aot --arch {target.arch} …",
            )
        near = [k for k in usable if generation in ("auto", k.generation) and k.role == "default"]
        near.sort(key=lambda kernel: _distance(kernel.variant, variant))
        shown = "\n            ".join(kernel.label for kernel in near[:_SHOWN])
        if near[_SHOWN:]:
            shown += f"\n            and {len(near) - _SHOWN} more"
        return UnsupportedError(
            "this bundle has no kernel for the problem",
            got=label(generation, "fwd", target.arch, variant),
            expected=shown or f"a generation of {sorted({k.generation for k in usable})}",
            fix="make a bundle with a preset that has it (cute-fa aot --help), or call without a "
            "bundle where the compiler is installed",
        )

    def _kernel(self, document: Mapping[str, Any]) -> BundleKernel:
        entry = registry.find(document["generation"], document["direction"])
        get_target(document["arch"])
        names = ("generation", "direction", "arch", "kernel_name", "options", "key", "resources")
        for kind in ("library", "ptx", "object"):
            if document["files"][kind] not in self.document["files"]:
                raise KeyError(f"{document['name']}: no {kind} among the files")
        return BundleKernel(
            name=document["name"],
            role=document["role"],
            variant=KernelVariant(**document["variant"]),
            config=_config(entry, document["config"]),
            _bundle=self,
            _files=document["files"],
            **{name: document[name] for name in names},
        )

    def _find_runtime(self) -> Path:
        wanted = self.document["runtime"]
        if wanted["bundled"]:
            return self.folder / wanted["file"]
        try:
            path = runtime_library()
        except MissingToolError as error:
            raise MissingToolError(
                "this bundle was made without the runtime library, and none is installed",
                got=error.what,
                expected=f"{Path(wanted['file']).name} of nvidia-cutlass-dsl "
                f"{self.document['toolchain']['dsl']}",
                fix="make the bundle without --no-runtime, or install that package",
            ) from error
        if manifest.checksum(path)["sha256"] != wanted["sha256"]:
            raise BundleError(
                "the installed runtime library is not the one that this bundle was linked against",
                got=str(path),
                expected=f"that of nvidia-cutlass-dsl {self.document['toolchain']['dsl']}, "
                f"{self.document['toolchain']['flavour']}",
                fix="make the bundle without --no-runtime, or install that version",
            )
        return path

    def _read_tuned(self) -> tuple[dict[str, str], str]:
        """Names by label, and of which device."""
        path = self.folder / TUNED
        if not path.exists():
            return {}, ""
        try:
            document = json.loads(path.read_text())
            choices, device = document["choices"], str(document["device"]["name"])
            known = {kernel.name: kernel.label for kernel in self.kernels}
            tuned = {entry["label"]: entry["kernel"] for entry in choices}
            wrong = [name for text, name in tuned.items() if known.get(name) != text]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _bad_tuned(path, f"{type(error).__name__}: {error}") from error
        if wrong:
            raise _bad_tuned(path, f"{wrong[0]} is no kernel of the bundle for its label")
        return tuned, device


def specificity(target: Target) -> tuple[Any, ...]:
    """Orders architectures whose code runs on one GPU; its own is the greatest."""
    return target.compute_capability, target.is_architecture_specific


def check_driver(bundle: Bundle) -> tuple[int, int]:
    """CUDA version of the installed driver, if it runs the bundle's runtime library.

    Raises:
        MissingToolError: there is no CUDA driver.
        BundleError: it is too old.
    """
    flavour = bundle.document["toolchain"]["flavour"]
    driver = cuda_driver_version()
    if driver is None:
        raise MissingToolError(
            "there is no CUDA driver, so no kernel can run on a GPU here",
            got="libcuda.so.1 is not found or does not answer",
            expected=f"a driver for CUDA {flavour.removeprefix('cu')} or newer",
            fix="install NVIDIA's driver, or pass CPU tensors: they run in the simulator",
        )
    if driver[0] < int(flavour.removeprefix("cu")):
        raise BundleError(
            "the CUDA driver is too old for this bundle",
            got=f"a driver for CUDA {driver[0]}.{driver[1]}",
            expected=f"CUDA {flavour.removeprefix('cu')}.0 or newer",
            fix="update the driver, or make the bundle with the DSL's libraries for "
            f"CUDA {driver[0]}",
        )
    return driver


def _config(entry: registry.KernelEntry, document: Mapping[str, Any]) -> Any:
    module = import_module(entry.pick.partition(":")[0])
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in document["fields"].items()
    }
    return getattr(module, document["class"])(**fields)


def _is_automatic(generation: str) -> bool:
    return any(
        entry.generation == generation and entry.automatic and entry.direction == "fwd"
        for entry in registry.KERNELS
    )


def _distance(a: KernelVariant, b: KernelVariant) -> int:
    """In how many respects two variants differ."""
    return sum(value != vars(b)[name] for name, value in vars(a).items())


def _check_versions(document: Mapping[str, Any]) -> None:
    built = document.get("cute_fa")
    if built not in (None, cute_fa.__version__):
        raise BundleError(
            "this bundle was made by another version of cute_fa",
            got=f"cute_fa {built}",
            expected=f"cute_fa {cute_fa.__version__}, which is installed",
            fix=f"pip install cute-fa=={built}, or make the bundle again",
        )
    if missing := [key for key in manifest.KEYS if key not in document]:
        raise BundleError(
            "the manifest of a bundle is not one of this version",
            got=f"no {', '.join(missing)}",
            expected=", ".join(manifest.KEYS),
            fix=manifest.MAKE_AGAIN,
        )
    tools = document["toolchain"]
    here = f"{sys.platform} {platform.machine()}"
    if tools["platform"] != here:
        raise BundleError(
            "this bundle was made for another platform", got=tools["platform"], expected=here
        )
    install = f"pip install 'apache-tvm-ffi>={tools['tvm_ffi']}'"
    try:
        ffi = metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        raise MissingToolError(
            "apache-tvm-ffi is not installed, which launches the bundle's kernels", fix=install
        ) from None
    if not _serves(ffi, tools["tvm_ffi"]):
        raise BundleError(
            "the installed apache-tvm-ffi does not serve this bundle",
            got=f"apache-tvm-ffi {ffi}",
            expected=f"{tools['tvm_ffi']} or a later release of the same series",
            fix=install,
        )


def _serves(installed: str, built: str) -> bool:
    """Whether a TVM-FFI has the ABI that launch code was built with: same series, not older."""
    have, need = (_release(version) for version in (installed, built))
    return have[:2] == need[:2] and have >= need


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a release, e.g. (0, 1, 15) of "0.1.15.post2"."""
    numbers = []
    for word in version.split("+")[0].split("."):
        if not word.isdigit():
            break
        numbers.append(int(word))
    return tuple(numbers)


def _bad_tuned(path: Path, why: str) -> BundleError:
    return BundleError(
        "the table of tuned kernels of a bundle is not usable",
        got=f"{path}: {why}",
        fix="delete it, or run tools/gpu_check.py --tune again",
    )
