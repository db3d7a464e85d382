"""Leave out or change every piece of synchronisation of a kernel, and print what notices.

    python tools/fault_table.py [fa1 fa2 fa3 fa4 ...]

These are the surveys that the rungs' test_faults.py assert on (tests/surveys.py), with the same
problems, plans and hazard rules. Each row is a kind of fault; each fault is tried under up to eight
completion policies and seeds of the simulator, until it shows. Survivors are listed with the reason
why they are harmless.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.surveys import SURVEYS, KernelSurvey


def print_table(name: str, kernel: KernelSurvey) -> bool:
    """Run one survey; False if a fault survives that nobody has argued for."""
    os.environ.pop("CUTE_FA_CACHE", None)
    _ = kernel.program  # the sound kernel is compiled and kept; the faulty ones are not
    os.environ["CUTE_FA_CACHE"] = "0"
    start = time.perf_counter()
    found = kernel.run()
    seconds = time.perf_counter() - start
    rules = "strict rules too" if kernel.has_strict_rules else "usual rules"
    print(f"{name} on {kernel.target.arch}, {rules}, {seconds:.0f} s:", end=" ")
    print(f"{found.caught} of {len(found.verdicts)} faults caught\n{found.table()}")
    is_explained = not found.unreached
    for fault in found.survivors:
        why = next((r.why for r in kernel.redundant if r.covers(fault)), None)
        print(f"  survived: {fault}\n    {why or 'nobody has argued for it'}")
        is_explained &= why is not None
    for fault in found.unreached:
        print(f"  not executed: {fault}")
    print(flush=True)
    return is_explained


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    generations = sorted({kernel.generation for kernel in SURVEYS.values()})
    parser.add_argument("generations", nargs="*", choices=[*generations, []], default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.generations or generations
    is_explained = [
        print_table(name, kernel) for name, kernel in SURVEYS.items() if kernel.generation in chosen
    ]
    return 0 if all(is_explained) else 1


if __name__ == "__main__":
    sys.exit(main())
