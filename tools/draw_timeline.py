"""Draw what the warps and engines of one CTA do beside each other, as modelled.

    python tools/draw_timeline.py fa3 --output cute_fa/fa3/timeline.svg
    python tools/draw_timeline.py fa3 --perfetto fa3.json

A forward is simulated with a trace; the trace is replayed with the documented constants of a GPU
(cute_fa/sim/timeline/machines.py). It is a model, not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cute_fa.bench.model import ModelledForward, model_forward
from cute_fa.problem import AttentionProblem
from cute_fa.sim.timeline import chrome_trace

# Long enough for a steady state between the first blocks and the last.
PROBLEMS = {
    "fa2": (AttentionProblem(1, 128, 1024, 2, 2, 128, 128, "bfloat16"), "sm_80"),
    "fa3": (AttentionProblem(1, 128, 1408, 1, 1, 128, 128, "bfloat16"), "sm_90a"),
    "fa4": (AttentionProblem(1, 256, 1408, 1, 1, 128, 128, "bfloat16"), "sm_100a"),
}


def window_of(forward: ModelledForward, share: tuple[float, float]) -> tuple[float, float]:
    """A part of the time, from its shares of the whole."""
    begin, end = share
    return begin * forward.timeline.cycles, end * forward.timeline.cycles


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generation", choices=PROBLEMS)
    parser.add_argument("--output", type=Path, help="write the picture there (SVG)")
    parser.add_argument("--perfetto", type=Path, help="write all intervals there (Chrome trace)")
    parser.add_argument(
        "--show",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="the part of the time to draw, from 0 to 1",
    )
    options = parser.parse_args()
    forward = model_forward(*_problem(options.generation))
    timeline = forward.timeline
    print(f"{forward.machine} (modelled): {timeline.cycles:.0f} cycles for CTAs {forward.ctas}")
    for unit, share in sorted(timeline.units.items(), key=lambda item: -item[1]):
        print(f"  {unit:<14} {100 * share:5.1f} % in use")
    for role, shares in timeline.roles(forward.roles).items():
        text = ", ".join(f"{what} {100 * x:.0f} %" for what, x in shares.items() if x >= 0.005)
        print(f"  {role:<14} {text}")
    if options.output:
        options.output.write_text(forward.picture(window_of(forward, tuple(options.show))))
    if options.perfetto:
        options.perfetto.write_text(chrome_trace(timeline.intervals, forward.roles))
    return 0


def _problem(generation: str) -> tuple[AttentionProblem, str, str]:
    problem, arch = PROBLEMS[generation]
    return problem, generation, arch


if __name__ == "__main__":
    sys.exit(main())
