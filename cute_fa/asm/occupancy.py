"""How many blocks of a kernel one SM holds at once.

Rules and sizes: CUDA C++ Programming Guide, table of technical specifications per compute
capability. Registers are handed out per warp, each warp lives in one of the SM's four
partitions, and shared memory is handed out in steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_fa.asm.resources import Resources
from cute_fa.errors import InvalidArgumentError
from cute_fa.target import Target, get_target

_WARP = 32
_REGISTER_STEP = 8
_PARTITIONS = 4
_SMEM_STEP = 128


@dataclass(frozen=True)
class Occupancy:
    """Blocks per SM, and the limit of each resource by itself.

    Attributes:
        ctas: resident blocks, the smallest of ``limits``; 0 if not even one fits.
        limited_by: the resource whose limit that is.
        limits: blocks that threads, registers, shared memory and the SM's slots allow.
    """

    ctas: int
    limited_by: str
    limits: dict[str, int]


def occupancy(
    resources: Resources, dynamic_smem_bytes: int, threads: int, target: str | Target
) -> Occupancy:
    """Occupancy of a kernel with ``threads`` per block and this much dynamic shared memory.

    Raises:
        InvalidArgumentError: a number that no launch could have, or an unknown target.
    """
    if threads < 1 or dynamic_smem_bytes < 0:
        raise InvalidArgumentError(
            "no launch has this many threads or bytes",
            got=f"{threads} threads, {dynamic_smem_bytes} bytes of dynamic shared memory",
            expected="at least 1 thread and 0 bytes",
        )
    target = get_target(target)
    warps = -(-threads // _WARP)
    per_warp = _round_up(resources.registers, _REGISTER_STEP) * _WARP
    smem = (
        _round_up(resources.static_smem_bytes + dynamic_smem_bytes, _SMEM_STEP)
        + target.smem_reserved_per_block_bytes
    )
    resident_warps = target.registers_per_sm // _PARTITIONS // max(per_warp, 1) * _PARTITIONS
    limits = {
        "threads": target.max_threads_per_sm // (warps * _WARP),
        "registers": resident_warps // warps,
        "shared memory": target.smem_per_sm_bytes // smem,
        "blocks": target.max_blocks_per_sm,
    }
    limited_by = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limited_by], limited_by, limits)


def ctas_per_sm(
    resources: Resources, dynamic_smem_bytes: int, threads: int, target: str | Target
) -> int:
    """Resident blocks per SM; see occupancy."""
    return occupancy(resources, dynamic_smem_bytes, threads, target).ctas


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
