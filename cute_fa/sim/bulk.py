"""Bulk copies: what moves between global and shared memory by the async proxy.

Two ways to know that a copy is complete. Copies *into* shared memory signal mbarriers with the
bytes they have written (:func:`land`). Copies *out of* shared memory belong to the bulk groups of
the thread that issued them (:class:`BulkGroups`, PTX ISA 9.7.9.25.4 and 9.7.9.27): a thread waits
until the sources of its groups have been read, or until the copies are complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim.async_shadow import Area, AsyncShadow, Issuer, report_warp
from cute_fa.sim.async_tasks import AsyncTasks, Task
from cute_fa.sim.engines import bulk_row
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.mbarriers import Mbarrier, Mbarriers
from cute_fa.sim.memory import WORDS, poison
from cute_fa.sim.tensor_map import TensorMap, swizzled_chunks

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

CHUNK = 16


@dataclass(eq=False)
class Target:
    """Bytes of one CTA's shared memory that an engine reads or writes.

    Attributes:
        slot: the CTA's slot; array, index: the elements of the wave's shared memory, in order.
        area: the same for the shadow; None if it is not active.
        signal: the barrier that counts the bytes when they are written.
        counted: how many it counts: not the padding of packed elements.
    """

    slot: int
    nbytes: int
    array: np.ndarray
    index: slice | np.ndarray
    area: Area | None
    signal: Mbarrier | None = None
    counted: int = -1

    def __post_init__(self) -> None:
        if self.counted < 0:
            self.counted = self.nbytes

    @classmethod
    def bytes(
        cls,
        ctx: BlockContext,
        slot: int,
        offset: int,
        nbytes: int,
        signal: Mbarrier | None = None,
    ) -> Target:
        """``nbytes`` contiguous bytes."""
        areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        area = areas.span(slot, offset, nbytes) if areas.active else None
        start = slot * areas.row_bytes + offset
        flat = ctx.wave.smem.reshape(-1)
        return cls(slot, nbytes, flat, slice(start, start + nbytes), area, signal)

    @classmethod
    def box(
        cls,
        ctx: BlockContext,
        slot: int,
        offset: int,
        tensor: TensorMap,
        signal: Mbarrier | None = None,
    ) -> Target:
        """The box of a tensor copy, from ``offset`` on, its 16-byte chunks swizzled."""
        nbytes, swizzle = tensor.shared_bytes, tensor.swizzle
        if not swizzle:
            target = cls.bytes(ctx, slot, offset, nbytes, signal)
            target.counted = tensor.box_bytes
            return target
        areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        chunks = swizzled_chunks(offset, nbytes, swizzle, tensor.atom)
        area = None
        if areas.active:
            whole = offset % 128 == 0 and nbytes % 128 == 0  # the swizzle stays within 128 bytes
            area = areas.span(slot, offset, nbytes) if whole else areas.chunks(slot, chunks)
        words = ctx.wave.smem.reshape(-1).view(WORDS[CHUNK])
        index = chunks + slot * areas.row_bytes // CHUNK
        return cls(slot, nbytes, words, index, area, signal, tensor.box_bytes)

    def write(self, data: np.ndarray) -> None:
        """Store bytes, uint8 in order."""
        self.array[self.index] = data.view(self.array.dtype)

    def read(self) -> np.ndarray:
        """A copy of the bytes, uint8 in order."""
        return np.ascontiguousarray(self.array[self.index]).view(np.uint8).copy()

    def spoil(self) -> None:
        """Fill with poison."""
        self.array[self.index] = poison((1,), self.array.dtype.itemsize)[0]


def land(
    ctx: BlockContext,
    issuer: Issuer,
    targets: list[Target],
    fetch: Callable[[], np.ndarray],
    *,
    merge: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    release: Callable[[BlockContext], None] | None = None,
) -> None:
    """Copy bytes into shared memory asynchronously; every target's barrier counts its bytes.

    Args:
        fetch: gives the bytes (uint8) when the copy is carried out.
        merge: (old, new) → what is stored, for reductions.
        release: called when the source has been read.
    """
    areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
    table: Mbarriers = ctx.subsystem(Mbarriers.name)
    tasks: AsyncTasks = ctx.subsystem(AsyncTasks.name)
    for target in targets:
        if target.area is not None:
            areas.begin_write(ctx, issuer, target.area, reduces=merge is not None)
        if not tasks.eager and merge is None:
            target.spoil()
    instr = ctx.instr

    def complete(ctx: BlockContext) -> None:
        data = fetch()
        if release is not None:
            release(ctx)
        for target in targets:
            target.write(data if merge is None else merge(target.read(), data))
            bar = target.signal
            if bar is None:
                continue
            if target.area is not None:
                bar.landing.append((target.area, instr))
            if ctx.wave.alive[:, target.slot].any():
                table.complete(ctx, bar, target.counted, issuer.slot, issuer.first)
            else:
                text = "a copy arrives in a CTA whose threads have all exited"
                report_warp(ctx, "exited-cta-access", text, issuer.slot, issuer.first, instr=instr)

    nbytes = sum(target.nbytes for target in targets)
    tasks.submit(ctx, Task(instr, complete, f"a copy of {nbytes} bytes into shared memory"))


@dataclass(eq=False)
class Outgoing:
    """One copy out of shared memory, from issue to completion.

    Attributes:
        slot, warp, lane: the thread that issued it; group: its bulk group.
        source: what it reads; data: what was read, None until then.
        emit: writes the data where it goes.
    """

    slot: int
    warp: int
    lane: int
    group: int
    source: Target
    emit: Callable[[np.ndarray], None]
    instr: Instr
    data: np.ndarray | None = None
    waited: bool = False  # the thread knows that the source has been read
    written: bool = False


@subsystem
class BulkGroups(Subsystem):
    """The bulk groups of one wave: closed groups of each thread, and copies not yet complete."""

    name = "bulk-groups"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.closed = np.zeros((wave.num_warps, wave.num_ctas, 32), np.int64)
        self.copies: list[Outgoing] = []

    def issue(
        self,
        ctx: BlockContext,
        thread: tuple[int, int, int],
        source: Target,
        emit: Callable[[np.ndarray], None],
    ) -> None:
        """Start a copy for ``thread`` (slot, warp, lane)."""
        slot, warp, lane = thread
        areas: AsyncShadow = ctx.subsystem(AsyncShadow.name)
        if source.area is not None:
            row = bulk_row(self.wave.num_warps)
            areas.begin_read(ctx, Issuer(slot, warp, warp + 1), source.area, row)
        group = int(self.closed[warp, slot, lane])
        copy = Outgoing(slot, warp, lane, group, source, emit, ctx.instr)
        if self.wave.options.completion == "eager":
            self._write(copy)
        self.copies.append(copy)

    def _read(self, copy: Outgoing) -> np.ndarray:
        if copy.data is None:
            copy.data = copy.source.read()
        return copy.data

    def _write(self, copy: Outgoing) -> None:
        if not copy.written:
            copy.emit(self._read(copy))
            copy.written = True

    def _know(self, copy: Outgoing) -> None:
        """The issuing thread knows that the source has been read."""
        self._read(copy)
        if copy.waited:
            return
        copy.waited = True
        areas: AsyncShadow = self.wave.shared_state[AsyncShadow.name]
        if copy.source.area is not None and areas.clocks is not None:
            event = areas.clocks.access(copy.instr.index)
            row = bulk_row(self.wave.num_warps)
            areas.finish_read(copy.source.area, row, copy.slot, copy.warp, event)

    def commit(self, ctx: BlockContext, active: np.ndarray) -> None:
        """Close the open group of the active threads."""
        w0, w1, c0, c1 = ctx.rect
        self.closed[w0:w1, c0:c1] += active

    def wait(self, ctx: BlockContext, active: np.ndarray, newest: int, *, reads: bool) -> None:
        """All but the ``newest`` closed groups of the active threads are read, or complete."""
        w0, w1, c0, c1 = ctx.rect
        left = []
        for copy in self.copies:
            inside = w0 <= copy.warp < w1 and c0 <= copy.slot < c1
            waits = inside and active[copy.warp - w0, copy.slot - c0, copy.lane]
            limit = self.closed[copy.warp, copy.slot, copy.lane] - newest
            if waits and copy.group < limit:
                self._know(copy)
                if not reads:
                    self._write(copy)
            if not (copy.waited and copy.written):
                left.append(copy)
        self.copies = left

    def on_step(self, ctx: BlockContext) -> None:
        """Under the random policy copies read and write at any time."""
        for copy in self.copies:
            if self.wave.rng.random() < 0.1:
                if copy.data is None:
                    self._read(copy)
                else:
                    self._write(copy)

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        if not self.copies:
            return
        gone = lanes.full_mask()
        left = []
        for copy in self.copies:
            if not gone[copy.warp, copy.slot, copy.lane]:
                left.append(copy)
                continue
            if not copy.waited:
                text = "the thread exits and has not waited until its bulk copy has read its source"
                rule = "exit-with-pending-reads"
                report_warp(ctx, rule, text, copy.slot, copy.warp, instr=copy.instr)
            self._know(copy)
            self._write(copy)
        self.copies = left

    def describe(self) -> list[str]:
        lines = sorted({copy.instr.line for copy in self.copies if not copy.written})
        return [f"bulk copies of PTX lines {lines} are pending"] if lines else []
