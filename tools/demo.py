"""Compile every rung for its architecture, run it on real inputs, check it, print one table.

Each row runs on the GPU if there is one that the architecture fits, else in the simulator. Errors
are against the exact fp64 reference, beside those that PyTorch makes at the same precision. Bytes
and exponentials are counted by the simulator as it runs the compiled PTX. Exits 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import cute_fa
from cute_fa import sim
from cute_fa.asm import sass
from cute_fa.build import Compiled
from cute_fa.errors import MissingToolError
from cute_fa.problem import AttentionProblem
from cute_fa.ptx import parse
from cute_fa.target import get_target
from cute_fa.testing.compare import check_attention
from cute_fa.testing.inputs import normal_inputs

BASE = AttentionProblem(
    batch=1,
    seqlen_q=512,
    seqlen_k=512,
    heads_q=2,
    heads_k=2,
    head_dim=64,
    head_dim_v=64,
    dtype="bfloat16",
)
RUNS: tuple[tuple[str, str, str, AttentionProblem], ...] = (
    ("full", "fa1", "sm_80", BASE),
    ("full", "fa2", "sm_80", BASE),
    ("causal", "fa1", "sm_80", replace(BASE, causal=True)),
    ("causal", "fa2", "sm_80", replace(BASE, causal=True)),
    (
        "causal D128 GQA",
        "fa2",
        "sm_80",
        replace(BASE, causal=True, head_dim=128, head_dim_v=128, heads_q=4, heads_k=1),
    ),
    ("causal D128", "fa3", "sm_90a", replace(BASE, causal=True, head_dim=128, head_dim_v=128)),
    ("window D128", "fa2", "sm_120a", replace(BASE, head_dim=128, head_dim_v=128, window_left=100)),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    cells: tuple[str, ...]
    ok: bool
    why: str = ""


HEADER = (
    "problem",
    "rung",
    "arch",
    "PTX",
    "SASS",
    "regs",
    "spill",
    "smem",
    "ran on",
    "max err",
    "(torch)",
    "RMS err",
    "(torch)",
    "HBM read",
    "written",
    "ideal",
    "unfused",
    "exps",
    "hazards",
)


def kib(count: int) -> str:
    return f"{count / 1024:.0f}K"


def sass_instructions(compiled: Compiled) -> str:
    """Number of SASS instructions, or a dash without nvdisasm (extra ``inspect``)."""
    try:
        return str(len(sass(compiled.cubin).code))
    except MissingToolError:
        return "-"


def gpu_fits(arch: str) -> bool:
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == get_target(arch).compute_capability


def run_row(title: str, generation: str, arch: str, problem: AttentionProblem) -> Row:
    q, k, v, _ = normal_inputs(problem, seed=0)
    compiled = cute_fa.compile(
        generation,
        "fwd",
        arch=arch,
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        causal=problem.causal,
        window_size=(problem.window_left, problem.window_right),
    )
    arguments = {
        "causal": problem.causal,
        "window_size": (problem.window_left, problem.window_right),
        "return_lse": True,
        "generation": generation,
    }
    on_gpu = gpu_fits(arch)
    if on_gpu:
        tensors = [t.cuda() for t in (q, k, v)]
        out, lse = (t.cpu() for t in cute_fa.flash_attn_func(*tensors, **arguments))
        counted = ("-", "-", "-", "-")
        hazards: Sequence[object] = ()
    else:
        with sim.Device(arch, strict=False) as device:
            out, lse = cute_fa.flash_attn_func(q, k, v, **arguments)
        launch = device.launches[-1]
        hazards = launch.hazards
        counters = launch.counters
        counted = (
            kib(counters.global_bytes_read),
            kib(counters.global_bytes_written),
            str(counters.exponentials),
            str(len(hazards)),
        )
    report = check_attention(out, lse, q, k, v, problem)
    resources = compiled.resources
    kernel = next(iter(parse(compiled.ptx).kernels.values()))
    cells = (
        title,
        generation,
        arch,
        str(len(kernel.body)),
        sass_instructions(compiled),
        str(resources.registers),
        str(resources.spill_store_bytes + resources.spill_load_bytes),
        kib(resources.dynamic_smem_bytes),
        "GPU" if on_gpu else "simulator",
        f"{report.max_err:.1e}",
        f"{report.ref_max_err:.1e}",
        f"{report.rms_err:.1e}",
        f"{report.ref_rms_err:.1e}",
        counted[0],
        counted[1],
        kib(problem.ideal_hbm_bytes()),
        kib(problem.standard_hbm_bytes()),
        counted[2],
        counted[3],
    )
    return Row(cells, report.ok and not hazards, "" if report.ok else str(report))


def render(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows: list[Row] = []
    for number, (title, generation, arch, problem) in enumerate(RUNS, 1):
        print(f"[{number}/{len(RUNS)}] {generation} {arch} {title} …", file=sys.stderr, flush=True)
        rows.append(run_row(title, generation, arch, problem))
    print(render([HEADER, *(row.cells for row in rows)]))
    for row in rows:
        if not row.ok:
            print(f"MISMATCH {' '.join(row.cells[:3])}\n{row.why}", file=sys.stderr)
    good = sum(row.ok for row in rows)
    print(f"{good} of {len(rows)} runs agree with the fp64 reference, without hazards.")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
