"""Rings of shared-memory tiles between a TMA producer and consumer warps, on mbarriers.

A ring slot has two mbarriers: ``full`` completes when the bytes of its tile have landed, ``empty``
when every consumer warp is done with it. Producer and consumers walk through the same uses 0, 1,
2, …; use n lives in slot n % stages and is the (n // stages)-th use of that slot, whose parity is
what a wait compares with (PTX ISA, mbarrier.try_wait.parity). So nobody carries a state: a role
names the use.

    producer   acquire(n) → TMA copies that signal full(n)
    consumer   wait(n) → read the tile → release(n)
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.errors import InvalidArgumentError


@dataclass(frozen=True)
class TmaPipe:
    """One ring.

    Attributes:
        name: the tensor that it carries, for messages.
        mbarriers: ``full`` of every slot, then ``empty`` of every slot.
        stages: slots.
        tile_bytes: what TMA writes per use, columns and rows outside the tensor included.
        consumer_warps: warps that release each use; 0 if slots are never used again, which leaves
            the pipe without ``empty`` barriers.
    """

    name: cutlass.Constexpr
    mbarriers: cute.Pointer
    stages: cutlass.Constexpr
    tile_bytes: cutlass.Constexpr
    consumer_warps: cutlass.Constexpr

    def full(self, n) -> cute.Pointer:
        """The mbarrier that the TMA copies of use ``n`` signal."""
        return self.mbarriers + self.slot(n)

    def slot(self, n):
        """The ring slot of use ``n``."""
        # PERF(SASS): n ≥ 0, but nobody tells the compiler; of a power of two, bits are cheaper.
        return n & (self.stages - 1) if self._is_power_of_two else n % self.stages

    def _parity(self, n):
        if self._is_power_of_two:
            return (n >> (self.stages.bit_length() - 1)) & 1
        return (n // self.stages) % 2

    @property
    def _is_power_of_two(self) -> bool:
        return self.stages & (self.stages - 1) == 0

    def empty(self, n) -> cute.Pointer:
        """The mbarrier that says that the slot of use ``n`` is free again."""
        return self.mbarriers + self.stages + self.slot(n)

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the pipe."""
        for slot in range(self.stages):
            cute.arch.mbarrier_init(self.mbarriers + slot, 1)
            if self.consumer_warps > 0:
                cute.arch.mbarrier_init(self.mbarriers + self.stages + slot, self.consumer_warps)

    @cute.jit
    def acquire(self, n, tile_bytes: cutlass.Constexpr = None):
        """Producer warp: wait until the slot of use ``n`` is free, then announce its bytes.

        Args:
            tile_bytes: of this use, in a ring whose slots hold tiles of two sizes.

        The wait is for the phase *before* the slot's first use when n < stages, and a fresh
        mbarrier counts that one as complete: the first uses pass at once.
        """
        if cutlass.const_expr(self.consumer_warps > 0):
            cute.arch.mbarrier_wait(self.empty(n), self._parity(n) ^ 1)
        announced = self.tile_bytes if tile_bytes is None else tile_bytes
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(n), announced)

    def wait(self, n) -> None:
        """Consumer: wait until the tile of use ``n`` has landed."""
        cute.arch.mbarrier_wait(self.full(n), self._parity(n))

    @cute.jit
    def release(self, n):
        """Consumer warp: its reads of use ``n`` are complete."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty(n))


def num_mbarriers(stages: int, consumer_warps: int) -> int:
    """mbarriers that a ``TmaPipe`` needs."""
    return stages * (2 if consumer_warps > 0 else 1)


def tma_pipe(
    name: str, mbarriers: cute.Pointer, sX: cute.Tensor, tile_bytes: int, consumer_warps: int
) -> TmaPipe:
    """The ring over ``sX`` (rows, columns, stage), checked against what its owner counted on.

    Raises:
        InvalidArgumentError: ``tile_bytes``, which the producer announces, is not what the copies
            of one stage write; on a GPU the consumers would wait for ever.
    """
    rows, columns, stages = (cute.size(sX, mode=[mode]) for mode in range(3))
    written = rows * columns * sX.element_type.width // 8
    if written != tile_bytes:
        raise InvalidArgumentError(
            f"pipe {name}: the bytes announced are not the bytes copied",
            got=f"{tile_bytes} announced",
            expected=f"{rows} rows · {columns} columns · {sX.element_type.width // 8} bytes = "
            f"{written}",
        )
    return TmaPipe(name, mbarriers, stages, tile_bytes, consumer_warps)
