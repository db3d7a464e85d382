"""Tensor memory: 128 lanes of 512 columns of 32 bits for each CTA (PTX ISA 9.7.16.1).

An address is ``lane << 16 | column``. Threads reach it by ``tcgen05.ld`` and ``tcgen05.st``, the
tensor core by ``mma``, ``cp`` and ``shift``, which run in the order in which they were issued. What
is stored here is what has been carried out; a cell under an asynchronous write that has not been
carried out yet is loaded as poison.

The tensor core says beforehand what it accesses: :meth:`TensorMemory.begin_read` and
:meth:`TensorMemory.begin_write` at issue, ``finish_read`` and ``finish_write`` when it is carried
out. Bounds and allocation are checked always, order only where the race checks are on
(:mod:`cute_fa.sim.tensor_shadow`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.engines import uses_tensor_memory
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Mask, Subsystem, subsystem
from cute_fa.sim.lanes import WARP_LANES
from cute_fa.sim.tensor_pieces import HALF_LANES, QUARTERS, Piece
from cute_fa.sim.tensor_shadow import TensorShadow

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

LANES = 128
COLUMNS = 512
LANE_SHIFT = 16
COLUMN_MASK = 0xFFFF
POISON = np.uint32(0x7FC0DEAD)

_CHANCE = 0.25  # of each step to carry out the stores on their way, under the random policy


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


def check_whole_warps(ctx: BlockContext, mask: Mask) -> None:
    """Report warps of which not all threads execute the instruction, whether or not they exited."""
    if mask is None:
        return
    w0, w1, _, _ = ctx.rect
    threads = np.arange(w0 * WARP_LANES, w1 * WARP_LANES).reshape(-1, 1, WARP_LANES)
    missing = mask.any(axis=-1, keepdims=True) & ~mask & (threads < ctx.wave.config.threads)
    if missing.any():
        text = "a tcgen05 instruction for whole warps is executed by part of a warp"
        report_lanes(ctx, "divergent-collective", text, missing)


@dataclass(eq=False)
class Store:
    """A ``tcgen05.st`` on its way: values to put into a view of the cells."""

    piece: Piece
    target: np.ndarray
    values: np.ndarray


@subsystem
class TensorMemory(Subsystem):
    """The tensor memory of one wave's CTAs.

    Attributes:
        cells: uint32 ``(R, 512 columns, 128 lanes)``: the storage, contiguous. The block of a
            matrix with one row per lane is its transpose, contiguous where it has all lanes.
        data: the same cells as a view ``(R, 128 lanes, 512 columns)``.
        split: the same as a view ``(R, 512 columns, 4 quarters, 2 halves, 16 lanes)``.
        allocated: bool ``(R, 512)``: columns that belong to an allocation.
        epoch: rises with every change of the allocation.
        flying: int16 as ``cells``: asynchronous writes that each cell still waits for; None until
            there is one (never, if everything completes at issue).
        flights: areas under such writes, all together.
        plans: what ``ld`` and ``st`` have worked out for the addresses that they met.
        shadow: checks the order of accesses; inactive if no rule of it is wanted.
    """

    name = "tensor-memory"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        used = uses_tensor_memory(wave.kernel)
        slots = wave.num_ctas if used else 0
        self.cells = np.full((slots, COLUMNS, LANES), POISON, np.uint32)
        self.data = self.cells.transpose(0, 2, 1)
        self.split = self.cells.reshape(-1, COLUMNS, QUARTERS, 2, HALF_LANES)
        self.allocated = np.zeros((slots, COLUMNS), bool)
        self.epoch = 0
        self.flying: np.ndarray | None = None
        self.flights = 0
        self.stores: list[Store] = []
        self.plans: dict[Any, Any] = {}
        self.policy = wave.options.completion
        self.eager = self.policy == "eager"
        self.shadow = TensorShadow(wave, used)

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
        where = f"lanes {low} to {high - 1}, columns {columns.start} to {columns.stop - 1}"
        rule, text = "", ""
        if high > LANES or columns.stop > COLUMNS:
            rule, text = "tmem-out-of-bounds", f"an access to {where}"
        elif not self.allocated[area.slot, columns].all():
            missing = np.flatnonzero(~self.allocated[area.slot, columns]) + columns.start
            rule = "tmem-unallocated"
            text = f"an access to {where}; column {int(missing[0])} is not allocated"
        if rule:
            report_warp(ctx, rule, text, issuer.slot, issuer.first, address=address)
        return not rule

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
            self._fly(1)[area.slot, area.columns][:, area.lanes] += 1
        return True

    def finish_read(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core of the CTA in ``slot`` has read an area, at an event of the clocks.

        ``area`` is the object that was begun.
        """
        if self.shadow.active:
            self.shadow.finish_read(area, row, slot, event)

    def finish_write(self, area: Area, row: int, slot: int, event: np.uint32) -> None:
        """The tensor core of the CTA in ``slot`` has written an area; as :meth:`finish_read`."""
        if self.shadow.active:
            self.shadow.finish_write(area, row, slot, event)
        if not self.eager:
            self._fly(-1)[area.slot, area.columns][:, area.lanes] -= 1

    def _fly(self, change: int) -> np.ndarray:
        """Count an area under an asynchronous write; returns the count of each cell."""
        if self.flying is None:
            self.flying = np.zeros(self.cells.shape, np.int16)
        self.flights += change
        return self.flying

    # --- what threads do --------------------------------------------------------------------------

    def read(self, piece: Piece) -> np.ndarray:
        """The cells of a piece, ``(c, columns, w, halves, 16)``; poison where they are in flight.

        The result may be a view of the storage.
        """
        cells = self.split[piece.place]
        if self.flights and self.flying is not None:
            waiting = self.flying.reshape(self.split.shape)[piece.place] > 0
            if waiting.any():
                return np.where(waiting, POISON, cells)
        return cells

    def write(self, piece: Piece, target: np.ndarray, values: np.ndarray) -> None:
        """Store values to a view of a piece's cells, now or at any time until the warps wait."""
        late = self.policy == "late" or (self.policy == "random" and self.wave.rng.random() < 0.5)
        if not late:
            target[...] = values
            return
        self._fly(1).reshape(self.split.shape)[piece.place] += 1
        self.stores.append(Store(piece, target, values.copy()))

    def land(self, active: np.ndarray | None = None, rect: tuple[int, ...] = ()) -> None:
        """Carry out stores, in order: of the warps (bool ``(w, c)`` over ``rect``), or all."""
        left = []
        for store in self.stores:
            warps, slots = store.piece.warps, store.piece.slots
            if active is not None:
                w0, c0 = rect[0], rect[2]
                mine = active[
                    max(warps.start - w0, 0) : max(warps.stop - w0, 0),
                    max(slots.start - c0, 0) : max(slots.stop - c0, 0),
                ]
                if not mine.any():
                    left.append(store)
                    continue
            store.target[...] = store.values
            self._fly(-1).reshape(self.split.shape)[store.piece.place] -= 1
        self.stores = left

    def on_step(self, ctx: BlockContext) -> None:
        if self.stores and self.wave.rng.random() < _CHANCE:
            self.land()

    def on_idle(self, ctx: BlockContext) -> bool:
        """Stores complete even if nobody waits for them; nobody can go on because of it."""
        self.land()
        return False
