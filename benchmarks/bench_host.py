"""What a call of the public functions costs on the host, with the CUDA driver left out.

    python benchmarks/bench_host.py [--samples N] [--calls N] [--output FILE]

Needs no GPU: see ``cute_fa.bench.host_cost``, which ``cute-fa bench --host`` runs too. Of each kind
of call the microseconds of CPU time: median over samples of many calls, 20th and 80th percentile,
and minimum, which is what other programs on the machine disturb least. The load of the machine is
noted before and after.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environment import environment, write

from cute_fa.bench.host_cost import CALLS, SAMPLES, host_cost


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--calls", type=int, default=CALLS, help="calls of one sample")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    costs = host_cost(samples=options.samples, calls=options.calls)
    results = {
        "environment": environment(),
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "samples": options.samples,
        "calls_per_sample": options.calls,
        "microseconds_of_cpu": {
            name: {
                "median": round(timing.median * 1e6, 2),
                "p20": round(timing.p20 * 1e6, 2),
                "p80": round(timing.p80 * 1e6, 2),
                "minimum": round(timing.minimum * 1e6, 2),
            }
            for name, timing in costs.items()
        },
    }
    write(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
