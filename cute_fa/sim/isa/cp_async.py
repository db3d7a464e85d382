"""Non-bulk asynchronous copies: ``cp.async`` and its groups (PTX ISA 9.7.9.25.3).

Each thread's copies form groups: ``commit_group`` closes one, ``wait_group N`` waits until at most
the N youngest closed groups are pending. Until the wait, the bytes at the destination are open:
reading or writing them is a hazard, for the copying thread too. When the data moves is a policy:
``eager`` at the copy, ``late`` at the wait that covers it (the destination is poisoned until then,
and the source is read as late), ``random`` one of the two for each executed copy, seeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Decoded, Mask, Subsystem, effect, subsystem
from cute_fa.sim.memory import WORDS, count_sectors, poison
from cute_fa.sim.shared_memory import fault_of

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

Rect = tuple[int, int, int, int]


@dataclass(eq=False)
class Copy:
    """One executed ``cp.async``.

    Attributes:
        rect: warps and CTA slots that executed it.
        instr: the instruction.
        nbytes: bytes per thread written to shared memory.
        index: element numbers of the destinations, ``(w, c, 32)`` (see ``SharedMemory.locate``).
        source: global addresses; source_bytes: how many bytes are read there, the rest are zero.
        group: number of the group that the copy will be closed into, per thread or for all.
        pending: threads whose copy has not been waited for; None: all of ``rect``.
        moved: the data was copied at issue.
    """

    rect: Rect
    instr: ptx.Instr
    nbytes: int
    index: np.ndarray
    source: np.ndarray
    source_bytes: np.ndarray | None
    group: int | np.ndarray
    pending: Mask
    moved: bool


@subsystem
class CopyQueue(Subsystem):
    """The pending copies of one wave, and how many groups each thread has closed."""

    name = "cp-async"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.closed = np.zeros((wave.num_warps, wave.num_ctas, 32), np.int32)
        self.copies: list[Copy] = []

    def describe(self) -> list[str]:
        if not self.copies:
            return []
        lines = sorted({copy.instr.line for copy in self.copies})
        return [f"cp.async: copies of PTX lines {', '.join(map(str, lines))} are pending"]

    def find(self, offset: int) -> ptx.Instr | None:
        """The instruction of a pending copy to byte ``offset`` of the wave's shared memory."""
        for copy in reversed(self.copies):
            hit = copy.index == offset // copy.nbytes
            if (hit if copy.pending is None else hit & copy.pending).any():
                return copy.instr
        return None

    def next_group(self, rect: Rect) -> int | np.ndarray:
        """The number of the group that is open now: one for all threads where they agree."""
        w0, w1, c0, c1 = rect
        closed = self.closed[w0:w1, c0:c1]
        first = int(closed[0, 0, 0])
        return first if (closed == first).all() else closed.copy()

    def commit(self, ctx: BlockContext, mask: Mask) -> None:
        """Close the open group of each thread (empty ones count too)."""
        w0, w1, c0, c1 = ctx.rect
        self.closed[w0:w1, c0:c1] += 1 if mask is None else mask

    def wait(self, ctx: BlockContext, mask: Mask, newest: int) -> None:
        """Complete the closed groups of each thread but the ``newest``."""
        w0, w1, c0, c1 = ctx.rect
        closed = self.closed[w0:w1, c0:c1]
        limit = int(closed[0, 0, 0]) - newest
        uniform = mask is None and bool((closed == closed[0, 0, 0]).all())
        left = []
        for copy in self.copies:
            r0, r1, s0, s1 = copy.rect
            if r1 <= w0 or w1 <= r0 or s1 <= c0 or c1 <= s0:
                left.append(copy)
                continue
            inside = w0 <= r0 and r1 <= w1 and c0 <= s0 and s1 <= c1
            if uniform and inside and isinstance(copy.group, int):
                if copy.group < limit:
                    self._finish(ctx, copy, copy.pending)
                else:
                    left.append(copy)
                continue
            done = self._covered(copy, ctx.rect, mask, newest)
            if done.any():
                self._finish(ctx, copy, done)
                rest = ~done if copy.pending is None else copy.pending & ~done
                if not rest.any():
                    continue
                copy.pending = rest
            left.append(copy)
        self.copies = left

    def arrive(self, ctx: BlockContext, slot: int, warp: int, lanes: np.ndarray) -> None:
        """All copies of some lanes of one warp are complete, and an mbarrier says so."""
        rect = warp, warp + 1, slot, slot + 1
        left = []
        for copy in self.copies:
            everything = np.iinfo(np.int32).min
            done = self._covered(copy, rect, lanes[None, None], everything)
            if done.any():
                self._finish(ctx, copy, done)
                copy.pending = ~done if copy.pending is None else copy.pending & ~done
            if copy.pending is None or copy.pending.any():
                left.append(copy)
        self.copies = left

    def _covered(self, copy: Copy, rect: Rect, mask: Mask, newest: int) -> np.ndarray:
        """The threads of ``copy`` whose group the wait of ``rect`` and ``mask`` covers."""
        r0, r1, s0, s1 = copy.rect
        w0, w1, c0, c1 = rect
        waiting = np.zeros(self.closed.shape, bool)
        waiting[w0:w1, c0:c1] = True if mask is None else mask
        closed = self.closed[r0:r1, s0:s1].astype(np.int64)
        done = waiting[r0:r1, s0:s1] & (copy.group < closed - newest)
        return done if copy.pending is None else done & copy.pending

    def _finish(self, ctx: BlockContext, copy: Copy, lanes: Mask) -> None:
        """Let the copies of ``lanes`` be complete and known to the threads that waited."""
        if not copy.moved:
            self.move(ctx, copy, lanes)
        shadow = ctx.subsystem("shared").shadow
        if shadow.active:
            shadow.finish_copy(copy.rect, copy.index, copy.nbytes, lanes, copy.instr)

    def move(self, ctx: BlockContext, copy: Copy, lanes: Mask) -> None:
        """Read the sources and write the destinations of ``lanes`` (None: all of the copy's)."""
        nbytes = copy.nbytes
        memory = ctx.wave.memory
        fault = _quiet if copy.instr is not ctx.instr else fault_of(ctx)
        if copy.source_bytes is None:
            values = memory.gather(copy.source, nbytes, lanes, fault)
        else:
            values = self._gather_partial(copy, lanes, fault)
        ctx.subsystem("shared").put(copy.index, nbytes, values, lanes)

    def _gather_partial(self, copy: Copy, lanes: Mask, fault: Any) -> np.ndarray:
        """Sources of which some threads read fewer bytes than they write: the rest is zero."""
        nbytes, sizes = copy.nbytes, copy.source_bytes
        assert sizes is not None
        active = np.ones(sizes.shape, bool) if lanes is None else lanes
        values = np.zeros((*sizes.shape, nbytes), np.uint8)
        whole = active & (sizes == nbytes)
        memory = self.wave.memory
        if whole.any():
            full = memory.gather(copy.source, nbytes, whole, fault)
            values[whole] = full.view(np.uint8).reshape(values.shape)[whole]
        part = active & ~whole & (sizes > 0)
        for byte in range(nbytes if part.any() else 0):
            reads = part & (sizes > byte)
            if reads.any():
                one = memory.gather(copy.source + np.uint64(byte), 1, reads, fault)
                values[reads, byte] = one[reads]
        return values.view(WORDS[nbytes])[..., 0]


def _quiet(rule: str, message: str, lanes: np.ndarray, addresses: np.ndarray) -> None:
    """Faults of a copy are reported once, when it is issued; the move at the wait stays silent."""


@effect("cp.async.ca", "cp.async.cg")
class CpAsync(Decoded):
    """``cp.async [dst], [src], cp-size{, src-size | ignore-src}{, cache-policy}``.

    4, 8 or 16 bytes per thread from global to shared memory; bytes past ``src-size``, or all if
    ``ignore-src`` is true, are written as zero without reading the source.
    """

    counter_class = "cp_async"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        operands = list(instr.operands)
        if "L2::cache_hint" in instr.parts:
            operands.pop()
        if not 3 <= len(operands) <= 4 or not isinstance(operands[2], ptx.Imm):
            raise self.unsupported("operands")
        self.nbytes = operands[2].value
        if self.nbytes not in (4, 8, 16) or ("cg" in instr.parts and self.nbytes != 16):
            raise self.unsupported(f"{self.nbytes} bytes per thread")
        limit = operands[3:]
        self.sources = (operands[0], operands[1], *limit)
        self.source_dtypes = (None, None, *(None for _ in limit))
        self.ignore_source = bool(limit) and self._is_predicate(limit[0], kernel)
        self.source_limit = limit[0].value if limit and isinstance(limit[0], ptx.Imm) else None

    @staticmethod
    def _is_predicate(operand: ptx.Operand, kernel: ptx.Kernel) -> bool:
        if isinstance(operand, ptx.Negated):
            return True
        return isinstance(operand, ptx.Reg) and kernel.registers[operand.name] == ".pred"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        destination, source, *limit = sources
        sizes = self._source_bytes(ctx, mask, source.shape, *limit)
        shared = ctx.subsystem("shared")
        queue: CopyQueue = ctx.subsystem(CopyQueue.name)
        index, good, faulty = shared.locate(ctx, destination, self.nbytes, mask)
        if faulty is not None:
            if good is None or not good.any():
                return
            mask = good
        self._check_source(ctx, mask, source, sizes)
        if shared.shadow.active:
            shared.shadow.begin_copy(ctx, index, self.nbytes, mask)
        policy = ctx.wave.options.completion
        late = policy == "late" or (policy == "random" and bool(ctx.wave.rng.random() < 0.5))
        copy = Copy(
            ctx.rect,
            self.instr,
            self.nbytes,
            index,
            source.copy() if late else source,
            sizes,
            queue.next_group(ctx.rect),
            None if mask is None else mask.copy(),
            moved=not late,
        )
        if late:
            shared.put(index, self.nbytes, poison((1, 1, 1), self.nbytes), mask)
        else:
            queue.move(ctx, copy, mask)
        queue.copies.append(copy)
        self._count(ctx, mask, source, sizes)

    def _source_bytes(
        self, ctx: BlockContext, mask: Mask, shape: tuple[int, ...], *limit: np.ndarray
    ) -> np.ndarray | None:
        """Bytes that each thread reads; None if all read ``nbytes``."""
        if not limit or self.source_limit == self.nbytes:
            return None
        if self.ignore_source:
            sizes = np.where(limit[0], 0, self.nbytes)
        else:
            sizes = limit[0].astype(np.int64)
        sizes = np.broadcast_to(sizes, shape)
        wrong = sizes > self.nbytes
        if mask is not None:
            wrong = wrong & mask
        if wrong.any():
            text = f"src-size {int(sizes[wrong][0])} exceeds cp-size {self.nbytes}"
            report_lanes(ctx, "copy-size", text, wrong)
        sizes = np.minimum(sizes, self.nbytes)
        whole = sizes == self.nbytes
        return None if (whole if mask is None else whole | ~mask).all() else sizes

    def _check_source(
        self, ctx: BlockContext, mask: Mask, source: np.ndarray, sizes: np.ndarray | None
    ) -> None:
        """Report source addresses that are not aligned to the copy size, or bad when moved late."""
        reading = mask
        if sizes is not None:
            reading = sizes > 0 if mask is None else mask & (sizes > 0)
            if not reading.any():
                return
            part = reading & (sizes < self.nbytes) & (source % np.uint64(self.nbytes) != 0)
            if part.any():
                text = f"{self.nbytes}-byte copy from an address that is no multiple of it"
                report_lanes(ctx, "global-misaligned", text, part, source)
            reading = reading & (sizes == self.nbytes)
            if not reading.any():
                return
        if ctx.wave.options.completion != "eager":
            ctx.wave.memory.gather(source, self.nbytes, reading, fault_of(ctx))

    def _count(
        self, ctx: BlockContext, mask: Mask, source: np.ndarray, sizes: np.ndarray | None
    ) -> None:
        lanes = source.size if mask is None else int(np.count_nonzero(mask))
        ctx.counters.add("shared_bytes_written", lanes * self.nbytes)
        if sizes is None:
            read, reading = lanes * self.nbytes, mask
        else:
            taken = sizes if mask is None else np.where(mask, sizes, 0)
            read, reading = int(taken.sum()), taken > 0
        ctx.counters.add("global_bytes_read", read)
        if read:
            ctx.counters.add("global_sectors_read", count_sectors(source, reading))


@effect("cp.async.commit_group")
class CommitGroup(Decoded):
    """``cp.async.commit_group`` (PTX ISA 9.7.9.25.3.2)."""

    counter_class = "cp_async"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        ctx.subsystem(CopyQueue.name).commit(ctx, mask)


@effect("cp.async.wait_group", "cp.async.wait_all")
class WaitGroup(Decoded):
    """``cp.async.wait_group N`` and ``wait_all`` (PTX ISA 9.7.9.25.3.3).

    ``wait_all`` also waits for copies that no group has been closed over. Nothing needs to block:
    the wait itself is what completes the copies.
    """

    counter_class = "cp_async"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.newest = 0
        if "wait_group" in instr.parts:
            self.newest = self.literal(instr.operands[0], "a group count")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        queue: CopyQueue = ctx.subsystem(CopyQueue.name)
        if "wait_all" in self.instr.parts:
            queue.commit(ctx, mask)
        queue.wait(ctx, mask, self.newest)
