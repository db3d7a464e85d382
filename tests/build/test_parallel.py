"""compile_many(): worker processes, in order, with failures kept apart."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cute_fa.build import KernelCache, KernelEntry, compile_many
from cute_fa.build.compile import make_request
from cute_fa.build.parallel import from_json, to_json
from cute_fa.errors import CompileError, CuteFAError, InvalidArgumentError, InvalidTypeError


def spec(arch: str = "sm_80", **changes: Any) -> dict[str, Any]:
    return {"generation": "tiny", "arch": arch, "dtype": "half", "head_dim": 64, **changes}


ARCHS = ("sm_80", "sm_90a", "sm_100a")


def test_many_architectures_by_processes(
    tiny: KernelEntry, cache: KernelCache, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    seen: list[tuple[int, int, str]] = []
    specs = [spec(arch, log=str(log)) for arch in ARCHS]
    compiled = compile_many(specs, jobs=2, progress=lambda *report: seen.append(report))
    assert [kernel.arch for kernel in compiled] == list(ARCHS)
    assert all(f".target {kernel.arch}\n" in kernel.ptx for kernel in compiled)
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert {label for _, _, label in seen} == {kernel.label for kernel in compiled}
    lines = [line.split() for line in log.read_text().splitlines()]
    processes = {int(process) for process, _ in lines}
    assert len(processes) == 2 and os.getpid() not in processes
    assert {torch for _, torch in lines} == {"False"}  # a compile does not need it

    # The second time everything is on disk, and no process starts.
    again = compile_many(specs, jobs=2)
    assert [kernel.key for kernel in again] == [kernel.key for kernel in compiled]
    assert len(log.read_text().splitlines()) == 3


def test_a_crash_and_an_exception_cost_one_kernel_each(tiny: KernelEntry) -> None:
    specs = [
        spec(fault="crash"),
        spec("sm_89"),
        spec(fault="raise"),
        spec("sm_90"),
        spec("sm_120a"),
    ]
    crash, first, failure, second, third = compile_many(specs, jobs=2, return_errors=True)
    assert isinstance(crash, CompileError) and "died" in str(crash) and "-9" in str(crash)
    assert isinstance(failure, CompileError) and "the kernel is broken" in str(failure)
    for result, arch in ((first, "sm_89"), (second, "sm_90"), (third, "sm_120a")):
        assert not isinstance(result, CuteFAError) and result.arch == arch


def test_the_first_failure_is_raised_after_the_others_are_done(
    tiny: KernelEntry, cache: KernelCache
) -> None:
    with pytest.raises(CompileError, match="the kernel is broken"):
        compile_many([spec(fault="raise"), spec()], jobs=1)
    assert len(cache.entries()) == 1


def test_nothing_to_do(cache: KernelCache) -> None:
    assert compile_many([]) == []
    assert not cache.root.exists()


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True])
def test_bad_job_counts(tiny: KernelEntry, jobs: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="jobs is not usable"):
        compile_many([spec()], jobs=jobs)


def test_a_bad_spec_is_refused_before_anything_compiles(
    tiny: KernelEntry, cache: KernelCache
) -> None:
    for bad in (spec(head_dim=100), spec(use_cache=False)):
        with pytest.raises(InvalidArgumentError):
            compile_many([spec(), bad])
    assert not cache.root.exists()


def test_requests_survive_the_trip_to_a_worker(tiny: KernelEntry) -> None:
    request = make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64, factor=0.1)
    copy = from_json(to_json(request))
    assert copy == request and copy.key == request.key


def test_what_cannot_travel_is_said(tiny: KernelEntry) -> None:
    """A field of a kind that JSON has not, though the kernel's config may take it."""
    request = make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64)
    assert to_json(request)["overrides"] == {}
    odd = SimpleNamespace(**{**vars(request), "overrides": {"log": b"bytes"}, "key": request.key})
    with pytest.raises(InvalidTypeError, match=r"cannot be sent(.|\n)*jobs=1"):
        to_json(odd)  # type: ignore[arg-type]
