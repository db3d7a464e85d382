"""Rings of shared-memory tiles between a producer and consumer warps, on mbarriers.

A ring slot has two mbarriers: ``full`` completes when its tile is there, ``empty`` when every
consumer warp is done with it. Producer and consumers walk through the same uses 0, 1, 2, …; use n
lives in slot n % stages and is the (n // stages)-th use of that slot, whose parity is what a wait
compares with (PTX ISA, mbarrier.try_wait.parity). So nobody carries a state: a role names the use.

    by TMA     producer   acquire(n) → TMA copies that signal full(n)
    by warps   producer   acquire(n) → write the tile → commit(n)
    of both    consumer   wait(n) → read the tile → release(n)
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.errors import InvalidArgumentError


@dataclass(frozen=True)
class Ring:
    """What consumers know of a ring.

    Attributes:
        name: the tensor that it carries, for messages.
        mbarriers: ``full`` of every slot, then ``empty`` of every slot.
        stages: slots.
        consumer_warps: warps that release each use; 0 if slots are never used again, which leaves
            the ring without ``empty`` barriers.
        num_ctas: CTAs of a cluster that fill one another's slots, so that consumer warps of each
            release each use in all.
    """

    name: cutlass.Constexpr
    mbarriers: cute.Pointer
    stages: cutlass.Constexpr
    consumer_warps: cutlass.Constexpr
    num_ctas: cutlass.Constexpr

    def full(self, n) -> cute.Pointer:
        """The mbarrier that says that the tile of use ``n`` is there."""
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

    def _initialise(self, producer_arrivals: int) -> None:
        for slot in range(self.stages):
            cute.arch.mbarrier_init(self.mbarriers + slot, producer_arrivals)
            if self.consumer_warps > 0:
                arrivals = self.consumer_warps * self.num_ctas
                cute.arch.mbarrier_init(self.mbarriers + self.stages + slot, arrivals)

    def _await_empty(self, n) -> None:
        """Until the slot of use ``n`` is free.

        The wait is for the phase *before* the slot's first use when n < stages, and a fresh
        mbarrier counts that one as complete: the first uses pass at once.
        """
        if self.consumer_warps > 0:
            cute.arch.mbarrier_wait(self.empty(n), self._parity(n) ^ 1)

    def wait(self, n) -> None:
        """Consumer: wait until the tile of use ``n`` is there."""
        cute.arch.mbarrier_wait(self.full(n), self._parity(n))

    @cute.jit
    def release(self, n):
        """Consumer warp: its reads of use ``n`` are complete."""
        if cutlass.const_expr(self.num_ctas == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(self.empty(n))
        else:
            # A lane for each CTA. Nothing is handed over, what was read may be overwritten: CTA
            # scope, the default, is enough and costs no fence.
            cta = cute.arch.lane_idx()
            if cta < self.num_ctas:
                cute.arch.mbarrier_arrive(self.empty(n), cta)


@dataclass(frozen=True)
class TmaPipe(Ring):
    """A ring that TMA fills.

    Attributes:
        tile_bytes: what TMA writes per use, columns and rows outside the tensor included.
        leads: of a pair of CTAs, which fill their slots together, whether this is the one whose
            ``full`` barriers count the bytes of both; None: there is no pair.
    """

    tile_bytes: cutlass.Constexpr
    leads: cutlass.Boolean | None = None

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the pipe."""
        self._initialise(1)

    @cute.jit
    def acquire(self, n, tile_bytes: cutlass.Constexpr = None):
        """Producer warp: wait until the slot of use ``n`` is free, then announce its bytes.

        Args:
            tile_bytes: of this use, in a ring whose slots hold tiles of two sizes.
        """
        self._await_empty(n)
        announced = self.tile_bytes if tile_bytes is None else tile_bytes
        if cutlass.const_expr(self.leads is None):
            self._announce(n, announced)
        elif self.leads:
            self._announce(n, 2 * announced)

    @cute.jit
    def _announce(self, n, num_bytes: cutlass.Constexpr):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full(n), num_bytes)

    def drain(self, n) -> None:
        """Producer: wait until the slots of all uses before ``n`` are free again."""
        for use in range(self.stages):
            self._await_empty(n + use)


@dataclass(frozen=True)
class WarpPipe(Ring):
    """A ring that warps write by themselves, for readers of the async proxy: wgmma, TMA.

    Attributes:
        producer_warps: warps that write a part of each tile.
    """

    producer_warps: cutlass.Constexpr

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches the pipe."""
        self._initialise(self.producer_warps)

    def acquire(self, n) -> None:
        """Producer warp: wait until the slot of use ``n`` is free."""
        self._await_empty(n)

    @cute.jit
    def commit(self, n):
        """Producer warp: its part of the tile of use ``n`` is written."""
        # Each thread's own writes become visible to the async proxy, then one speaks for all.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.full(n))


def num_mbarriers(stages: int, consumer_warps: int) -> int:
    """mbarriers that a ``Ring`` needs."""
    return stages * (2 if consumer_warps > 0 else 1)


def tma_pipe(
    name: str,
    mbarriers: cute.Pointer,
    sX: cute.Tensor,
    tile_bytes: int,
    consumer_warps: int,
    leads: cutlass.Boolean | None = None,
    num_ctas: int = 1,
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
    return TmaPipe(name, mbarriers, stages, consumer_warps, num_ctas, tile_bytes, leads)
