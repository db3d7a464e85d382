"""What every warp of a launch did, in order: the record that ``Device(..., trace=True)`` keeps.

A trace is a list of *runs*, one for each basic block that some warps executed together, and of
*events*: what the instructions that synchronise or start asynchronous work were given (which
barrier, how many bytes). The number of a run within its wave is the trace's logical clock: it
orders what happened, and says nothing about how long it took.

:meth:`Trace.warp_steps` reads it as one warp's instruction stream. What a CTA's warps and engines
did beside each other, by the logical clock or by modelled cycles, is :mod:`cute_fa.sim.timeline`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.isa import Decoded, Mask
from cute_fa.sim.trace_events import EXTRACTORS, Event, Extracted

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.program import Program
    from cute_fa.sim.wave import BlockContext

Warp = tuple[int, int]  # CTA slot of the wave, warp of the CTA


@dataclass(frozen=True)
class Step:
    """One basic block that one warp executed.

    Attributes:
        clock: the logical clock; block: its number.
        events: of its instructions, by index into ``Kernel.body``.
    """

    clock: int
    block: int
    events: Mapping[int, tuple[Event, ...]]


@dataclass
class WaveTrace:
    """The runs and events of one wave.

    Attributes:
        runs: (block, lanes) by logical clock.
        events: by (clock, instruction index), for each warp.
        failed: warps whose blocking instruction has to be executed again, by clock.
    """

    cta_ids: np.ndarray
    num_warps: int
    cluster_size: int
    runs: list[tuple[int, LaneSet]] = field(default_factory=list)
    events: dict[tuple[int, int], Extracted] = field(default_factory=dict)
    failed: dict[int, set[Warp]] = field(default_factory=dict)

    def run(self, block: int, lanes: LaneSet) -> None:
        """Lanes are about to execute a block."""
        self.runs.append((block, lanes))

    def effect(
        self,
        handler: Decoded,
        ctx: BlockContext,
        mask: Mask,
        sources: Sequence[Any],
        out: Any,
    ) -> None:
        """An effect or blocking instruction has been carried out."""
        extract = EXTRACTORS.get(handler.counter_class)
        if extract is None:
            return
        clock = len(self.runs) - 1
        failed = {warp for ticket in ctx.parked if ticket.retry for warp in _warps(ticket.lanes)}
        if ctx.yielded is not None:
            failed |= set(_warps(ctx.yielded))
        if failed:
            self.failed.setdefault(clock, set()).update(failed)
        found = extract(handler, ctx, mask, sources, out)
        kept = {warp: events for warp, events in found.items() if warp not in failed}
        if kept:
            self.events[clock, handler.instr.index] = kept


def _warps(lanes: LaneSet) -> Iterator[Warp]:
    return ((slot, warp) for warp, slot in lanes.each_warp())


class Trace:
    """The trace of one launch.

    Attributes:
        program: the kernel's blocks; waves: in order.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.waves: list[WaveTrace] = []

    @property
    def kernel(self) -> ptx.Kernel:
        return self.program.kernel

    def ctas(self) -> list[tuple[int, int, int]]:
        """blockIdx of every CTA, in the order in which they ran."""
        return [_index(row) for wave in self.waves for row in wave.cta_ids]

    def find(self, cta: tuple[int, int, int]) -> tuple[WaveTrace, int]:
        """The wave and slot of a CTA; KeyError if the launch had none of that index."""
        for wave in self.waves:
            for slot, row in enumerate(wave.cta_ids):
                if _index(row) == cta:
                    return wave, slot
        raise KeyError(cta)

    def warp_steps(self, cta: tuple[int, int, int], warp: int) -> list[Step]:
        """What one warp executed, in order; tries of blocking instructions that failed left out."""
        wave, slot = self.find(cta)
        me = slot, warp
        out = []
        for clock, (block, lanes) in enumerate(wave.runs):
            if not _contains(lanes, warp, slot) or me in wave.failed.get(clock, ()):
                continue
            compiled = self.program.blocks[block]
            found = {}
            for index in compiled.handlers:
                events = wave.events.get((clock, index), {}).get(me)
                if events:
                    found[index] = events
            out.append(Step(clock, block, found))
        return out

    def executed(self) -> frozenset[int]:
        """Indices into ``Kernel.body`` of the instructions that some warp reached."""
        blocks = {block for wave in self.waves for block, _ in wave.runs}
        return frozenset(instr.index for block in blocks for instr in self.program.body_of(block))

    def shared_addresses(
        self, warps: Container[int] | None = None
    ) -> dict[int, dict[str, tuple[int, ...]]]:
        """Where instructions went in shared memory: by instruction, then "barrier" or "tile".

        Offsets within the CTA's shared memory, sorted. Only instructions with events have any.

        Args:
            warps: whose events count; None for every warp's.
        """
        found: dict[int, dict[str, set[int]]] = {}
        for wave in self.waves:
            for (_, index), of_warps in wave.events.items():
                places = found.setdefault(index, {})
                for (_, warp), events in of_warps.items():
                    if warps is not None and warp not in warps:
                        continue
                    for event in events:
                        if event.barrier is not None:
                            places.setdefault("barrier", set()).add(event.barrier[1])
                        if event.tile is not None:
                            places.setdefault("tile", set()).add(event.tile)
        return {
            index: {name: tuple(sorted(offsets)) for name, offsets in places.items()}
            for index, places in found.items()
        }


def _index(row: np.ndarray) -> tuple[int, int, int]:
    x, y, z = (int(i) for i in row)
    return x, y, z


def _contains(lanes: LaneSet, warp: int, slot: int) -> bool:
    w0, w1, c0, c1 = lanes.rect
    if not (w0 <= warp < w1 and c0 <= slot < c1):
        return False
    return lanes.mask is None or bool(lanes.warp_any[warp - w0, slot - c0])
