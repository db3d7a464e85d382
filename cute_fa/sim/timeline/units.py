"""The parts of an SM that the replay keeps time for: barriers, tensor core, copy engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cute_fa.sim.timeline.machines import SCHEDULERS, MachineModel

if TYPE_CHECKING:
    from cute_fa.sim.timeline.replay import WarpState

Wake = Callable[["WarpState", float], None]


@dataclass(eq=False)
class ModelMbarrier:
    """An mbarrier in modelled time: the same counting as the real one (PTX ISA 9.7.13.15)."""

    count: int
    pending: int = 0
    transactions: int = 0
    phase: int = 0
    waiting: list[tuple[WarpState, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = self.count

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity & 1

    def change(self, time: float, arrivals: int, nbytes: int, wake: Wake) -> None:
        """Arrive, announce bytes (positive) or land them (negative)."""
        self.pending -= arrivals
        self.transactions += nbytes
        if self.pending <= 0 and self.transactions <= 0:
            self.phase += 1
            self.pending = self.count
            self.transactions = 0
            going = [warp for warp, parity in self.waiting if self.passed(parity)]
            self.waiting = [pair for pair in self.waiting if not self.passed(pair[1])]
            for warp in going:
                wake(warp, time)


@dataclass(eq=False)
class ModelBarrier:
    """A named barrier, or a cluster's: threads or warps that have arrived, warps that wait."""

    arrived: int = 0
    waiting: list[WarpState] = field(default_factory=list)
    uses: int = 0

    def arrive(self, time: float, number: int, expected: int, wake: Wake) -> bool:
        """Count arrivals; True if the barrier is complete, whereupon the waiting warps go on."""
        self.arrived += number
        if self.arrived < expected:
            return False
        self.arrived = 0
        self.uses += 1
        going, self.waiting = self.waiting, []
        for warp in going:
            wake(warp, time)
        return True


@dataclass(eq=False)
class Sm:
    """The units of one SM: until when each is taken, and how long it was in use.

    Attributes:
        issue: next free issue slot of each scheduler.
        units: of each scheduler, by (scheduler, name).
        tensor: of each scheduler's tensor core, which a warp's products take.
        tensor_sm: of all four together, which tcgen05 products take.
        copies: of the way between L2 and shared memory.
        busy: cycles in use by unit, summed over the schedulers where each has its own.
    """

    model: MachineModel
    issue: list[float] = field(default_factory=lambda: [0.0] * SCHEDULERS)
    units: dict[tuple[int, str], float] = field(default_factory=dict)
    tensor: list[float] = field(default_factory=lambda: [0.0] * SCHEDULERS)
    tensor_sm: float = 0.0
    copies: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)

    def use(self, name: str, cycles: float) -> None:
        self.busy[name] = self.busy.get(name, 0.0) + cycles

    def warp_product(
        self, time: float, scheduler: int, flops: int, bits: int, nbytes: int
    ) -> tuple[float, float]:
        """A warp's share of a wgmma on its scheduler's tensor core: (start, end)."""
        share = self.model.tensor_flops[bits] / SCHEDULERS
        fetch = nbytes / (self.model.shared_bytes / SCHEDULERS)
        start = max(time, self.tensor[scheduler])
        end = start + max(flops / share, fetch)
        self.tensor[scheduler] = end
        self.use("tensor core", flops / share)
        self.use("shared memory", nbytes / self.model.shared_bytes)
        return start, end

    def sm_product(
        self, time: float, flops: int, bits: int, nbytes: int, ctas: int
    ) -> tuple[float, float]:
        """A tcgen05 product, which takes the whole SM's tensor core: (start, end)."""
        cycles = flops / (self.model.tensor_flops[bits] * ctas)
        fetch = nbytes / (self.model.shared_bytes * ctas)
        start = max(time, self.tensor_sm)
        end = start + max(cycles, fetch)
        self.tensor_sm = end
        self.use("tensor core", cycles * SCHEDULERS)
        self.use("shared memory", fetch)
        return start, end

    def copy(self, time: float, nbytes: int) -> tuple[float, float]:
        """Bytes between L2 and shared memory: (start, when the last one is there)."""
        start = max(time, self.copies)
        self.copies = start + nbytes / self.model.copy_bytes
        self.use("copies", nbytes / self.model.copy_bytes)
        return start, self.copies + self.model.copy_latency
