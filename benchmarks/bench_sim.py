"""How fast the simulator, the compiler and the caches are: ratios and counts with their seconds.

    python benchmarks/bench_sim.py [--repeat N] [--output FILE]

Every timing is a median over repeats in one process, after one unmeasured run that compiles the
kernel and generates its code. Nothing here is a test: machines differ; quote the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment, write

import cute_fa
from cute_fa import sim
from cute_fa.problem import AttentionProblem
from cute_fa.ptx import parse
from cute_fa.sim.execute import execute
from cute_fa.testing.inputs import normal_inputs

BASE = AttentionProblem(1, 512, 512, 1, 1, 128, 128, "bfloat16", causal=True)
LARGE = AttentionProblem(2, 1024, 1024, 8, 8, 64, 64, "bfloat16", causal=True)


def median_seconds(action: Callable[[], Any], repeat: int) -> dict[str, float]:
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        samples.append(time.perf_counter() - start)
    return {"median_s": statistics.median(samples), "min_s": min(samples), "max_s": max(samples)}


def simulate(problem: AttentionProblem, generation: str, *, checks: bool, workers: int) -> Any:
    """One forward on sm_80; returns its launch record."""
    q, k, v, _ = normal_inputs(problem, seed=0)
    with sim.Device("sm_80", checks=checks, workers=workers) as device:
        cute_fa.flash_attn_func(q, k, v, causal=problem.causal, generation=generation)
    return device.launches[-1]


def bench_launches(repeat: int) -> list[dict[str, Any]]:
    rows = []
    for generation in ("fa1", "fa2"):
        for checks in (False, True):
            launches = []
            simulate(BASE, generation, checks=checks, workers=1)
            for _ in range(repeat):
                launches.append(simulate(BASE, generation, checks=checks, workers=1))
            seconds = statistics.median(launch.seconds for launch in launches)
            instructions = launches[-1].counters.warp_instructions
            rows.append(
                {
                    "what": f"{generation} forward B1 H1 S512 D128 causal, one process",
                    "checks": checks,
                    "median_s": seconds,
                    "warp_instructions": instructions,
                    "warp_instructions_per_s": instructions / seconds,
                }
            )
    return rows


HOT_LOOPS, HOT_INSTRUCTIONS, HOT_CTAS = 200, 200, 16


def hot_block() -> str:
    """PTX of a kernel: one loop around a straight line of f32 multiplies, adds and maxima."""
    line = (
        "mul.f32 %f{d}, %f{a}, %f{b};",
        "add.f32 %f{d}, %f{a}, %f{b};",
        "max.f32 %f{d}, %f{a}, %f{b};",
    )
    body = "\n".join(
        line[i % 3].format(d=i % 8, a=(i + 3) % 8, b=(i + 5) % 8) for i in range(HOT_INSTRUCTIONS)
    )
    start = "\n".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(8))
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry hot(.param .u64 out) {{
.reg .pred %p<2>; .reg .b32 %r<4>; .reg .f32 %f<8>; .reg .b64 %rd<2>;
{start}
mov.b32 %r1, 0;
LOOP:
{body}
add.s32 %r1, %r1, 1;
setp.lt.s32 %p1, %r1, {HOT_LOOPS};
@%p1 bra LOOP;
ld.param.b64 %rd1, [out];
st.global.b32 [%rd1], %f1;
ret;
}}
"""


def bench_hot_block(repeat: int) -> dict[str, Any]:
    """Straight-line code, with several CTAs of 128 threads resident."""
    module = parse(hot_block())
    out = np.zeros(4, np.uint8)
    memory = sim.GlobalMemory()
    region = memory.register(out, name="out")
    config = sim.LaunchConfig(
        "hot", (HOT_CTAS, 1, 1), (128, 1, 1), params=region.base.to_bytes(8, "little")
    )
    launches = [
        execute(module, config, memory, sim.SimOptions(checks=False)) for _ in range(repeat + 1)
    ]
    seconds = statistics.median(launch.seconds for launch in launches[1:])
    instructions = launches[-1].counters.warp_instructions
    return {
        "what": f"{HOT_INSTRUCTIONS} f32 instructions in a loop, {HOT_CTAS} CTAs of 128 threads",
        "median_s": seconds,
        "warp_instructions": instructions,
        "warp_instructions_per_s": instructions / seconds,
    }


def bench_scaling(repeat: int) -> list[dict[str, Any]]:
    """Time against the number of 128 x 64 score tiles: linear if the last column is flat."""
    rows = []
    for seqlen in (512, 1024, 2048, 4096):
        problem = replace(BASE, seqlen_q=seqlen, seqlen_k=seqlen)
        simulate(problem, "fa2", checks=False, workers=1)
        seconds = statistics.median(
            simulate(problem, "fa2", checks=False, workers=1).seconds for _ in range(repeat)
        )
        tiles = sum(-(-min(seqlen, 128 * (m + 1)) // 64) for m in range(-(-seqlen // 128)))
        rows.append(
            {
                "seqlen": seqlen,
                "tiles": tiles,
                "median_s": seconds,
                "ms_per_tile": 1e3 * seconds / tiles,
            }
        )
    return rows


def bench_large(repeat: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    one, all_cores = (
        statistics.median(
            simulate(LARGE, "fa2", checks=False, workers=workers).seconds for _ in range(repeat)
        )
        for workers in (1, cores)
    )
    return {
        "what": "fa2 forward B2 H8 S1024 D64 causal, unchecked",
        "one_process_s": one,
        "all_cores_s": all_cores,
        "cores": cores,
        "speed_up": one / all_cores,
    }


def run_fresh(program: str, cache: str) -> float:
    """Seconds that ``program`` prints, run in a new interpreter with its own cache directory."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "CUTE_FA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout.strip().splitlines()[-1])


COMPILE = """
import time, torch
{warm}
start = time.perf_counter()
import cute_fa
cute_fa.compile("fa2", "fwd", arch="sm_80", dtype="bfloat16", head_dim=128, causal=True)
print(time.perf_counter() - start)
"""


def bench_host(repeat: int) -> dict[str, Any]:
    cold, hit = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(run_fresh(COMPILE.format(warm="import cutlass.cute"), cache))
            hit.append(run_fresh(COMPILE.format(warm="import cute_fa.build"), cache))
    help_command = [sys.executable, "-m", "cute_fa", "--help"]
    help_time = median_seconds(
        lambda: subprocess.run(help_command, check=True, capture_output=True), repeat
    )
    return {
        "cold_compile_s": statistics.median(cold),
        "cache_hit_s": statistics.median(hit),
        "help_s": help_time["median_s"],
        "call_overhead_s": call_overhead(repeat),
    }


def call_overhead(repeat: int) -> float:
    """Seconds of a public call on CPU tensors beyond the simulated launch itself."""
    problem = AttentionProblem(1, 16, 16, 1, 1, 64, 64, "bfloat16")
    q, k, v, _ = normal_inputs(problem, seed=0)
    samples = []
    for _ in range(repeat + 1):
        with sim.Device("sm_80") as device:
            cute_fa.flash_attn_func(q, k, v, generation="fa2")
            start = time.perf_counter()
            cute_fa.flash_attn_func(q, k, v, generation="fa2")
            samples.append(time.perf_counter() - start - device.launches[-1].seconds)
    return statistics.median(samples[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="timed repeats of each case")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "environment": environment(),
        "launches": bench_launches(options.repeat),
        "hot_block": bench_hot_block(options.repeat),
        "scaling": bench_scaling(max(1, options.repeat // 2)),
        "large": bench_large(max(1, options.repeat // 2)),
        "host": bench_host(max(1, options.repeat // 2)),
    }
    write(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
