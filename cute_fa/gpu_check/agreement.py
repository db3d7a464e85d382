"""What the simulator computed when the bundle was made, and whether the GPU computes the same.

Each recorded problem is kept with a checksum of its inputs, which are made again from their seed.
Where sums are exact (one weight is 1, all others 0) the outputs must be equal bit by bit; on
normal inputs the GPU's own order of summation and its approximations of exp2 show, within a few
units in the last place. Of FP8 kernels only exact sums are recorded: where P is rounded to three
bits, an exponential that differs in its last bit may show in the first.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cute_fa.build.bundle import Bundle, BundleKernel
from cute_fa.build.registry import find
from cute_fa.gpu_check.correctness import Found, differing
from cute_fa.gpu_check.grid import GridCase, GridInputs, grid
from cute_fa.gpu_check.outcome import Check, title
from cute_fa.gpu_check.place import OneKernel, Place
from cute_fa.problem import DTYPE_BYTES
from cute_fa.testing.compare import LSE_ROUNDING

FOLDER = "agreement"
PER_RUNG = {2: 3, 1: 2}
"""Kernels of one rung and architecture that are simulated, by the bytes of an input element."""
KINDS = {2: ("normal", "index"), 1: ("index",)}
MAX_HEAD_DIM = 128
ULPS = 4.0
"""By how many units in the last place, at its row's largest value, an output may differ."""


def record(
    folder: Path, bundle: Bundle, *, progress: Callable[[int, str], None] | None = None
) -> dict[str, Any]:
    """Simulate small problems on some kernels of every rung and architecture; adds files to the
    bundle's folder and returns what its manifest says about them.

    Raises:
        CuteFAError: a kernel cannot be simulated, or a hazard was found.
    """
    (folder / FOLDER).mkdir()
    entries = []
    for number, (kernel, case) in enumerate(list(chosen(bundle))):
        if progress is not None:
            progress(number, f"{kernel.label}: {case.name}")
        inputs = case.inputs()
        out, lse = OneKernel(kernel).run(Place("cpu", kernel.target), case.case, inputs)
        file = f"{FOLDER}/{kernel.name}-{case.kind}.xz"
        (folder / file).write_bytes(lzma.compress(_bytes(out) + _bytes(lse)))
        entries.append(
            {
                "kernel": kernel.name,
                "kind": case.kind,
                "problem": case.case.name,
                "inputs_sha256": _digest(inputs),
                "file": file,
            }
        )
    return {"agreement": entries}


def chosen(bundle: Bundle) -> Iterator[tuple[BundleKernel, GridCase]]:
    """The kernels that are simulated, on their tiny problem: the first few of each rung and
    architecture, of different variants."""
    taken: Counter[tuple[str, str, int]] = Counter()
    for kernel in sorted(bundle.kernels, key=lambda kernel: kernel.variant.head_dim):
        element_bytes = DTYPE_BYTES[kernel.variant.dtype]
        kind = kernel.generation, kernel.arch, element_bytes
        suits = kernel.role == "default" and kernel.variant.head_dim <= MAX_HEAD_DIM
        if not suits or taken[kind] >= PER_RUNG[element_bytes]:
            continue
        taken[kind] += 1
        for case in grid(kernel.variant, tiny=True):
            if case.kind in KINDS[element_bytes]:
                yield kernel, case


def checks(bundle: Bundle, place: Place) -> Iterator[Check]:
    """Run the recorded problems at a place and compare with what the simulator computed."""
    for entry in bundle.document.get("agreement", []):
        for kernel in bundle.kernels:
            if kernel.name == entry["kernel"] and place.runs(kernel):
                name = f"{title(kernel)}: {entry['problem']}, {entry['kind']}"
                make = functools.partial(compare_one, bundle, kernel, entry, place)
                yield Check("agreement", name, kernel, make)


def compare_one(
    bundle: Bundle, kernel: BundleKernel, entry: Mapping[str, Any], place: Place
) -> Found:
    """One recorded problem."""
    case = next(
        (case for case in grid(kernel.variant, tiny=True) if case.kind == entry["kind"]), None
    )
    inputs = None if case is None else case.inputs()
    if case is None or inputs is None or _digest(inputs) != entry["inputs_sha256"]:
        return None, f"torch {torch.__version__} makes other inputs from the seed", {}
    out, lse = (x.cpu() for x in OneKernel(kernel).run(place, case.case, inputs))
    data = lzma.decompress((bundle.folder / entry["file"]).read_bytes())
    simulated_out, data = _take(data, out)
    simulated_lse, _ = _take(data, lse)
    unlike = differing(out, simulated_out)
    ulps = _ulps(out, simulated_out)
    lse_error = _lse_error(lse, simulated_lse)
    lse_allowed = LSE_ROUNDING + find(kernel.generation, kernel.direction).exp2_error
    ok = (unlike == 0 if case.exact else ulps <= ULPS) and lse_error <= lse_allowed
    wanted = "equal bits" if case.exact else f"at most {ULPS:g} ulps"
    detail = f"{unlike} of {out.numel()} elements differ, by {ulps:.2f} ulps at most; LSE by "
    detail += f"{lse_error:.1e} (allowed {lse_allowed:.1e}); expected {wanted}"
    return ok, "" if ok else detail, {"unlike": unlike, "ulps": ulps, "lse_error": lse_error}


def _bytes(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).flatten().tolist())


def _take(data: bytes, like: Tensor) -> tuple[Tensor, bytes]:
    """A tensor as ``like`` from the front of ``data``, and what follows it."""
    size = like.numel() * like.element_size()
    found = torch.frombuffer(bytearray(data[:size]), dtype=like.dtype).reshape(like.shape)
    return found, data[size:]


def _digest(inputs: GridInputs) -> str:
    total = hashlib.sha256()
    for x in (*inputs[:3], *inputs.descales):
        if x is not None:
            total.update(_bytes(x))
    return total.hexdigest()


def _ulps(a: Tensor, b: Tensor) -> float:
    """Largest difference in units in the last place of the row's largest value."""
    if not a.numel():
        return 0.0
    row = b.double().abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    error = (a.double() - b.double()).abs() / (row * torch.finfo(a.dtype).eps)
    return float(error.nan_to_num(nan=float("inf")).max())


def _lse_error(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to max(1, |LSE|); where one is infinite, so must be the other."""
    same = a == b
    error = (a.double() - b.double()).abs() / b.double().abs().clamp_min(1.0)
    worst = error.masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    return float(worst.max()) if worst.numel() else 0.0
