"""``cute-fa doctor``: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

from cute_fa.cli.arguments import add_json
from cute_fa.cli.main import FAILED, OK
from cute_fa.cli.output import count, print_json, size, styled
from cute_fa.cli.progress import Progress
from cute_fa.errors import CuteFAError, MissingToolError

GOOD, NOTE, BAD = "ok", "note", "bad"
_MARKS = {GOOD: ("ok  ", "green"), NOTE: ("note", "yellow"), BAD: ("BAD ", "red")}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, what it is, and how to mend it."""

    name: str
    status: str
    detail: str
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-self-test", action="store_true", help="do not compile and simulate a small kernel"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    findings = []
    checks = [_python, _packages, _dsl, _compiler, _disassembler, _gpu, _cache, _settings]
    for check in checks if args.no_self_test else [*checks, _self_test]:
        for finding in _guarded(check):
            findings.append(finding)
            if not args.json:
                _print(finding)
    if args.json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    return FAILED if any(finding.status == BAD for finding in findings) else OK


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except CuteFAError as error:
        detail = error.what if error.got is None else f"{error.what}: {error.got}"
        yield Finding(check.__name__.strip("_").replace("_", " "), BAD, detail, error.fix)


def _print(finding: Finding) -> None:
    mark, style = _MARKS[finding.status]
    print(f"{styled(mark, style)}  {finding.name.ljust(14)}  {finding.detail}", flush=True)
    if finding.fix:
        print(f"      {'':14}  to mend: {finding.fix}", flush=True)


def _python() -> Iterator[Finding]:
    import cute_fa

    where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    supported = sys.platform == "linux"
    yield Finding(
        "cute-fa",
        GOOD if supported else BAD,
        f"{cute_fa.__version__}, {where}",
        None if supported else "the CuTe DSL needs Linux: use a Linux machine, container or WSL",
    )


def _packages() -> Iterator[Finding]:
    for name, package in (("torch", "torch"), ("numpy", "numpy"), ("tvm-ffi", "apache-tvm-ffi")):
        try:
            yield Finding(name, GOOD, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(name, BAD, f"{package} is not installed", f"pip install {package}")


def _dsl() -> Iterator[Finding]:
    from cute_fa.build.toolchain import INSTALL_DSL, runtime_library, toolchain

    tools = toolchain()
    supported = tools.dsl.split(".")[:2] == ["4", "8"]
    yield Finding(
        "CuTe DSL",
        GOOD if supported else BAD,
        f"{tools.dsl}, flavour {tools.flavour} ({tools.why})",
        None if supported else INSTALL_DSL,
    )
    yield Finding("DSL runtime", GOOD, str(runtime_library()))


def _compiler() -> Iterator[Finding]:
    from cute_fa.build.toolchain import INSTALL_CC, c_compiler

    path = c_compiler()
    if path is None:
        detail = "none: the simulator cannot be built"
        yield Finding("C compiler", BAD, detail, INSTALL_CC)
        return
    yield Finding("C compiler", GOOD, f"{path}: {_first_line([path, '--version'])}")


def _disassembler() -> Iterator[Finding]:
    from cute_fa.asm.tools import find_tool

    try:
        yield Finding("nvdisasm", GOOD, str(find_tool("nvdisasm")))
    except MissingToolError as error:
        detail = "not installed: PTX and the cubin's own figures, but no SASS"
        yield Finding("nvdisasm", NOTE, detail, error.fix)


def _gpu() -> Iterator[Finding]:
    from cute_fa.build.toolchain import cuda_driver_version

    version = cuda_driver_version()
    if version is None:
        yield Finding("GPU", NOTE, "no CUDA driver: everything runs on the simulator")
        return
    devices = _devices()
    if not devices:
        yield Finding("GPU", NOTE, f"a driver for CUDA {version[0]}.{version[1]}, but no GPU")
    for index, name in enumerate(devices):
        detail = f"{name}, driver for CUDA {version[0]}.{version[1]}"
        yield Finding(f"GPU {index}", GOOD, detail)
    if devices and importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            fix = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
            yield Finding("torch CUDA", NOTE, "this torch cannot use the GPU", fix)


def _devices() -> list[str]:
    """ "name (sm_XY)" of each GPU, from the driver itself (CUDA driver API, device management)."""
    driver = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for ordinal in range(count.value):
        name, value = ctypes.create_string_buffer(128), ctypes.c_int(0)
        driver.cuDeviceGetName(name, len(name), ordinal)
        capability = []
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        for attribute in (75, 76):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal)
            capability.append(str(value.value))
        found.append(f"{name.value.decode()} (sm_{''.join(capability)})")
    return found


def _cache() -> Iterator[Finding]:
    from cute_fa import env
    from cute_fa.build.cache import KernelCache

    if not env.cache_enabled():
        yield Finding("cache", NOTE, "off (CUTE_FA_CACHE=0): every process compiles anew")
        return
    cache = KernelCache()
    entries = cache.entries()
    existing = next(path for path in (cache.root, *cache.root.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    total = size(sum(entry.nbytes for entry in entries))
    yield Finding(
        "cache",
        GOOD if writable else BAD,
        f"{cache.root}: {count(len(entries), 'kernel')}, {total}"
        + ("" if writable else "; not writable"),
        None if writable else "set CUTE_FA_CACHE_DIR to a directory of your own",
    )


def _settings() -> Iterator[Finding]:
    from cute_fa import env

    for name, value in env.dsl_settings().items():
        yield Finding(name, NOTE, f"{value!r} changes what the DSL compiles", f"unset {name}")


def _self_test() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from cute_fa.cli.simulate import Settings, run_case
    from cute_fa.problem import AttentionProblem
    from cute_fa.testing import Case, check_attention

    problem = AttentionProblem(1, 64, 64, 2, 1, 64, 64, "bfloat16", causal=True)
    started = time.monotonic()
    with Progress("self-test"):
        result = run_case(Case("self-test", problem), Settings("fa2", "sm_80"))
        report = check_attention(result.out, result.lse, *result.inputs, problem)
    took = f"{time.monotonic() - started:.1f} s"
    good = report.ok and not result.hazards
    detail = f"fa2 forward on sm_80 compiled, simulated and checked in {took}: " + (
        f"max error {report.max_err:.1e}, PyTorch's {report.ref_max_err:.1e}"
        if good
        else f"{len(result.hazards)} hazards; {report}"
    )
    yield Finding("self-test", GOOD if good else BAD, detail)


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not executable"
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return (result.stdout or result.stderr).strip().partition("\n")[0]
