"""Tensor memory: 128 lanes of 512 columns of 32 bits for each CTA (PTX ISA 9.7.16.1).

An address is ``lane << 16 | column``. Threads reach it by ``tcgen05.ld`` and ``tcgen05.st``, the
tensor core by ``mma``, ``cp`` and ``shift``, which run in the order in which they were issued. What
is stored here is what the tensor core has done so far; a cell under an asynchronous write that has
not been carried out yet reads as poison.

Whoever accesses tensor memory says so beforehand: :meth:`TensorMemory.begin_read` and
:meth:`TensorMemory.begin_write` at issue, ``finish_read`` and ``finish_write`` when it is carried
out. The allocation is checked always, ordering only where the race checks are on
(:mod:`cute_fa.sim.tensor_shadow`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.tensor_shadow import TensorShadow

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

LANES = 128
COLUMNS = 512
LANE_SHIFT = 16
COLUMN_MASK = 0xFFFF
WARP_LANES = 32
POISON = np.uint32(0x7FC0DEAD)


class Area(NamedTuple):
    """Cells of one CTA's tensor memory: every column of a range in some lanes.

    Attributes:
        slot: the CTA's slot in the wave.
        lanes: a range of lanes, or lane numbers in rising order.
        columns: a range of columns.
    """

    slot: int
    lanes: slice | np.ndarray
    columns: slice


def lane_of(address: int) -> int:
    """The lane that an address names."""
    return address >> LANE_SHIFT


def column_of(address: int) -> int:
    """The column that an address names."""
    return address & COLUMN_MASK


@subsystem
class TensorMemory(Subsystem):
    """The tensor memory of one wave's CTAs.

    Attributes:
        cells: uint32 ``(R, 512 columns, 128 lanes)``: the storage, contiguous. The block of a
            matrix with one row per lane is its transpose, contiguous where it has all lanes.
        data: the same cells as a view ``(R, 128 lanes, 512 columns)``.
        allocated: bool ``(R, 512)``: columns that belong to an allocation.
        flying: int16 as ``cells``: asynchronous writes that each cell still waits for; None until
            there is one (never, if everything completes at issue).
        shadow: checks the order of accesses; inactive if no rule of it is wanted.
    """

    name = "tensor-memory"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.used = any(instr.op == "tcgen05" for instr in wave.kernel.body)
        slots = wave.num_ctas if self.used else 0
        self.cells = np.full((slots, COLUMNS, LANES), POISON, np.uint32)
        self.data = self.cells.transpose(0, 2, 1)
        self.allocated = np.zeros((slots, COLUMNS), bool)
        self.flying: np.ndarray | None = None
        self.flights = 0
        self.eager = wave.options.completion == "eager"
        self.shadow = TensorShadow(wave, self.used)

    def area(
        self, slot: int, lane: int, lanes: int | np.ndarray, column: int, columns: int
    ) -> Area:
        """The cells of ``columns`` columns from ``column`` on.

        Args:
            lane: the first lane.
            lanes: how many lanes follow one another, or their numbers counted from ``lane``.
        """
        rows = slice(lane, lane + lanes) if isinstance(lanes, int) else lanes + lane
        return Area(slot, rows, slice(column, column + columns))

    def check(self, ctx: BlockContext, issuer: Issuer, area: Area) -> bool:
        """Whether an area lies in allocated tensor memory; reports it if not."""
        lanes, columns = area.lanes, area.columns
        if isinstance(lanes, slice):
            low, high = lanes.start, lanes.stop
        else:
            low, high = int(lanes[0]), int(lanes[-1]) + 1
        address = low << LANE_SHIFT | columns.start
        if high > LANES or columns.stop > COLUMNS:
            text = f"lanes {low} to {high - 1}, columns {columns.start} to {columns.stop - 1}"
            report_warp(ctx, "tmem-out-of-bounds", text, issuer.slot, issuer.first, address=address)
            return False
        if not self.allocated[area.slot, columns].all():
            missing = np.flatnonzero(~self.allocated[area.slot, columns]) + columns.start
            text = f"column {int(missing[0])} of {columns.start} to {columns.stop - 1}"
            text += " is not allocated"
            report_warp(ctx, "tmem-unallocated", text, issuer.slot, issuer.first, address=address)
            return False
        return True

    # --- what the tensor core does ----------------------------------------------------------------

    def begin_read(self, ctx: BlockContext, issuer: Issuer, area: Area, row: int) -> bool:
        """The tensor core is going to read an area, in the order of its queue.

        Args:
            row: agent row of the tensor core in the issuer's CTA.

        Returns:
            False if the area is not allocated; nothing may then be done with it.
        """
        if not self.check(ctx, issuer, area):
            return False
        if self.shadow.active:
            self.shadow.begin_read(ctx, issuer, area, row)
        return True

    def begin_write(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        area: Area,
        row: int,
        *,
        accumulates: bool = False,
    ) -> bool:
        """The tensor core is going to write an area, in the order of its queue.

        Args:
            accumulates: it adds to what is there, so that this has to be something.

        Returns:
            False if the area is not allocated; nothing may then be done with it.
        """
        if not self.check(ctx, issuer, area):
            return False
        if self.shadow.active:
            self.shadow.begin_write(ctx, issuer, area, row, accumulates=accumulates)
        if not self.eager:
            self.fly(area, 1)
        return True

    def finish_read(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core of the CTA in ``slot`` has read an area, at an event of the clocks."""
        if self.shadow.active:
            self.shadow.finish_read(area, row, slot, event)

    def finish_write(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core of the CTA in ``slot`` has written an area."""
        if self.shadow.active:
            self.shadow.finish_write(area, row, slot, event)
        if not self.eager:
            self.fly(area, -1)

    def fly(self, area: Area, change: int) -> None:
        """Count asynchronous writes that cells wait for."""
        if self.flying is None:
            self.flying = np.zeros(self.cells.shape, np.int16)
        self.flights += change
        if isinstance(area.lanes, slice):
            self.flying[area.slot, area.columns, area.lanes] += change
        else:
            self.flying[area.slot, area.columns][:, area.lanes] += change
