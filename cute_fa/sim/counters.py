"""What a launch did, counted: instructions by class, exponentials, MMA work, bytes moved.

Instruction counts are taken per basic block: each execution of a block adds the number of warps
(and lanes) that were active in it, and the block's static histogram is multiplied in at the end. A
guarded instruction therefore counts whether or not its guard held. Bytes are added by the memory
instructions themselves and are exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

DESCRIPTIONS: dict[str, str] = {
    "warp_instructions": "instructions executed, one per warp",
    "warp_instructions.<class>": "the same by class: alu, fma, mufu, mma, ld_shared, branch, …",
    "exponentials": "ex2 evaluations, per thread and element",
    "fmas": "fused multiply-adds in f32 or narrower, per thread and element",
    "mma_flops.<kind>": "multiply-adds of matrix instructions times two, by input type",
    "mma_shared_bytes_read": "operand bytes that tcgen05 products read from shared memory",
    "mma_tmem_bytes_read": "bytes of A and of old accumulators that they read from tensor memory",
    "mma_tmem_bytes_written": "bytes of accumulators that they write to tensor memory",
    "global_bytes_read": "bytes requested from global memory by loads and copies",
    "global_bytes_written": "bytes sent to global memory by stores, atomics and copies",
    "global_sectors_read": "32-byte sectors that the reads touched, per warp instruction",
    "global_sectors_written": "32-byte sectors that the writes touched, per warp instruction",
    "shared_bytes_read": "bytes read from shared memory",
    "shared_bytes_written": "bytes written to shared memory",
    "local_bytes_read": "bytes read from local memory (spills, indexed arrays)",
    "local_bytes_written": "bytes written to local memory",
    "tmem_bytes_read": "bytes loaded from tensor memory to registers",
    "tmem_bytes_written": "bytes stored from registers, and copied, to tensor memory",
    "bulk_copies": "bulk copies, one per thread that issues one",
    "tensor_copies": "tensor copies (TMA), one per thread that issues one",
    "bulk_repeats": "bulk and tensor stores that repeat what an earlier lane of the warp issued",
    "clusters_cancelled": "clusters whose work a running CTA took over (cluster launch control)",
    "barrier_waits": "barrier waits, one per warp",
}
"""Every counter's name and meaning; ``<…>`` stands for one of several keys."""


class Counters:
    """Named counts that add up over blocks, waves and processes."""

    def __init__(self, values: Mapping[str, int] | None = None) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)
        for name, count in (values or {}).items():
            self._values[name] = int(count)

    def add(self, name: str, count: int) -> None:
        """Add ``count`` to the counter ``name`` (made on first use)."""
        self._values[name] += int(count)

    def merge(self, other: Counters) -> None:
        """Add every counter of ``other``."""
        for name, count in other._values.items():
            self._values[name] += count

    def as_dict(self) -> dict[str, int]:
        """All counters by name, sorted."""
        return dict(sorted(self._values.items()))

    def __getitem__(self, name: str) -> int:
        return self._values.get(name, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and self.as_dict() == other.as_dict()

    def __repr__(self) -> str:
        return f"Counters({self.as_dict()})"

    def by_class(self, prefix: str) -> dict[str, int]:
        """The counters ``<prefix>.<class>`` by class."""
        start = prefix + "."
        return {
            name[len(start) :]: count
            for name, count in self.as_dict().items()
            if name.startswith(start)
        }

    @property
    def warp_instructions(self) -> int:
        """Instructions executed, one per warp."""
        return self["warp_instructions"]

    @property
    def exponentials(self) -> int:
        """ex2 evaluations, per thread and element."""
        return self["exponentials"]

    @property
    def fmas(self) -> int:
        """Fused multiply-adds in f32 or narrower, per thread and element."""
        return self["fmas"]

    @property
    def mma_flops(self) -> int:
        """Multiply-adds of matrix instructions times two, of all input types."""
        return sum(self.by_class("mma_flops").values())

    @property
    def global_bytes_read(self) -> int:
        """Bytes requested from global memory."""
        return self["global_bytes_read"]

    @property
    def global_bytes_written(self) -> int:
        """Bytes sent to global memory."""
        return self["global_bytes_written"]

    @property
    def shared_bytes_read(self) -> int:
        """Bytes read from shared memory by threads and copies."""
        return self["shared_bytes_read"]

    @property
    def shared_bytes_written(self) -> int:
        """Bytes written to shared memory."""
        return self["shared_bytes_written"]

    @property
    def barrier_waits(self) -> int:
        """Barrier waits, one per warp."""
        return self["barrier_waits"]

    def __getstate__(self) -> dict[str, Any]:
        return {"values": dict(self._values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._values = defaultdict(int, state["values"])
