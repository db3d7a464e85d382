"""What compiles and links: the DSL's installed flavour, its versions and the C compiler.

Nothing here imports the DSL, so that a kernel that is on disk already loads without it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cute_fa import env
from cute_fa.errors import CompileError, MissingToolError

INSTALL_DSL = "pip install 'nvidia-cutlass-dsl>=4.8,<4.9'"
INSTALL_CC = "install gcc or clang (Debian/Ubuntu: apt-get install gcc), or set CC to a C compiler"

# One extension module per CUDA toolkit that the DSL was built with; ptxas is inside it.
_FLAVOUR_FILE = re.compile(r"_cutlass_ir\.cu(\d+)\..*\.so")
_EXTENSION_MODULE = "cutlass._mlir._mlir_libs._cutlass_ir"


@dataclass(frozen=True)
class Toolchain:
    """The compiler that a cached artefact depends on.

    Attributes:
        dsl: version of nvidia-cutlass-dsl.
        flavour: "cu12" or "cu13", the CUDA toolkit that the DSL's libraries were built with.
        libraries: version of those libraries, which hold ptxas: (flavour, libraries) fixes it.
        tvm_ffi: version of apache-tvm-ffi, whose ABI the host functions have.
        why: how the flavour was chosen, in words.
    """

    dsl: str
    flavour: str
    libraries: str
    tvm_ffi: str
    why: str

    def key_parts(self) -> dict[str, str]:
        return {
            "dsl": self.dsl,
            "flavour": self.flavour,
            "ptxas": f"{self.flavour} {self.libraries}",
            "tvm_ffi": self.tvm_ffi,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "platform": f"{sys.platform} {platform.machine()}",
        }


@cache
def dsl_root() -> Path:
    """The installed ``nvidia_cutlass_dsl`` directory.

    Raises:
        MissingToolError: the DSL is not installed.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise MissingToolError(
            "the CuTe DSL is not installed", expected="nvidia-cutlass-dsl 4.8", fix=INSTALL_DSL
        )
    return Path(locations[0])


@cache
def toolchain() -> Toolchain:
    """The compiler that this process would use.

    Raises:
        MissingToolError: the DSL or apache-tvm-ffi is not installed, or not for this driver.
    """
    flavour, why = _choose_flavour(installed_flavours(), cuda_driver_version())
    return Toolchain(
        dsl=_version("nvidia-cutlass-dsl", INSTALL_DSL),
        flavour=flavour,
        libraries=_version(f"nvidia-cutlass-dsl-libs-{flavour}", INSTALL_DSL),
        tvm_ffi=_version("apache-tvm-ffi", "pip install 'apache-tvm-ffi>=0.1.12,<0.2'"),
        why=why,
    )


def installed_flavours() -> tuple[int, ...]:
    """CUDA majors that the installed DSL has libraries for, ascending."""
    folder = dsl_root() / "dsl_packages" / "cutlass" / "_mlir" / "_mlir_libs"
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    found = {int(match[1]) for match in map(_FLAVOUR_FILE.fullmatch, names) if match}
    return tuple(sorted(found))


@cache
def cuda_driver_version() -> tuple[int, int] | None:
    """(major, minor) of CUDA that the installed driver supports; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int(0)
        status = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if status == 0 else None


def _choose_flavour(installed: tuple[int, ...], driver: tuple[int, int] | None) -> tuple[str, str]:
    """(flavour, reason) by the DSL's own rule: the newest that the driver runs, or the newest."""
    if not installed:
        raise MissingToolError(
            "the CuTe DSL has no libraries installed",
            got=f"no _cutlass_ir.cuNN extension under {dsl_root()}",
            expected="the cu12 or the cu13 libraries",
            fix=f"pip install --force-reinstall {INSTALL_DSL.removeprefix('pip install ')}",
        )
    names = ", ".join(f"cu{major}" for major in installed)
    if driver is None:
        reason = "the only one installed" if len(installed) == 1 else f"the newest of {names}"
        return f"cu{installed[-1]}", f"{reason}; no CUDA driver"
    usable = [major for major in installed if major <= driver[0]]
    if not usable:
        raise MissingToolError(
            "no installed flavour of the CuTe DSL runs on this CUDA driver",
            got=f"{names} installed, driver for CUDA {driver[0]}.{driver[1]}",
            expected=f"libraries for CUDA {driver[0]} or older",
            fix="install nvidia-cutlass-dsl without the cu13 extra, or update the driver",
        )
    return f"cu{usable[-1]}", f"the newest of {names} for a CUDA {driver[0]}.{driver[1]} driver"


def check_loaded_flavour(expected: str) -> None:
    """Refuse artefacts of another compiler than the cache key names.

    Raises:
        CompileError: the DSL loaded libraries of another flavour than ``expected``.
    """
    module = sys.modules.get(_EXTENSION_MODULE)
    match = _FLAVOUR_FILE.search(Path(getattr(module, "__file__", None) or "").name)
    if match and f"cu{match[1]}" != expected:
        raise CompileError(
            "the CuTe DSL loaded another flavour of its libraries than was predicted",
            got=f"cu{match[1]}",
            expected=expected,
            fix="leave only one of nvidia-cutlass-dsl-libs-cu12 and -cu13 installed",
        )


def runtime_library() -> Path:
    """The DSL's CUDA runtime shim, ``libcute_dsl_runtime.so``, of the chosen flavour."""
    path = dsl_root() / toolchain().flavour / "lib" / "libcute_dsl_runtime.so"
    if not path.is_file():
        raise MissingToolError(
            "the CuTe DSL's runtime library is missing",
            got=str(path),
            fix=f"pip install --force-reinstall {INSTALL_DSL.removeprefix('pip install ')}",
        )
    return path


def c_compiler() -> str | None:
    """Path of the C compiler: ``CC`` if set, else cc, gcc or clang; None if there is none."""
    asked = env.c_compiler()
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, _COMPILERS)), None)


_COMPILERS = ("cc", "gcc", "clang")


def link_shared(
    objects: list[Path],
    libraries: list[Path],
    output: Path,
    search_path: str | None = None,
) -> None:
    """Link position-independent objects to a shared library that needs exactly ``libraries``.

    It finds them where they are now, or with ``search_path`` (a run path, "$ORIGIN" is where the
    library lies) wherever they are then; such a library holds nothing of this machine.

    Raises:
        MissingToolError: no C compiler.
        CompileError: the linker failed; a symbol that no library defines is named.
    """
    compiler = c_compiler()
    if compiler is None:
        raise MissingToolError(
            "there is no C compiler to link a kernel's host function",
            got=f"CC={env.c_compiler()}" if env.c_compiler() else "no cc, gcc or clang on PATH",
            fix=INSTALL_CC,
        )
    # Every symbol is resolved when the library is loaded (-z now), and a missing one is an error
    # here rather than a crash in a launch (-z defs).
    command = [compiler, "-shared", "-nostdlib", "-Wl,-z,now", "-Wl,-z,defs", "-o", str(output)]
    command += [str(path) for path in (*objects, *libraries)]
    if search_path is None:
        command += [f"-Wl,-rpath,{path.parent}" for path in libraries]
    else:
        # What is shipped should be small: no symbols, nor whole pages for each kind of contents.
        command += [f"-Wl,-rpath,{search_path}", "-Wl,--strip-all", "-Wl,--build-id=none"]
        command.append("-Wl,-z,noseparate-code")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(
            "linking a kernel's host function failed",
            got=result.stderr.strip() or f"exit code {result.returncode} of {compiler}",
            fix="if the linker itself is missing: " + INSTALL_CC,
        )


def _version(distribution: str, install: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise MissingToolError(f"{distribution} is not installed", fix=install) from None
