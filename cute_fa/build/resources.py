"""What a kernel takes of an SM, and how many CTAs of it fit there at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cute_fa.target import Target

# The units that registers and shared memory are handed out in (CUDA occupancy calculator).
_WARP = 32
_REGISTERS_PER_THREAD_UNIT = 8
_SMEM_UNIT = 128

# PTX ISA, "setmaxnreg": moves registers between the warpgroups of a CTA while it runs.
_SETMAXNREG = re.compile(r"^\s*(?:@!?\S+\s+)?setmaxnreg\.(inc|dec)\S*\s+(\d+)\s*;", re.MULTILINE)


@dataclass(frozen=True)
class KernelResources:
    """Resources of one kernel; bytes, and registers of 32 bits per thread.

    Attributes:
        registers: per thread, as the kernel is launched.
        role_registers: per thread and warp role where roles differ, else {"all": registers}.
        stack_bytes: local memory per thread; 0 means that nothing was spilled.
        static_smem_bytes, dynamic_smem_bytes: shared memory per CTA, fixed in the cubin and asked
            for at launch.
        threads: per CTA.
        ctas_per_sm: CTAs resident on one SM at once.
        limited_by: which of threads, registers, shared memory, CTAs sets ``ctas_per_sm``.
    """

    registers: int
    role_registers: Mapping[str, int]
    stack_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    threads: int
    ctas_per_sm: int
    limited_by: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def kernel_resources(cubin: bytes, ptx: str, config: Any, target: Target) -> KernelResources:
    """Resources from the cubin's ELF sections, the PTX and the kernel's config.

    ``config`` gives ``num_threads`` and ``smem_bytes`` (dynamic), which no artefact holds.
    """
    from cute_fa.asm import resources

    found = resources(cubin)
    smem = found.static_smem_bytes + config.smem_bytes
    ctas, limited_by = occupancy(target, config.num_threads, found.registers, smem)
    return KernelResources(
        registers=found.registers,
        role_registers=role_registers(ptx, found.registers),
        stack_bytes=found.stack_bytes,
        static_smem_bytes=found.static_smem_bytes,
        dynamic_smem_bytes=config.smem_bytes,
        threads=config.num_threads,
        ctas_per_sm=ctas,
        limited_by=limited_by,
    )


def role_registers(ptx: str, at_launch: int) -> dict[str, int]:
    """Registers per thread of each warp role, from the ``setmaxnreg`` that each role begins with.

    PTX does not name roles; they are numbered in the order of the code. A kernel without
    ``setmaxnreg`` has one: {"all": at_launch}.
    """
    found = _SETMAXNREG.findall(ptx)
    if not found:
        return {"all": at_launch}
    return {f"role {number} ({kind})": int(count) for number, (kind, count) in enumerate(found)}


def occupancy(target: Target, threads: int, registers: int, smem_bytes: int) -> tuple[int, str]:
    """(CTAs per SM, what limits them) for a CTA of ``threads`` with ``registers`` per thread and
    ``smem_bytes`` of shared memory; 0 CTAs if one does not fit."""
    warps = -(-threads // _WARP)
    per_warp = _round_up(registers, _REGISTERS_PER_THREAD_UNIT) * _WARP
    smem = _round_up(smem_bytes, _SMEM_UNIT) + target.smem_reserved_per_block_bytes
    limits = {
        "threads": target.max_threads_per_sm // (warps * _WARP),
        "CTAs": target.max_blocks_per_sm,
        "shared memory": target.smem_per_sm_bytes // smem,
        "registers": target.registers_per_sm // per_warp // warps if per_warp else 2**31,
    }
    name = min(limits, key=lambda limit: limits[limit])
    return limits[name], name


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
