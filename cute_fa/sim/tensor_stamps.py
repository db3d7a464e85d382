"""Stamps of tensor memory's cells, and what it means if an access meets one.

As for shared memory (:mod:`cute_fa.sim.shadow`), each granule has the stamp of its last write, and
of its last read by each warpgroup and by the tensor core. A granule is 16 lanes of one column:
every access covers such granules whole, but for a copy of four lanes and masked products.

What is ordered for tensor memory has columns of the clocks of its own (``Clocks.tensor``).
Synchronisation between threads orders it like everything else; the ``tcgen05`` fences order nothing
but it (PTX ISA 9.7.16.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.engines import warpgroups
from cute_fa.sim.race import IN_FLIGHT, NEVER, Clocks
from cute_fa.sim.tensor_pieces import HALF_LANES, QUARTER_LANES, QUARTERS, Piece

if TYPE_CHECKING:
    from cute_fa.ptx import Instr
    from cute_fa.sim.shadow import SharedShadow
    from cute_fa.sim.tensor_memory import Area
    from cute_fa.sim.wave import BlockContext, Wave

RULES = (
    "uninitialised-tmem-read",
    "tmem-race",
    "tmem-read-before-completion",
    "tmem-write-before-completion",
    "tmem-unwaited-store",
    "tmem-unwaited-load",
    "tmem-load-order",
    "missing-tcgen05-fence",
    "unfenced-tcgen05",
)
STRICT_RULE = "unfenced-tcgen05"

COLUMNS = 512
GRANULES = QUARTERS * 2  # of a column
_ALWAYS = np.uint32(0xFFFF_FFFF)

Index = tuple[int, slice, slice | np.ndarray]


@dataclass(eq=False)
class Unwaited:
    """A ``ld`` or ``st`` of some warps before their ``wait``.

    ``warps`` is bool over the piece's warps and slots: those that have not waited.
    """

    piece: Piece
    instr: Instr
    warps: np.ndarray


class TensorStamps:
    """The stamps of one wave's tensor memory; they exist from when they are first asked for."""

    def __init__(self, wave: Wave, used: bool) -> None:
        self.wave = wave
        self._wanted = used and not hazards.selected_rules(wave.options.checks).isdisjoint(RULES)
        self._ready = False

    @property
    def active(self) -> bool:
        """A rule that needs the shadow is on, and the kernel uses tensor memory."""
        if self._wanted and not self._ready:
            self._start()
        return self._wanted

    @property
    def _shared(self) -> SharedShadow:
        return self.wave.shared_state["shared-shadow"]

    def _start(self) -> None:
        clocks = self._shared.clocks
        if clocks is None or clocks.tensor is None:
            self._wanted = False
            return
        self._ready = True
        wave = self.wave
        # A stamp beyond all others from which the agent can be told as from any other.
        self._flying = np.uint32(IN_FLIGHT + -IN_FLIGHT % clocks.agents)
        shape = (wave.num_ctas, COLUMNS, QUARTERS, 2)
        self._writes = np.full(shape, NEVER, np.uint32)
        self._reads = np.zeros((warpgroups(wave.num_warps) + 1, *shape), np.uint32)
        flat = (wave.num_ctas, COLUMNS, GRANULES)
        self._area_writes = self._writes.reshape(flat)
        self._area_reads = self._reads.reshape(-1, *flat)
        # When operations of the tensor core were issued: the last one that read, and that wrote.
        self._issues = np.zeros((2, *flat), np.uint32)
        self._stores: list[Unwaited] = []
        self._loads: list[Unwaited] = []
        self._used_loads: list[Unwaited] = []
        # What fences where there are none would have ordered for each warp.
        self._unfenced = np.zeros((wave.num_warps, wave.num_ctas, clocks.agents), np.uint32)
        self._shared.followers.append(self._forget)
        # What tcgen05 fences on both sides have ordered for each warp; None if that is not asked.
        self._fenced: np.ndarray | None = None
        if clocks.announced is not None:
            self._fenced = np.zeros_like(self._unfenced)
            self._restart_fenced(0)

    def _clocks(self) -> Clocks:
        return self._shared._clocks()

    def _forget(self) -> None:
        clocks = self._shared.clocks
        assert clocks is not None
        self._writes[(self._writes != NEVER) & (self._writes < IN_FLIGHT)] = clocks.agents
        self._reads[self._reads < IN_FLIGHT] = 0
        self._issues[...] = 0
        self._unfenced[...] = 0
        self._restart_fenced(2 * clocks.agents)

    def _restart_fenced(self, limit: int) -> None:
        """Order everything before ``limit``, and what a warp did itself."""
        clocks = self._shared.clocks
        if self._fenced is None or clocks is None:
            return
        self._fenced[...] = limit
        own = clocks.agent[: self.wave.num_warps].astype(np.intp)[..., None]
        np.put_along_axis(self._fenced, own, np.uint32(IN_FLIGHT), axis=-1)

    # --- places -----------------------------------------------------------------------------------

    def _agents(self, clocks: Clocks, piece: Piece) -> np.ndarray:
        """The agents of a piece's warps, to broadcast to its shadow: ``(c, 1, w, 1)``."""
        return clocks.agent[piece.warps, piece.slots].T[:, None, :, None]

    def _agent(self, row: int, slot: int) -> np.uint32:
        return self._clocks().agent[row, slot]

    @staticmethod
    def _index(area: Area) -> Index:
        """The granules of an area."""
        lanes = area.lanes
        if isinstance(lanes, slice):
            granules = slice(lanes.start // HALF_LANES, -(-lanes.stop // HALF_LANES))
            return area.slot, area.columns, granules
        return area.slot, area.columns, np.unique(lanes // HALF_LANES)

    def _known(self, issuer: Issuer, agent: np.uint32) -> np.ndarray:
        """What is ordered before an operation of the tensor core, ``(agents,)``."""
        clocks = self._clocks()
        assert clocks.tensor is not None
        known = clocks.seen[issuer.first : issuer.last, issuer.slot, clocks.tensor].min(axis=0)
        known[agent] = _ALWAYS
        return known

    # --- checks -----------------------------------------------------------------------------------

    def _check(
        self, ctx: BlockContext, piece: Piece, stamps: np.ndarray, what: str, *, reading: bool
    ) -> None:
        """Compare what warps access with what was accessed before (``what``: a write or a read)."""
        clocks = self._clocks()
        seen = clocks.seen[piece.warps, piece.slots, clocks.tensor]
        agents = np.uint32(clocks.agents)
        if self._fenced is not None:
            self._check_fences(ctx, piece, stamps, seen, what)
        high, low = stamps.max(axis=(1, 3)).T, stamps.min(axis=(1, 3)).T
        nothing = NEVER if what == "write" else 0
        if not (reading and what == "write") and (low == nothing).all() and (high == low).all():
            return
        if (high == low).all():  # the usual case: one access left all stamps of a warp
            last = (high % agents).astype(np.intp)[..., None]
            if (high < np.take_along_axis(seen, last, axis=-1)[..., 0]).all():
                return
        w, c = (np.arange(n) for n in piece.shape)
        limits = seen[w[None, None, :, None], c[:, None, None, None], stamps % agents]
        bad = stamps >= limits
        if not reading:
            bad &= stamps != nothing
        for stamp in np.unique(stamps[bad]):
            at = np.argwhere(bad & (stamps == stamp))[0]
            slot, warp = piece.slots.start + int(at[0]), piece.warps.start + int(at[2])
            lane = warp % QUARTERS * QUARTER_LANES
            lane += (piece.halves.start + int(at[3])) * HALF_LANES
            address = lane << 16 | piece.columns.start + int(at[1])
            issuer = Issuer(slot, warp, warp + 1)
            self._blame(ctx, issuer, int(stamp), what, address, reading=reading)

    def _check_fences(
        self, ctx: BlockContext, piece: Piece, stamps: np.ndarray, seen: np.ndarray, what: str
    ) -> None:
        """What is ordered for a piece has to be ordered by tcgen05 fences, too."""
        assert self._fenced is not None
        fenced = self._fenced[piece.warps, piece.slots]
        w, c = (np.arange(n) for n in piece.shape)
        at = w[None, None, :, None], c[:, None, None, None], stamps % self._clocks().agents
        bad = (stamps >= fenced[at]) & (stamps < seen[at]) & (stamps != 0)
        for stamp in np.unique(stamps[bad]):
            slot, _, warp, _ = np.argwhere(bad & (stamps == stamp))[0]
            issuer = Issuer(
                piece.slots.start + int(slot), piece.warps.start + int(warp), piece.warps.stop
            )
            self._report_unfenced(ctx, issuer, int(stamp), what)

    def _report_unfenced(self, ctx: BlockContext, issuer: Issuer, stamp: int, what: str) -> None:
        text = "no tcgen05 fences on both sides of what orders two accesses to tensor memory"
        other = self._site(issuer.slot, stamp, what)
        report_warp(ctx, STRICT_RULE, text, issuer.slot, issuer.first, other=other)

    def _check_area(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        index: Index,
        stamps: np.ndarray,
        seen: np.ndarray,
        what: str,
        *,
        reading: bool,
    ) -> None:
        """The same for an area, with what is ordered before the access, ``(agents,)``."""
        agents = np.uint32(self._clocks().agents)
        if self._fenced is not None and ctx.instr.parts[1] != "dealloc":
            last = stamps % agents
            known = seen[last]
            bad = (stamps >= self._fenced[issuer.first, issuer.slot][last]) & (stamps < known)
            for stamp in np.unique(stamps[bad & (stamps != 0) & (known != _ALWAYS)]):
                self._report_unfenced(ctx, issuer, int(stamp), what)
        high = stamps.max()
        if high < seen[high % agents] and (stamps == high).all():
            return
        bad = stamps >= seen[stamps % agents]
        if what == "read":
            bad &= stamps != 0
        elif not reading:
            bad &= stamps != NEVER
        for stamp in np.unique(stamps[bad]):
            column, granule = np.argwhere(bad & (stamps == stamp))[0]
            _, columns, granules = index
            first = np.arange(GRANULES)[granules][granule]
            address = int(first) * HALF_LANES << 16 | columns.start + int(column)
            self._blame(ctx, issuer, int(stamp), what, address, reading=reading)

    def _check_used_loads(self, ctx: BlockContext, issuer: Issuer, index: Index) -> None:
        """Cells are written of which a load is over only because its registers were used."""
        slot, columns, granules = index
        hit = np.zeros(GRANULES, bool)
        hit[granules] = True
        for load in self._used_loads:
            piece = load.piece
            inside = piece.slots.start <= slot < piece.slots.stop
            if not inside or not meet(piece.columns, columns):
                continue
            lanes = hit.reshape(QUARTERS, 2)[piece.quarters, piece.halves].any(axis=1)
            warps = load.warps[:, slot - piece.slots.start]
            if not (lanes & warps).any():
                continue
            warp = piece.warps.start + int(np.argmax(lanes & warps))
            warps[lanes] = False
            text = "tensor memory is written after a load that only the use of its registers ended"
            other = hazards.site(self.wave, load.instr, "load", warp, slot)
            report_warp(ctx, "tmem-load-order", text, issuer.slot, issuer.first, other=other)

    def _blame(
        self,
        ctx: BlockContext,
        issuer: Issuer,
        stamp: int,
        what: str,
        address: int,
        *,
        reading: bool,
    ) -> None:
        """Report an access that conflicts with the one that left a stamp."""
        clocks = self._clocks()
        rule, text = self._verdict(clocks, issuer, stamp, what, reading)
        other = self._site(issuer.slot, stamp, what)
        report_warp(ctx, rule, text, issuer.slot, issuer.first, address=address, other=other)

    def _site(self, slot: int, stamp: int, what: str) -> hazards.AccessSite | None:
        """Where the access stands that left a stamp in the CTA of a slot, as far as is known."""
        clocks = self._clocks()
        rank, row = divmod(stamp % clocks.agents, clocks.rows)
        warp = row if row < self.wave.num_warps else None
        slot += rank - int(self.wave.cta_rank[slot])
        number = clocks.instruction(stamp) if stamp < IN_FLIGHT else None
        if number is not None:
            return hazards.site(self.wave, self.wave.kernel.body[number], what, warp, slot)
        if warp is None or stamp == NEVER:
            return None
        for access in (*self._stores, *self._loads):
            warps = access.piece.warps
            if warps.start <= warp < warps.stop:
                return hazards.site(self.wave, access.instr, what, warp, slot)
        return None

    def _verdict(
        self, clocks: Clocks, issuer: Issuer, stamp: int, what: str, reading: bool
    ) -> tuple[str, str]:
        """The rule that an access breaks, and what to say."""
        if stamp == NEVER:
            return "uninitialised-tmem-read", "tensor memory that was never written is read"
        agent = stamp % clocks.agents
        verb = "read" if reading else "written"
        unfenced = self._unfenced[issuer.first, issuer.slot, agent]
        if stamp < IN_FLIGHT and stamp < unfenced:
            text = f"tensor memory is {verb} behind relaxed synchronisation without tcgen05.fence"
            return "missing-tcgen05-fence", text
        if agent % clocks.rows >= self.wave.num_warps:
            rule = f"tmem-{'read' if reading else 'write'}-before-completion"
            doing = "writes" if what == "write" else "reads"
            text = f"tensor memory is {verb} while the tensor core {doing} it, as far as is known"
            return rule, text
        if stamp >= IN_FLIGHT:
            name = "store" if what == "write" else "load"
            text = f"tensor memory is {verb} and a {name} of it has not been waited for"
            return f"tmem-unwaited-{name}", text
        return "tmem-race", f"tensor memory is {verb} without order after another warp's {what}"


def meet(a: slice, b: slice) -> bool:
    """Whether two ranges have something in common."""
    return a.start < b.stop and b.start < a.stop
