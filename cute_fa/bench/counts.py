"""What a forward executes for every 128 x 128 tile of scores, counted and modelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cute_fa.bench.model import ModelledForward
from cute_fa.problem import DTYPE_BYTES, AttentionProblem
from cute_fa.sim.timeline import MachineModel

TILE = 128
CLASSES = ("mufu", "fma", "alu", "convert", "wgmma", "mma", "tcgen05_mma", "barrier", "mbarrier")


def tensor_flops(model: MachineModel, p: AttentionProblem) -> int:
    """Peak FLOP per cycle and SM for the problem's dtype."""
    return model.tensor_flops[8 * DTYPE_BYTES[p.dtype]]


def roofline(model: MachineModel, p: AttentionProblem) -> dict[str, float]:
    """Cycles that one tile takes each unit at least, whatever the overlap.

    Products: S = Q Kᵀ and O += P V. Exponentials: one per score. Shared memory: Q and K once for S,
    V once for O += P V, as the tensor core reads them for 128 rows (P from registers or tensor
    memory); mma.sync takes all operands through registers, so that there it is no bound.
    """
    flops = 2 * TILE * TILE * (p.head_dim + p.head_dim_v)
    operands = DTYPE_BYTES[p.dtype] * TILE * (2 * p.head_dim + p.head_dim_v)
    return {
        "tensor core": flops / tensor_flops(model, p),
        "exponentials": TILE * TILE / model.results["mufu"],
        "shared memory": operands / model.shared_bytes,
    }


def count(forward: ModelledForward) -> dict[str, Any]:
    """One row: everything about one rung."""
    p, launch, timeline = forward.problem, forward.launch, forward.timeline
    scores = p.score_count() * p.batch * p.heads_q
    tiles = scores / TILE**2
    counters = launch.counters
    shared = counters.shared_bytes_read + counters.shared_bytes_written
    sms = math.prod(launch.cluster)  # each CTA of a cluster has one
    replayed = len(forward.ctas) / launch.ctas / sms
    modelled_tiles = tiles * replayed
    flops_per_cycle = counters.mma_flops * replayed / timeline.cycles
    model = timeline.model
    resources = forward.kernel.resources
    return {
        "generation": forward.kernel.generation,
        "arch": forward.kernel.arch,
        "machine": model.name,
        "problem": str(p),
        "config": str(forward.kernel.config),
        "tiles": tiles,
        "warp_instructions_per_tile": {
            role: {
                "all": found.warp_instructions / tiles,
                **{
                    name: found[f"warp_instructions.{name}"] / tiles
                    for name in CLASSES
                    if found[f"warp_instructions.{name}"]
                },
            }
            for role, found in launch.by_role(forward.roles).items()
        },
        "exponentials_per_score": counters.exponentials / scores,
        "fmas_per_score": counters.fmas / scores,
        "bytes_per_tile": {
            "global": (counters.global_bytes_read + counters.global_bytes_written) / tiles,
            "shared, threads and copies": shared / tiles,
            "shared, modelled with the tensor core's operands": timeline.units["shared memory"]
            * timeline.cycles
            * model.shared_bytes
            / modelled_tiles,
            "tensor memory": (counters["tmem_bytes_read"] + counters["tmem_bytes_written"]) / tiles,
        },
        "mma_flops_per_tile": counters.mma_flops / tiles,
        "rescales_skipped": rescales_skipped(forward),
        "registers": {"compiled": resources.registers, **resources.role_registers},
        "spill_bytes": resources.spill_store_bytes + resources.spill_load_bytes,
        "roofline_cycles_per_tile": roofline(model, p),
        "modelled": {
            "ctas_on_the_sm": len(forward.ctas) // sms,
            "cycles_per_tile": timeline.cycles / modelled_tiles,
            "share_of_tensor_peak": flops_per_cycle / tensor_flops(model, p),
            "tflops_if_every_sm_did": flops_per_cycle * model.sm_count * model.clock_ghz * 1e-3,
            "units": dict(timeline.units),
            "roles": timeline.roles(forward.roles),
        },
    }


def rescales_skipped(forward: ModelledForward) -> float | None:
    """Share of the rescalings of O that were left out, 0 to 1; None where it cannot be told.

    For kernels that keep O in tensor memory: their correction warps write 4 bytes for each element
    of O whenever they rescale it, and rescale at most once for each block of keys but the first.
    """
    p, roles = forward.problem, forward.roles
    if "correction" not in roles or p.causal or p.window != (None, None):
        return None
    counters = forward.launch.by_role({"correction": roles["correction"]})["correction"]
    row_tiles = -(-p.seqlen_q // TILE) * p.batch * p.heads_q
    blocks = -(-p.seqlen_k // forward.kernel.config.tile_n)
    most = row_tiles * (blocks - 1) * TILE * forward.kernel.config.padded_dv * 4
    return 1.0 - counters["tmem_bytes_written"] / most if most else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one column per rung."""
    names = [f"{row['generation']} {row['arch']}" for row in rows]
    lines: list[tuple[str, list[str]]] = [("per 128 x 128 tile of scores", names)]

    def add(label: str, cells: Sequence[object]) -> None:
        lines.append((label, [x if isinstance(x, str) else f"{x:.4g}" for x in cells]))

    add("warp-instructions", [_sum(row, "all") for row in rows])
    for name in CLASSES:
        add(f"  {name}", [_sum(row, name) for row in rows])
    add("exponentials per score", [row["exponentials_per_score"] for row in rows])
    add("multiply-adds per score", [row["fmas_per_score"] for row in rows])
    for name in rows[0]["bytes_per_tile"]:
        add(f"bytes: {name}", [row["bytes_per_tile"][name] for row in rows])
    add("MMA FLOP", [row["mma_flops_per_tile"] for row in rows])
    skipped = [row["rescales_skipped"] for row in rows]
    add("rescales of O skipped", ["" if x is None else f"{x:.1%}" for x in skipped])
    add("registers", ["/".join(map(str, row["registers"].values())) for row in rows])
    add("spilled bytes", [row["spill_bytes"] for row in rows])
    for name in rows[0]["roofline_cycles_per_tile"]:
        add(f"roofline, cycles: {name}", [row["roofline_cycles_per_tile"][name] for row in rows])
    add("modelled: machine", [row["machine"] for row in rows])
    add("modelled: CTAs on the SM", [row["modelled"]["ctas_on_the_sm"] for row in rows])
    add("modelled: cycles", [row["modelled"]["cycles_per_tile"] for row in rows])
    add("modelled: share of peak", [row["modelled"]["share_of_tensor_peak"] for row in rows])
    add("modelled: TFLOP/s", [row["modelled"]["tflops_if_every_sm_did"] for row in rows])
    for unit in ("tensor core", "mufu", "fma", "alu", "issue slots", "shared memory", "tmem"):
        add(f"modelled, in use: {unit}", [row["modelled"]["units"].get(unit, 0) for row in rows])
    width = max(len(label) for label, _ in lines) + 2
    cell = max(len(x) for _, cells in lines for x in cells) + 2
    body = [label.ljust(width) + "".join(x.rjust(cell) for x in cells) for label, cells in lines]
    for row in rows:
        body += ["", f"{row['generation']}: warp-instructions by role; modelled time of the role"]
        for role, found in row["warp_instructions_per_tile"].items():
            shares = row["modelled"]["roles"][role]
            spent = ", ".join(f"{what} {x:.0%}" for what, x in shares.items() if x >= 0.005)
            body.append(f"  {role:<12}{found['all']:>10.1f}   {spent}")
    return "\n".join(body)


def _sum(row: dict[str, Any], name: str) -> float:
    return sum(found.get(name, 0.0) for found in row["warp_instructions_per_tile"].values())
