"""Leave out or change every piece of synchronisation of a kernel, and print what notices.

    python tools/fault_table.py [fa1 fa2 fa3 ...]

Each row is a kind of fault; each fault is tried under up to eight completion policies and seeds of
the simulator, until it shows. Survivors are listed; the rungs' test_faults.py argue for them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch

from cute_fa import flash_attn_func, sim
from cute_fa.problem import AttentionProblem
from cute_fa.testing.fault_survey import Call, survey
from cute_fa.testing.inputs import normal_inputs

# Masked and unmasked blocks, tiles that end at different blocks, and a negative scale, which some
# kernels fold into Q in shared memory.
PROBLEM = AttentionProblem(1, 200, 600, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2)
ARCHS = {"fa1": "sm_80", "fa2": "sm_80", "fa3": "sm_90a", "fa4": "sm_100a"}


def call(generation: str) -> Call:
    inputs = normal_inputs(PROBLEM)

    def run(device: sim.Device) -> Sequence[torch.Tensor]:
        with device:
            return flash_attn_func(
                inputs.q,
                inputs.k,
                inputs.v,
                softmax_scale=PROBLEM.softmax_scale,
                causal=PROBLEM.causal,
                return_lse=True,
                generation=generation,
            )

    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generations", nargs="*", default=["fa1", "fa2", "fa3"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for generation in options.generations:
        arch = ARCHS[generation]
        run = call(generation)
        run(sim.Device(arch))  # the sound kernel is compiled and kept; the faulty ones are not
        os.environ["CUTE_FA_CACHE"] = "0"
        start = time.perf_counter()
        found = survey(arch, [run])
        del os.environ["CUTE_FA_CACHE"]
        seconds = time.perf_counter() - start
        print(f"{generation} on {arch}: {found.caught} of {len(found.verdicts)} faults caught")
        print(f"{seconds:.0f} s\n{found.table()}")
        for fault in found.survivors:
            print(f"  survived: {fault}")
        for fault in found.unreached:
            print(f"  not executed: {fault}")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
