"""What each rung's forward executes for every 128 x 128 tile of scores, counted and modelled.

    python benchmarks/bench_counts.py [--causal] [--output FILE]

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

import torch
from environment import environment

from cute_fa.bench.counts import count, table
from cute_fa.bench.model import model_forward
from cute_fa.build import can_run
from cute_fa.problem import AttentionProblem
from cute_fa.target import get_target

RUNGS = (("fa1", "sm_80"), ("fa2", "sm_80"), ("fa3", "sm_90a"), ("fa4", "sm_100a"))


def problem(head_dim: int, *, causal: bool, heads: int = 2) -> AttentionProblem:
    """Long enough that the first and last blocks weigh little; whole tiles for every rung."""
    rows, keys = (1408, 1408) if causal else (256, 1408)
    return AttentionProblem(1, rows, keys, heads, heads, head_dim, head_dim, "bfloat16", causal)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true", help="a causal mask over a square problem")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    p = problem(options.head_dim, causal=options.causal)
    rows = []
    for generation, arch in RUNGS:
        support = can_run(p, get_target(arch), generation)
        if not support.ok:
            print(f"{generation} on {arch}: {support.reason}", file=sys.stderr)
            continue
        rows.append(count(model_forward(p, generation, arch)))
    print(table(rows))
    if options.output:
        results = {"environment": environment(), "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
