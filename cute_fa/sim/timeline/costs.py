"""What one PTX instruction costs a warp: which unit, for how long, and when its result is there.

PTX is not machine code. Moves between registers, parameter loads and address conversions are taken
to cost nothing, as they mostly vanish in compilation; integer division counts as what it is
expanded to; a packed f32x2 instruction as one issue slot and two passes of the FMA unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cute_fa import ptx
from cute_fa.ptx import defs, uses
from cute_fa.sim.isa import Decoded
from cute_fa.sim.timeline.machines import SCHEDULERS, MachineModel

WARP = 32

_FREE = frozenset(("move", "ld_param", "hint", "control"))
_SYNCHRONISING = frozenset(
    (
        *("barrier", "mbarrier", "fence", "wgmma", "bulk_copy", "tensor_copy", "cp_async"),
        *("tcgen05_mma", "tcgen05_commit", "tmem_wait", "tmem_alloc", "st_async"),
    )
)
_MUFU_OPS = frozenset(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"))
_FMA_OPS = frozenset(("add", "sub", "mul", "fma", "mad"))
_DIVISION_CYCLES = 40  # A: a 32-bit integer division is some twenty instructions
_WIDTH = re.compile(r"[bsuf](\d+)(?:x(\d))?")


@dataclass(frozen=True)
class Cost:
    """One instruction.

    Attributes:
        unit: of its scheduler ("fma", "alu", "mufu", …), of the SM ("shared", "tmem"), or "".
        cycles: for which it occupies the unit; latency: until its results may be used.
        issues: it takes an issue slot.
        reads, writes: registers.
        special: the replay has to do something for it.
        nbytes: that it moves; flops: of a warp's share of a product; bits: of its operands.
    """

    instr: ptx.Instr
    unit: str
    cycles: float
    latency: float
    issues: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    special: bool = False
    nbytes: int = 0
    flops: int = 0
    bits: int = 16


def cost_of(
    instr: ptx.Instr, counter_class: str, decoded: Decoded | None, model: MachineModel
) -> Cost:
    """The cost of one instruction of one warp.

    Args:
        counter_class: under which it is counted; decoded: its handler if it is an effect.
    """
    if counter_class == "tmem_wait" and "wait::ld" in instr.parts:
        # Machine code waits for each register when it is used; this leaves a NOP.
        return Cost(instr, "", 0.0, 0.0, False, (), ())
    unit, times = _unit(instr, counter_class)
    nbytes = flops = 0
    bits = 16
    if unit == "shared":
        nbytes = WARP * _bytes_per_thread(instr)
        cycles = nbytes / model.shared_bytes
        latency = float(model.latency["shared"])
    elif unit == "tmem":
        assert decoded is not None
        nbytes = sum(decoded.static_counts.values())
        reading = counter_class == "ld_tmem"
        cycles = nbytes / (model.tmem_read_bytes if reading else model.tmem_write_bytes)
        latency = cycles + model.tmem_latency
    elif unit == "mma":
        flops, bits = _flops(decoded)
        cycles = flops / (model.tensor_flops[bits] / SCHEDULERS)
        latency = max(float(model.latency["mma"]), cycles)
    elif unit == "global":
        cycles, latency = 1.0, float(model.global_latency)
    elif unit:
        cycles = times * WARP / (model.results[unit] / SCHEDULERS)
        latency = model.latency[unit] + cycles - 1
    else:
        cycles, latency = 0.0, 1.0
    if counter_class == "wgmma" and instr.parts[1] == "mma_async":
        flops, bits = _flops(decoded)
        nbytes = _wgmma_bytes(decoded)
    if counter_class == "cp_async" and len(instr.operands) >= 3:
        size = instr.operands[2]
        nbytes = WARP * (size.value if isinstance(size, ptx.Imm) else 16)
    return Cost(
        instr,
        unit,
        cycles,
        latency,
        counter_class not in _FREE and instr.op != "cvta",
        tuple(uses(instr)),
        tuple(defs(instr)),
        counter_class in _SYNCHRONISING or unit == "tmem",
        nbytes,
        flops,
        bits,
    )


def _unit(instr: ptx.Instr, counter_class: str) -> tuple[str, float]:
    """(unit, passes through it)."""
    op = instr.op
    packed = instr.parts[-1] == "f32x2"
    if counter_class in _FREE or op == "cvta" or counter_class in _SYNCHRONISING:
        return "", 0
    if counter_class in ("ld_shared", "st_shared", "ldmatrix", "stmatrix"):
        return "shared", 1
    if counter_class in ("ld_tmem", "st_tmem"):
        return "tmem", 1
    if counter_class == "mma":
        return "mma", 1
    if counter_class.startswith(("ld_", "st_", "atomic")):
        return "global", 1
    if op in _MUFU_OPS:
        return "mufu", 1
    if counter_class == "convert":
        return "convert", 1
    if counter_class in ("shfl", "redux"):
        return "shuffle", 1
    if counter_class == "vote":
        return "vote", 1
    if counter_class == "branch":
        return "", 0
    is_float = any(part.startswith(("f16", "f32", "bf16")) for part in instr.parts[1:])
    if op in _FMA_OPS and is_float:
        return "fma", 2 if packed else 1
    if op in ("mul", "mad"):
        return "imad", 2 if "wide" in instr.parts or "s64" in instr.parts else 1
    if op in ("div", "rem"):
        return "alu", _DIVISION_CYCLES / 2
    wide = instr.parts[-1] in ("s64", "u64", "b64")
    return "alu", 2 if wide or packed else 1


def _bytes_per_thread(instr: ptx.Instr) -> int:
    """Bytes of shared memory that each thread of the warp loads or stores."""
    if instr.op in ("ldmatrix", "stmatrix"):
        count = next((int(part[1:]) for part in instr.parts if part in ("x1", "x2", "x4")), 1)
        return 4 * count
    count = next((int(p[1:]) for p in instr.parts if p in ("v2", "v4", "v8")), 1)
    match = _WIDTH.fullmatch(instr.parts[-1])
    return count * int(match[1]) // 8 * int(match[2] or 1) if match else 4 * count


def _wgmma_bytes(decoded: Any) -> int:
    """A warp's share of what a wgmma reads from shared memory: K takes 32 bytes, whatever the type.

    B is read once for the four warps of the warpgroup, A's 64 rows 16 by each.
    """
    rows = decoded.n / 4 + (0 if decoded.a_in_registers else 16)
    return int(32 * rows)


def _flops(decoded: Decoded | None) -> tuple[int, int]:
    """FLOP of a warp's share of a product, and the width of its operands."""
    for name, count in (decoded.static_counts if decoded is not None else {}).items():
        kind = name.partition(".")[2]
        if name.startswith("mma_flops"):
            return count, 8 if kind.startswith(("e4m3", "e5m2", "s8", "u8")) else 16
    return 0, 16
