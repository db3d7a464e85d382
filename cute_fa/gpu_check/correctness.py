"""Every kernel on every problem of its grid, against the fp64 reference or the exact answer; and
again and again, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cute_fa.build.bundle import BundleKernel
from cute_fa.build.registry import find
from cute_fa.errors import CuteFAError
from cute_fa.gpu_check.grid import GridCase, grid
from cute_fa.gpu_check.outcome import Deadline, Outcome
from cute_fa.gpu_check.place import OneKernel, Place
from cute_fa.testing.compare import check_attention
from cute_fa.testing.inputs import Inputs


def check_kernels(
    kernels: list[BundleKernel], place: Place, deadline: Deadline, *, tiny: bool = False
) -> Iterator[Outcome]:
    """One outcome per kernel and problem; first every kernel's first problem, then the others, so
    that a lack of time leaves no kernel out."""
    todo = [
        (number, kernel, case)
        for kernel in kernels
        for number, case in enumerate(grid(kernel.variant, tiny=tiny))
    ]
    todo.sort(key=lambda item: item[0])
    for _, kernel, case in deadline.while_time(todo):
        yield check_one(kernel, place, case)


def uncheckable(kernels: list[BundleKernel]) -> Iterator[Outcome]:
    """The kernels that have no problem in the grid, which must not pass for checked."""
    for kernel in kernels:
        if not list(grid(kernel.variant, tiny=True)):
            reason = f"no inputs are made in {kernel.variant.dtype}"
            if kernel.variant.has_block_descales:
                reason += " with descales of blocks"
            yield Outcome("correctness", kernel.label, None, reason)


def check_one(kernel: BundleKernel, place: Place, case: GridCase) -> Outcome:
    """A kernel on one problem."""
    name = f"{kernel.label}: {case.name}"
    inputs = case.inputs()
    try:
        out, lse = OneKernel(kernel).run(place, case.case, inputs)
        place.synchronize()
    except (CuteFAError, RuntimeError) as error:
        return Outcome("correctness", name, False, f"{type(error).__name__}: {error}")
    if case.exact:
        return _exact(name, out, inputs)
    # The reference in fp64 runs where the kernel ran.
    q, k, v = (x.to(out.device) for x in inputs[:3])
    report = check_attention(
        *(out, lse, q, k, v),
        case.case.problem,
        exp2_error=find(kernel.generation, kernel.direction).exp2_error,
    )
    figures = {
        "max_err": report.max_err,
        "torch_max_err": report.ref_max_err,
        "rms_err": report.rms_err,
        "torch_rms_err": report.ref_rms_err,
        "lse_err": report.lse_err,
    }
    return Outcome("correctness", name, report.ok, "" if report.ok else str(report), figures)


def _exact(name: str, out: Tensor, inputs: Inputs) -> Outcome:
    expected = inputs.expected
    assert expected is not None, "an exact case knows its answer"
    wrong = differing(out.cpu(), expected)
    detail = "" if wrong == 0 else f"{wrong} of {out.numel()} elements differ from the exact answer"
    return Outcome("correctness", name, wrong == 0, detail, {"wrong_elements": wrong})


def differing(a: Tensor, b: Tensor) -> int:
    """Elements of which the bits differ; +0 and -0 count as equal, and NaN differs from all."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    return int((a != b).sum())


def check_repeats(
    kernels: list[BundleKernel],
    place: Place,
    deadline: Deadline,
    *,
    times: int = 50,
    tiny: bool = False,
) -> Iterator[Outcome]:
    """Each kernel ``times`` times on its last, largest problem: every bit must be the same."""
    for kernel in deadline.while_time(kernels):
        normal = [case for case in grid(kernel.variant, tiny=tiny) if case.kind == "normal"]
        if normal:
            yield repeat(kernel, place, normal[-1], times)


def repeat(kernel: BundleKernel, place: Place, case: GridCase, times: int) -> Outcome:
    """A kernel on one problem, again and again."""
    name = f"{kernel.label}: {case.name}"
    inputs = Inputs(*(x.to(place.device) for x in case.inputs()[:3]))
    one = OneKernel(kernel)
    try:
        first = [x.clone() for x in one.run(place, case.case, inputs)]
        differences = []
        for _ in range(times - 1):
            again = one.run(place, case.case, inputs)
            differences.append(sum(_bits_differ(a, b) for a, b in zip(first, again, strict=True)))
    except (CuteFAError, RuntimeError) as error:
        return Outcome("repeats", name, False, f"{type(error).__name__}: {error}")
    unlike = sum(count > 0 for count in differences)
    detail = "" if unlike == 0 else f"{unlike} of {times} runs differ from the first"
    return Outcome("repeats", name, unlike == 0, detail, {"runs": times, "unlike": unlike})


def _bits_differ(a: Tensor, b: Tensor) -> int:
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.view(as_bits) != b.view(as_bits)).sum())
