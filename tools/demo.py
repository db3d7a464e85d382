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
from cute_fa.build.compile import Request, compile_request
from cute_fa.build.registry import find
from cute_fa.errors import MissingToolError
from cute_fa.ops.sources import packed_group
from cute_fa.problem import AttentionProblem
from cute_fa.ptx import parse
from cute_fa.target import get_target
from cute_fa.testing.cases import call_arguments
from cute_fa.testing.compare import check_attention
from cute_fa.testing.inputs import normal_inputs
from cute_fa.varlen import Packing, VarlenProblem

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
WIDE = replace(BASE, causal=True, head_dim=128, head_dim_v=128)
LENGTHS = (300, 0, 77, 512)
PACKED = VarlenProblem.of(
    replace(WIDE, batch=len(LENGTHS), heads_q=4, heads_k=1), Packing.of_lengths(LENGTHS, LENGTHS)
)
RUNS: tuple[tuple[str, str, str, AttentionProblem | VarlenProblem], ...] = (
    ("full", "fa1", "sm_80", BASE),
    ("full", "fa2", "sm_80", BASE),
    ("causal", "fa1", "sm_80", replace(BASE, causal=True)),
    ("causal", "fa2", "sm_80", replace(BASE, causal=True)),
    ("causal D128", "fa2", "sm_80", WIDE),
    ("causal D128", "fa3", "sm_90a", WIDE),
    ("causal D128", "fa4", "sm_100a", WIDE),
    ("packed GQA", "fa2", "sm_80", PACKED),
    ("packed GQA", "fa3", "sm_90a", PACKED),
    ("packed GQA", "fa4", "sm_100a", PACKED),
    ("window D128", "fa2", "sm_120a", replace(WIDE, causal=False, window_left=100)),
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


def run_row(
    title: str, generation: str, arch: str, problem: AttentionProblem | VarlenProblem
) -> Row:
    q, k, v, _ = normal_inputs(problem, seed=0)
    arguments = call_arguments(problem)
    is_packed = isinstance(problem, VarlenProblem)
    function = cute_fa.flash_attn_varlen_func if is_packed else cute_fa.flash_attn_func
    arguments |= {"return_lse": True, "generation": generation}
    target = get_target(arch)
    group = packed_group(problem, target, generation, None)
    variant = replace(problem.variant, packed_group=group)
    compiled = compile_request(Request(find(generation), variant, target))
    on_gpu = gpu_fits(arch)
    if on_gpu:
        tensors = [t.cuda() for t in (q, k, v)]
        arguments = {n: x.cuda() if torch.is_tensor(x) else x for n, x in arguments.items()}
        out, lse = (t.cpu() for t in function(*tensors, **arguments))
        read = written = exponentials = found = "-"
        hazards: Sequence[object] = ()
    else:
        with sim.Device(arch, strict=False) as device:
            out, lse = function(q, k, v, **arguments)
        launch = device.launches[-1]
        hazards = launch.hazards
        counters = launch.counters
        read, written = kib(counters.global_bytes_read), kib(counters.global_bytes_written)
        exponentials, found = str(counters.exponentials), str(len(hazards))
    report = check_attention(out, lse, q, k, v, problem, exp2_error=find(generation).exp2_error)
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
        read,
        written,
        kib(problem.ideal_hbm_bytes()),
        kib(problem.standard_hbm_bytes()),
        exponentials,
        found,
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
