"""Shadow of shared memory: who wrote and read each granule last, and what is still on its way.

A granule is as many bytes as the smallest shared access of the kernel, so that no access covers a
granule in part and nothing is reported that did not happen. Each granule has the stamp
(:mod:`cute_fa.sim.race`) of its last write, and for each agent that of its last read. Two values
stand for "never written" and "a copy is in flight"; both exceed every stamp, so that one comparison
of the largest stamp under an access with the agent's floor clears the whole access of being a race,
uninitialised and early. What fails the comparison is looked at granule by granule.

Strong accesses (atomics, volatile, relaxed, …) do not race with each other. Stamps keep the last
access only; an unordered earlier write hidden behind an ordered later one was itself reported.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.ptx import Instr, Kernel
from cute_fa.sim import hazards
from cute_fa.sim.accesses import has_shared_atomics, is_strong, shared_access_bytes
from cute_fa.sim.engines import engine_rows, generic_rows, uses_tensor_memory
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.race import IN_FLIGHT, LIVE_BARRIER, NEVER, Clocks
from cute_fa.sim.tensor_map_changes import RULE as MAP_RULE
from cute_fa.sim.tensor_map_changes import changes_maps
from cute_fa.sim.tensor_stamps import RULES as TENSOR_RULES
from cute_fa.sim.tensor_stamps import STRICT_RULE

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

RULES = (
    "shared-race",
    "uninitialised-shared-read",
    "read-before-arrival",
    "write-while-copy-in-flight",
    "overwrite-while-reading",
    "missing-proxy-fence",
    "unfenced-async-overwrite",
    MAP_RULE,
)

SPARSE_BYTES = 1 << 28
"""Arrays from here on are made of small pages; below, large ones are faster."""

Mask = np.ndarray | None


@lru_cache(maxsize=64)
def granule_bytes(kernel: Kernel) -> int | None:
    """Bytes of the smallest shared access in the kernel; None if it has none."""
    sizes = [shared_access_bytes(instr) for instr in kernel.body]
    return min((size for size in sizes if size is not None), default=None)


def sparse_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """uint32 zeros of which few are ever touched.

    An array of numpy is made of pages of 2 MB: a cluster's agents, each of which reads a little of
    its CTA's memory, would make gigabytes resident.
    """
    nbytes = 4 * math.prod(shape)
    if nbytes < SPARSE_BYTES or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, np.uint32)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.uint32).reshape(shape)


@subsystem
class SharedShadow(Subsystem):
    """The shadow of one wave's shared memory.

    ``index`` arguments are element numbers in ``wave.smem`` seen as elements of ``nbytes`` bytes
    (all CTAs in a row), shaped ``(w, c, 32)`` over ``ctx.rect``; ``mask`` is as in ``Decoded.run``.

    Attributes:
        active: some rule that needs the shadow is on, and the kernel touches shared memory.
        clocks: the wave's vector clocks; None if not active.
        followers: called when the clocks forget their past; other users of them start afresh too.
        last_reads: stamp of each agent's last read, 0 for none.
        reading: how many areas each agent is still reading.
    """

    name = "shared-shadow"

    def __init__(self) -> None:
        self.active = False
        self.clocks: Clocks | None = None
        self.followers: list[Callable[[], None]] = []

    def on_wave_start(self, wave: Wave) -> None:
        wanted = hazards.selected_rules(wave.options.checks)
        granule = granule_bytes(wave.kernel)
        tensor = uses_tensor_memory(wave.kernel)
        rules = (*RULES, *TENSOR_RULES) if tensor else RULES
        if granule is None or wanted.isdisjoint(rules):
            return
        self.active = True
        self.wave = wave
        self.granule = granule
        engines = engine_rows(wave.kernel, wave.num_warps)
        self.clocks = Clocks(
            wave.num_warps,
            wave.cta_rank,
            wave.cluster_size,
            engines,
            proxies=engines > 0,
            tensor=tensor,
            announced=tensor and STRICT_RULE in wanted,
            maps=MAP_RULE in wanted and changes_maps(wave.kernel),
            generic=generic_rows(wave.kernel),
        )
        self._has_atomics = has_shared_atomics(wave.kernel)
        self._granules = wave.smem.nbytes // granule
        self._writes = np.full(self._granules, NEVER, np.uint32)
        self._reads = sparse_zeros((self.clocks.agents, self._granules))
        self.last_reads = np.zeros(self.clocks.agents, np.uint32)
        self.reading = np.zeros(self.clocks.agents, np.int64)
        self._views: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}
        self._read_rows: dict[tuple[int, tuple[int, int, int, int]], np.ndarray] = {}

    def read(self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask) -> None:
        """Check and record a read."""
        clocks = self._clocks()
        stamps = self._late_writes(ctx, index, nbytes, mask)
        if stamps is not None:
            self._examine_read(ctx, index, nbytes, stamps, mask)
        if self._has_atomics and not is_strong(ctx.instr):
            self._check_atomics(ctx, index, nbytes, mask)
        event = clocks.access(ctx.instr.index)
        w0, w1, c0, c1 = ctx.rect
        self.last_reads[clocks.agent[w0:w1, c0:c1]] = event
        _, reads, count = self._view(nbytes)
        rows = index + self._row_offsets(nbytes, ctx.rect)
        stamp = np.full(count, event, np.uint32).view(reads.dtype)[0]
        reads[rows if mask is None else rows[mask]] = stamp

    def _late_writes(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask
    ) -> np.ndarray | None:
        """Stamps of the last writes to the lanes' bytes, 0 in inactive lanes; None if the warps
        have seen what every agent did until later than all of them."""
        writes, _, count = self._view(nbytes)
        w0, w1, c0, c1 = ctx.rect
        stamps = writes.take(index).view(np.uint32).reshape(*index.shape, count)
        if mask is not None:
            stamps[~mask] = 0
        worst = stamps.reshape(*index.shape[:2], -1).max(axis=-1)
        return None if (worst < self._clocks().floor[w0:w1, c0:c1]).all() else stamps

    def late_readers(self, rect: tuple[int, int, int, int]) -> list[int]:
        """Agents some of whose reads may not come before what the agents of ``rect`` do now."""
        clocks = self._clocks()
        w0, w1, c0, c1 = rect
        limits = clocks.seen[w0:w1, c0:c1, : clocks.agents].min(axis=(0, 1))
        late = (self.last_reads >= limits) & (self.last_reads != 0)
        return np.flatnonzero(late | (self.reading > 0)).tolist()

    def write(self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask) -> None:
        """Check and record a write that is done when the instruction is."""
        self._check_write(ctx, index, nbytes, mask)
        clocks = self._clocks()
        stamps = self._stamp(ctx.rect, clocks.access(ctx.instr.index), nbytes)
        conflicts = self._put(ctx, index, nbytes, mask, stamps)
        if conflicts is not None and not is_strong(ctx.instr):
            lanes, agents = conflicts
            first = int(agents[tuple(np.argwhere(lanes)[0])])
            text = f"warps write the same {self.granule} bytes of shared memory in one instruction"
            other = self._site(ctx, lanes, ctx.instr, "write", first)
            self._report(ctx, "shared-race", text, lanes, index, nbytes, other)

    def begin_copy(self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask) -> None:
        """Check the start of an asynchronous write, and mark its destination as in flight."""
        self._check_write(ctx, index, nbytes, mask)
        stamps = self._stamp(ctx.rect, np.uint32(IN_FLIGHT), nbytes)
        conflicts = self._put(ctx, index, nbytes, mask, stamps)
        if conflicts is not None:
            lanes, agents = conflicts
            first = int(agents[tuple(np.argwhere(lanes)[0])])
            text = "two warps copy to the same shared memory in one instruction"
            other = self._site(ctx, lanes, ctx.instr, "copy", first)
            self._report(ctx, "write-while-copy-in-flight", text, lanes, index, nbytes, other)

    def finish_copy(
        self,
        rect: tuple[int, int, int, int],
        index: np.ndarray,
        nbytes: int,
        mask: Mask,
        instr: Instr,
    ) -> None:
        """The agents of ``rect`` know that their copies have arrived: they count as writes now."""
        writes, _, _ = self._view(nbytes)
        stamps = self._stamp(rect, self._clocks().access(instr.index), nbytes)
        if mask is None:
            writes[index] = stamps
        else:
            writes[index[mask]] = np.broadcast_to(stamps, index.shape)[mask]

    def _clocks(self) -> Clocks:
        assert self.clocks is not None
        if self.clocks.full:
            self.clocks.forget()
            settled = (self._writes != NEVER) & (self._writes < IN_FLIGHT)
            self._writes[settled] = self.clocks.agents
            self._forget_reads()
            for restart in self.followers:
                restart()
        return self.clocks

    def _forget_reads(self) -> None:
        """Forget completed reads; those of asynchronous copies that still read stay.

        The stamps are new zeros, since most of them have never been touched: writing zeros would
        make the whole array resident, gigabytes for large clusters with byte accesses.
        """
        reading = [
            (agent, np.flatnonzero(self._reads[agent] >= IN_FLIGHT))
            for agent in np.flatnonzero(self.reading)
        ]
        self.last_reads[:] = 0
        self._reads = sparse_zeros(self._reads.shape)
        self._views.clear()
        for agent, granules in reading:
            if granules.size:
                self._reads[agent, granules] = IN_FLIGHT

    def _view(self, nbytes: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Write stamps and read stamps (all agents in a row) in elements of one access each."""
        known = self._views.get(nbytes)
        if known is None:
            count = nbytes // self.granule
            assert count, f"{nbytes}-byte access, but the granule is {self.granule}"
            dtype = np.dtype(np.uint32 if count == 1 else f"V{4 * count}")
            known = self._writes.view(dtype), self._reads.reshape(-1).view(dtype), count
            self._views[nbytes] = known
        return known

    def _row_offsets(self, nbytes: int, rect: tuple[int, int, int, int]) -> np.ndarray:
        """Where each agent's read stamps begin, ``(w, c, 1)``, in elements of ``nbytes``."""
        key = nbytes, rect
        known = self._read_rows.get(key)
        if known is None:
            w0, w1, c0, c1 = rect
            stride = self._granules * self.granule // nbytes
            agent = self._clocks().agent[w0:w1, c0:c1]
            known = self._read_rows[key] = agent.astype(np.int64)[..., None] * stride
        return known

    def _stamp(self, rect: tuple[int, int, int, int], event: np.uint32, nbytes: int) -> np.ndarray:
        """The stamp of each agent of ``rect``, as elements of one access: ``(w, c, 1)``."""
        writes, _, count = self._view(nbytes)
        w0, w1, c0, c1 = rect
        stamps = self._clocks().agent[w0:w1, c0:c1, None] + event
        return np.repeat(stamps, count, axis=-1).view(writes.dtype)

    def _put(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask, stamps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Write stamps; returns lanes that another warp of the instruction overwrote, and who."""
        writes, _, count = self._view(nbytes)
        if mask is None:
            writes[index] = stamps
        else:
            writes[index[mask]] = np.broadcast_to(stamps, index.shape)[mask]
        if index.shape[0] == 1 and self.wave.cluster_size == 1:
            return None
        now = writes.take(index).view(np.uint32).reshape(*index.shape, count)
        lost = now != stamps.view(np.uint32).reshape(*stamps.shape[:2], 1, count)
        if mask is not None:
            lost &= mask[..., None]
        if not lost.any():
            return None
        agents = np.where(lost, now % np.uint32(self._clocks().agents), 0).max(axis=-1)
        return lost.any(axis=-1), agents

    def _check_write(self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask) -> None:
        stamps = self._late_writes(ctx, index, nbytes, mask)
        if stamps is not None:
            self._examine_write(ctx, index, nbytes, stamps)
        for agent, earlier in self._earlier_reads(ctx, index, nbytes, mask):
            self._examine_reader(ctx, index, nbytes, agent, earlier)

    def _earlier_reads(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(agent, stamps) of the reads that do not all come before what the lanes do now.

        One agent at a time: the stamps of all agents of a large cluster are hundreds of megabytes.
        """
        clocks = self._clocks()
        _, reads, count = self._view(nbytes)
        w0, w1, c0, c1 = ctx.rect
        for agent in self.late_readers(ctx.rect):
            row = reads.reshape(clocks.agents, -1)[agent]
            stamps = row.take(index).view(np.uint32).reshape(*index.shape, count)
            if mask is not None:
                stamps[~mask] = 0
            newest = stamps.reshape(*index.shape[:2], -1).max(axis=-1)
            if ((newest >= clocks.seen[w0:w1, c0:c1, agent]) & (newest != 0)).any():
                yield agent, stamps

    def _limits(self, ctx: BlockContext, stamps: np.ndarray) -> np.ndarray:
        """For each stamp, the limit below which accesses of its agent come before the lane."""
        clocks = self._clocks()
        w0, w1, c0, c1 = ctx.rect
        agents = (stamps % np.uint32(clocks.agents)).astype(np.int64)
        seen = clocks.seen[w0:w1, c0:c1]
        flat = np.take_along_axis(seen, agents.reshape(*agents.shape[:2], -1), axis=-1)
        return flat.reshape(stamps.shape)

    def _examine_read(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, stamps: np.ndarray, mask: Mask
    ) -> None:
        """Find out granule by granule what is wrong with a read, if anything."""
        suspect = stamps >= self._limits(ctx, stamps)
        if mask is not None:
            suspect &= mask[..., None]
        never = suspect & (stamps == NEVER)
        flying = suspect & (stamps >= IN_FLIGHT) & ~never
        race = suspect & ~never & ~flying
        if never.any():
            text = f"a {nbytes}-byte read covers shared memory that was never written"
            rule = "uninitialised-shared-read"
            self._report(ctx, rule, text, np.asarray(never.any(axis=-1)), index, nbytes, None)
        if flying.any():
            text = "shared memory is read while a copy to it has not been waited for"
            self._report_flying(ctx, "read-before-arrival", text, flying, stamps, index, nbytes)
        self._report_race(ctx, race, stamps, "write", index, nbytes)

    def _check_atomics(self, ctx: BlockContext, index: np.ndarray, nbytes: int, mask: Mask) -> None:
        """A read and all atomics before it: the stamp of a write only tells of the last of them,
        and they need no order among themselves. Each has left the stamp of its own read."""
        for agent, stamps in self._earlier_reads(ctx, index, nbytes, mask):
            suspect = self._unordered(ctx, agent, stamps) & (stamps < IN_FLIGHT)
            for stamp in np.unique(stamps[suspect]):
                number = self._clocks().instruction(int(stamp))
                if number is not None and self.wave.kernel.body[number].op in ("atom", "red"):
                    these = suspect & (stamps == stamp)
                    by = stamps + np.uint32(agent)
                    self._report_race(ctx, these, by, "atomic", index, nbytes)

    def _unordered(self, ctx: BlockContext, agent: int, stamps: np.ndarray) -> np.ndarray:
        """Which reads of an agent do not come before what the lanes do now."""
        w0, w1, c0, c1 = ctx.rect
        limit = self._clocks().seen[w0:w1, c0:c1, agent][..., None, None]
        return np.asarray((stamps >= limit) & (stamps != 0))

    def _examine_write(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, stamps: np.ndarray
    ) -> None:
        """Find out granule by granule whether a write conflicts with writes before it."""
        suspect = (stamps >= self._limits(ctx, stamps)) & (stamps != NEVER) & (stamps != 0)
        if not suspect.any():
            return
        flying = suspect & (stamps >= IN_FLIGHT)
        if flying.any():
            text = "shared memory is written while a copy to it has not been waited for"
            rule = "write-while-copy-in-flight"
            self._report_flying(ctx, rule, text, flying, stamps, index, nbytes)
        self._report_race(ctx, suspect & ~flying, stamps, "write", index, nbytes)

    def _examine_reader(
        self, ctx: BlockContext, index: np.ndarray, nbytes: int, agent: int, earlier: np.ndarray
    ) -> None:
        """Report a write that conflicts with reads of one agent before it."""
        pending = np.asarray((earlier >= IN_FLIGHT).any(axis=-1))
        if pending.any():
            text = "shared memory is written while a copy or a matrix product still reads it"
            self._report(ctx, "overwrite-while-reading", text, pending, index, nbytes, None)
        by = earlier + np.uint32(agent)
        self._report_race(ctx, self._unordered(ctx, agent, earlier), by, "read", index, nbytes)

    def _report_race(
        self,
        ctx: BlockContext,
        race: np.ndarray,
        stamps: np.ndarray,
        what: str,
        index: np.ndarray,
        nbytes: int,
    ) -> None:
        """Report unordered accesses, one hazard for each instruction that made the earlier one."""
        strong = is_strong(ctx.instr)
        for stamp in np.unique(stamps[race]):
            number = self._clocks().instruction(int(stamp))
            before = None if number is None else self.wave.kernel.body[number]
            if before is None or (strong and is_strong(before)):
                continue
            lanes = (race & (stamps == stamp)).any(axis=-1)
            agent = int(stamp) % self._clocks().agents
            kind = "a read" if ctx.instr.op in ("ld", "ldmatrix") else "a write"
            text = f"{kind} of shared memory is not ordered after another warp's {what}"
            other = self._site(ctx, lanes, before, what, agent)
            self._report(ctx, "shared-race", text, lanes, index, nbytes, other)

    def _report_flying(
        self,
        ctx: BlockContext,
        rule: str,
        text: str,
        flying: np.ndarray,
        stamps: np.ndarray,
        index: np.ndarray,
        nbytes: int,
    ) -> None:
        lanes = np.asarray(flying.any(axis=-1))
        first = tuple(np.argwhere(flying)[0])
        if stamps[first] == LIVE_BARRIER:
            text = "an ordinary access to the bytes of an mbarrier that is in use"
            self._report(ctx, "mbarrier-access", text, lanes, index, nbytes, None)
            return
        granule = int(index[first[:3]]) * (nbytes // self.granule) + int(first[3])
        agent = (int(stamps[first]) - IN_FLIGHT) % self._clocks().agents
        instr = self.wave.shared_state["cp-async"].find(granule * self.granule)
        other = None
        if instr is not None:
            other = self._site(ctx, lanes, instr, "copy begun", agent)
        self._report(ctx, rule, text, lanes, index, nbytes, other)

    def _site(
        self, ctx: BlockContext, lanes: np.ndarray, instr: Instr, what: str, agent: int
    ) -> hazards.AccessSite:
        """Where the access of an agent stands; ``lanes``: those in conflict with it."""
        rank, warp = divmod(agent, self._clocks().rows)
        if self.wave.cluster_size == 1:
            return hazards.site(self.wave, instr, what, warp, None)
        slot = ctx.rect[2] + int(np.argwhere(lanes)[0][1])
        slot += rank - int(self.wave.cta_rank[slot])
        return hazards.site(self.wave, instr, what, warp, slot)

    def _report(
        self,
        ctx: BlockContext,
        rule: str,
        text: str,
        lanes: np.ndarray,
        index: np.ndarray,
        nbytes: int,
        other: hazards.AccessSite | None,
    ) -> None:
        addresses = index * nbytes % self.wave.smem.shape[1]
        hazards.report_lanes(ctx, rule, text, lanes, addresses, other)
