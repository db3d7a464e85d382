"""What a kernel takes of an SM: what its cubin says, and what only its config and launch know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cute_fa.target import Target


@dataclass(frozen=True)
class KernelResources:
    """Resources of one kernel; bytes, and registers of 32 bits per thread.

    Attributes:
        registers: per thread, as the kernel is launched.
        role_registers: {"all": registers}, or where warp roles trade registers (``setmaxnreg``)
            what each trade asks for, numbered in the order of the code.
        stack_bytes: local memory per thread, of spilled registers and local arrays.
        spill_store_bytes, spill_load_bytes: local-memory traffic in the code, per thread if each
            instruction runs once; all three are 0 if nothing was spilled.
        static_smem_bytes, dynamic_smem_bytes: shared memory per CTA, declared in the code and asked
            for at launch.
        threads: per CTA.
        barriers: hardware barriers per CTA.
        code_bytes: of machine code.
        ctas_per_sm: CTAs resident on one SM at once.
        limited_by: the resource that sets ``ctas_per_sm``.
    """

    registers: int
    role_registers: Mapping[str, int]
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    threads: int
    barriers: int
    code_bytes: int
    ctas_per_sm: int
    limited_by: str

    @property
    def smem_bytes(self) -> int:
        """Shared memory per CTA, static and dynamic."""
        return self.static_smem_bytes + self.dynamic_smem_bytes

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def kernel_resources(cubin: bytes, kernel: str, config: Any, target: Target) -> KernelResources:
    """Resources of ``kernel`` in ``cubin``.

    ``config`` gives ``num_threads`` and ``smem_bytes`` (dynamic), which no artefact holds.
    """
    from cute_fa.asm.occupancy import occupancy
    from cute_fa.asm.resources import resources

    found = resources(cubin, kernel)
    occupied = occupancy(found, config.smem_bytes, config.num_threads, target)
    roles = {f"setmaxnreg {n}": count for n, count in enumerate(found.role_registers)}
    return KernelResources(
        registers=found.registers,
        role_registers=roles or {"all": found.registers},
        stack_bytes=found.stack_bytes,
        spill_store_bytes=found.local_store_bytes,
        spill_load_bytes=found.local_load_bytes,
        static_smem_bytes=found.static_smem_bytes,
        dynamic_smem_bytes=config.smem_bytes,
        threads=config.num_threads,
        barriers=found.barriers,
        code_bytes=found.code_bytes,
        ctas_per_sm=occupied.ctas,
        limited_by=occupied.limited_by,
    )
