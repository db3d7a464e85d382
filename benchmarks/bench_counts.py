"""What each rung's forward executes for every 128 x 128 tile of scores, counted and modelled.

    python benchmarks/bench_counts.py [--head-dim D] [--head-dim-v DV] [--dtype DTYPE] [--causal]
                                      [--usual] [--output FILE]

Counted by the simulator (exact, PTX): warp-instructions by role and class, exponentials and
multiply-adds per score, bytes through global, shared and tensor memory, FLOP. From the cubin:
registers and spills. Modelled, by replaying a trace with the documented constants of
cute_fa/sim/timeline/machines.py: cycles per tile and how busy each unit is; beside it the roofline
of one tile, which is what the same constants say of a perfect overlap. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from environment import environment

from cute_fa.bench.counts import count, table
from cute_fa.bench.model import model_forward
from cute_fa.build import can_run
from cute_fa.build.compile import dtype_name
from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target

RUNGS = (("fa1", "sm_80"), ("fa2", "sm_80"), ("fa3", "sm_90a"), ("fa4", "sm_100a"))

# D, Dv, dtype, causal.
USUAL = (
    (128, 128, "bfloat16", False),
    (128, 128, "bfloat16", True),
    (64, 64, "bfloat16", False),
    (192, 128, "bfloat16", False),
    (256, 256, "bfloat16", False),
    (128, 128, "float8_e4m3fn", False),
)


def problem(head_dim: int, head_dim_v: int, dtype: str, causal: bool) -> AttentionProblem:
    """Long enough that the first and last blocks weigh little; whole tiles for every rung."""
    rows, keys, heads = (1408 if causal else 256), 1408, 2
    return AttentionProblem(1, rows, keys, heads, heads, head_dim, head_dim_v, dtype, causal)


def rows_of(p: AttentionProblem) -> list[dict[str, Any]]:
    """One row for each rung that serves the problem."""
    rows = []
    for generation, arch in RUNGS:
        support = can_run(p, get_target(arch), generation)
        if support.ok:
            rows.append(count(model_forward(p, generation, arch)))
        else:
            print(f"{generation} on {arch}: {support.reason}", file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, help="of Q, K and V; default 128")
    parser.add_argument("--head-dim-v", type=int, help="of V, if it differs")
    parser.add_argument("--dtype", help="bfloat16 (default), float16, fp8")
    parser.add_argument("--causal", action="store_true", help="a causal mask over a square problem")
    parser.add_argument("--usual", action="store_true", help="the usual six instead of one")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    one = (options.head_dim, options.head_dim_v, options.dtype, options.causal)
    if options.usual and any(one):
        parser.error("--usual has problems of its own: leave out the arguments of one")
    head_dim = options.head_dim or 128
    dtype = dtype_name(options.dtype or "bfloat16")
    asked = ((head_dim, options.head_dim_v or head_dim, dtype, options.causal),)
    rows = []
    for description in USUAL if options.usual else asked:
        p = problem(*description)
        found = rows_of(p)
        print(p, table(found), sep="\n\n", end="\n\n")
        rows += found
    if options.output:
        results = {"environment": environment(), "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
