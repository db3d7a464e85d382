"""Every kernel on every problem of its grid, against the fp64 reference or the exact answer; and
again and again, bit by bit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cute_fa.build.bundle import BundleKernel
from cute_fa.build.registry import find
from cute_fa.gpu_check import streams
from cute_fa.gpu_check.grid import GridCase, GridInputs, grid
from cute_fa.gpu_check.outcome import Check, title
from cute_fa.gpu_check.place import OneKernel, Place
from cute_fa.testing.compare import check_attention

Found = tuple[bool | None, str, dict[str, Any]]


def checks(kernels: Sequence[BundleKernel], place: Place, *, tiny: bool = False) -> list[Check]:
    """One check per kernel and problem; first every kernel's first problem, then the others, so
    that a lack of time leaves no kernel out."""
    found = [
        (
            number,
            Check(
                "correctness",
                f"{title(kernel)}: {case.name}",
                kernel,
                functools.partial(check_one, kernel, place, case),
            ),
        )
        for kernel in kernels
        for number, case in enumerate(grid(kernel.variant, tiny=tiny))
    ]
    return [check for _, check in sorted(found, key=lambda each: each[0])]


def check_one(kernel: BundleKernel, place: Place, case: GridCase) -> Found:
    """A kernel on one problem."""
    inputs = case.inputs()
    out, lse = OneKernel(kernel).run(place, case.case, inputs)
    place.synchronize()
    if case.exact:
        return _exact(out, inputs)
    # The reference in fp64 runs where the kernel ran.
    q, k, v, (of_q, of_k, of_v), _ = inputs.to(place.device)
    descales = None if of_q is None or of_k is None or of_v is None else (of_q, of_k, of_v)
    report = check_attention(
        *(out, lse, q, k, v),
        case.case.problem,
        descales=descales,
        exp2_error=find(kernel.generation, kernel.direction).exp2_error,
    )
    figures = {
        "max_err": report.max_err,
        "torch_max_err": report.ref_max_err,
        "rms_err": report.rms_err,
        "torch_rms_err": report.ref_rms_err,
        "lse_err": report.lse_err,
    }
    return report.ok, "" if report.ok else str(report), figures


def _exact(out: Tensor, inputs: GridInputs) -> Found:
    assert inputs.expected is not None, "an exact case knows its answer"
    wrong = differing(out.cpu(), inputs.expected)
    detail = "" if wrong == 0 else f"{wrong} of {out.numel()} elements differ from the exact answer"
    return wrong == 0, detail, {"wrong_elements": wrong}


def differing(a: Tensor, b: Tensor) -> int:
    """Elements of which the bits differ; +0 and -0 count as equal, and NaN differs from all."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    return int((a != b).sum())


def repeats(
    kernels: Sequence[BundleKernel], place: Place, *, times: int = 50, tiny: bool = False
) -> Iterator[Check]:
    """Each kernel ``times`` times on its largest problem: every bit must be the same."""
    for kernel in kernels:
        case = [case for case in grid(kernel.variant, tiny=tiny) if not case.has_views][-1]
        make = functools.partial(repeat, kernel, place, case, times)
        yield Check("repeats", f"{title(kernel)}: {case.name}", kernel, make)


def repeat(kernel: BundleKernel, place: Place, case: GridCase, times: int) -> Found:
    """A kernel on one problem, again and again; on a GPU also in another stream and in a graph."""
    inputs = case.inputs().to(place.device)
    one = OneKernel(kernel)
    call = one.bind(place, case.case, inputs)
    first = [x.clone() for x in call()]
    unlike = sum(_unlike(first, call()) for _ in range(times - 1))
    complaints = [f"{unlike} of {times} runs differ from the first"] if unlike else []
    if place.is_gpu:

        def bind(q: Tensor, k: Tensor, v: Tensor) -> streams.Call:
            return one.bind(place, case.case, inputs._replace(q=q, k=k, v=v))

        if _unlike(first, streams.in_another_stream(bind, inputs[:3])):
            complaints.append("in another stream than torch's first one the result differs")
        if _unlike(first, streams.in_a_graph(call)):
            complaints.append("replayed as a CUDA graph the result differs")
    return not complaints, "; ".join(complaints), {"runs": times, "unlike": unlike}


def _unlike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return any(_bits_differ(a, b) for a, b in zip(some, others, strict=True))


def _bits_differ(a: Tensor, b: Tensor) -> int:
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.view(as_bits) != b.view(as_bits)).sum())
