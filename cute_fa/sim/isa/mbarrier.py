"""mbarrier instructions (PTX ISA 9.7.13.15); the state is in :mod:`cute_fa.sim.mbarriers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.isa import Decoded, Mask, WaitReason, effect, register_names
from cute_fa.sim.isa.proxy import Fences
from cute_fa.sim.mbarriers import Mbarrier, Mbarriers, pending_of
from cute_fa.sim.tensor_memory import TensorMemory
from cute_fa.sim.warp_flow import unsynchronised_arrivals

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

LANE_RULE = "unsynchronised-lanes"

Group = tuple[int, int, np.ndarray, int]  # w and c in the rectangle, lanes, address


def groups(ctx: BlockContext, mask: Mask, addresses: np.ndarray) -> Iterator[Group]:
    """The executing lanes by warp and address."""
    active = ctx.lanes.dense_mask() if mask is None else mask
    for w, c in np.argwhere(active.any(axis=-1)):
        lanes = active[w, c]
        row = addresses[w, c]
        chosen = row[lanes]
        if (chosen == chosen[0]).all():
            yield int(w), int(c), lanes, int(chosen[0])
        else:
            for address in np.unique(chosen):
                yield int(w), int(c), lanes & (row == address), int(address)


def knowledge_of(
    ctx: BlockContext, slot: int, warp: int, *, relaxed: bool = False
) -> np.ndarray | None:
    """What one warp passes on when it arrives, ``(columns,)``; None without race checks."""
    if relaxed:
        return ctx.subsystem(Fences.name).snapshot(slot, warp)
    clocks = ctx.subsystem(Mbarriers.name).areas.clocks
    return None if clocks is None else clocks.release((warp, warp + 1, slot, slot + 1))[0]


def note_unfenced(ctx: BlockContext, bar: Mbarrier, slot: int, warp: int) -> None:
    """Keep with the barrier what a relaxed arrival would pass on about tensor memory if fenced."""
    tensor = ctx.subsystem(TensorMemory.name).shadow
    if tensor.active:
        known = tensor.without_fence(slot, warp)
        bar.unfenced = known if bar.unfenced is None else np.maximum(bar.unfenced, known)


class _MbarrierInstruction(Decoded):
    """What all forms share: modifiers, and going through the lanes by warp and barrier."""

    counter_class = "mbarrier"
    allowed: frozenset[str] = frozenset()

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        known = {"b64", "cta", "cluster", "relaxed", "release", "acquire"}
        self.refuse_unknown(instr.parts[2:], known | self.allowed, ("shared",))
        self.relaxed = "relaxed" in instr.parts

    def barriers(
        self, ctx: BlockContext, mask: Mask, addresses: np.ndarray
    ) -> Iterator[tuple[Mbarrier, int, int, np.ndarray]]:
        """(barrier, w, c, lanes) for every good group of lanes."""
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        w0, _, c0, _ = ctx.rect
        for w, c, lanes, address in groups(ctx, mask, addresses):
            bar = table.find(ctx, address, c0 + c, w0 + w)
            if bar is not None:
                yield bar, w, c, lanes


@effect("mbarrier.init")
class Init(_MbarrierInstruction):
    """``mbarrier.init{.shared}.b64 [addr], count``."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, counts = sources
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        w0, _, c0, _ = ctx.rect
        shared = ctx.subsystem("shared")
        if shared.shadow.active:
            index, good, _ = shared.locate(ctx, addresses, 8, mask)
            if good is None or good.any():
                self._check_bytes(ctx, table, index, good, addresses)
        for w, c, lanes, address in groups(ctx, mask, addresses):
            table.initialise(ctx, address, int(counts[w, c][lanes][0]), c0 + c, w0 + w)

    @staticmethod
    def _check_bytes(
        ctx: BlockContext, table: Mbarriers, index: np.ndarray, good: Mask, addresses: np.ndarray
    ) -> None:
        """The initialisation is an ordinary write, unless a barrier is there already."""
        w0, _, c0, _ = ctx.rect
        for w, c, _, address in groups(ctx, good, addresses):
            place = table.place(ctx, address, c0 + c, w0 + w)
            if place is None or place in table.bars:
                return
        table.areas.shadow.write(ctx, index, 8, good)


@effect("mbarrier.inval")
class Invalidate(_MbarrierInstruction):
    """``mbarrier.inval{.shared}.b64 [addr]``."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:1]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        for bar, w, _, _ in self.barriers(ctx, mask, sources[0]):
            table.invalidate(bar, self.instr, ctx.rect[0] + w)


@effect("mbarrier.expect_tx", "mbarrier.complete_tx")
class Transactions(_MbarrierInstruction):
    """``mbarrier.expect_tx`` and ``mbarrier.complete_tx``: change the transaction count."""

    ends_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]
        self.completes = instr.parts[1] == "complete_tx"

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, counts = sources
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        w0, _, c0, _ = ctx.rect
        for bar, w, c, lanes in self.barriers(ctx, mask, addresses):
            total = int(counts[w, c][lanes].astype(np.int64).sum())
            change = table.complete if self.completes else table.expect
            change(ctx, bar, total, c0 + c, w0 + w)


@effect("mbarrier.arrive", "mbarrier.arrive_drop")
class Arrive(_MbarrierInstruction):
    """``mbarrier.arrive{_drop}{.expect_tx}{.noComplete} state|_, [addr]{, count|bytes}``.

    The state that it returns is the word before the arrival.
    """

    ends_block = True
    allowed = frozenset(("expect_tx", "noComplete"))

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        operands = list(instr.operands)
        if not isinstance(operands[0], ptx.Address):
            self.dests = register_names(operands.pop(0))
            self.dest_dtypes = [np.dtype(np.uint64)] * len(self.dests)
        if not 1 <= len(operands) <= 2 or not isinstance(operands[0], ptx.Address):
            raise self.unsupported("operands")
        self.expects = "expect_tx" in instr.parts
        if self.expects and len(operands) != 2:
            raise self.unsupported("expect_tx without a byte count")
        self.sources = tuple(operands)
        self.drop = instr.parts[1] == "arrive_drop"
        self.completes = "noComplete" not in instr.parts

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        addresses, counts = sources[0], sources[1] if len(sources) == 2 else None
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        w0, _, c0, _ = ctx.rect
        tokens = np.zeros(addresses.shape, np.uint64) if self.dests else None
        checks = ctx.wave.options.checks
        is_checked = not isinstance(checks, bool) and LANE_RULE in checks
        for bar, w, c, lanes in self.barriers(ctx, mask, addresses):
            slot, warp = c0 + c, w0 + w
            number = int(np.count_nonzero(lanes))
            if is_checked:
                self._check_lanes(ctx, slot, warp, number)
            if self.expects:
                assert counts is not None
                table.expect(ctx, bar, int(counts[w, c][lanes].astype(np.int64).sum()), slot, warp)
            elif counts is not None:
                number = int(counts[w, c][lanes].astype(np.int64).sum())
            knowledge = knowledge_of(ctx, slot, warp, relaxed=self.relaxed)
            if self.relaxed:
                note_unfenced(ctx, bar, slot, warp)
            token = table.arrive(
                ctx,
                bar,
                number,
                slot,
                warp,
                knowledge,
                drop=self.drop,
                completes=self.completes,
            )
            if tokens is not None:
                tokens[w, c, lanes] = token
        return () if tokens is None else (tokens,)

    def _check_lanes(self, ctx: BlockContext, slot: int, warp: int, number: int) -> None:
        """Some lanes arrive for the warp: what the others have done has to be ordered before."""
        access = unsynchronised_arrivals(self.kernel).get(self.instr.index)
        if access is not None and number < np.count_nonzero(ctx.wave.alive[warp, slot]):
            text = f"{number} lanes arrive for a warp whose lanes have not met since an access"
            site = hazards.site(ctx.wave, self.kernel.body[access], "access", warp, slot)
            report_warp(ctx, LANE_RULE, text, slot, warp, other=site)


@effect("mbarrier.test_wait", "mbarrier.try_wait")
class Wait(_MbarrierInstruction):
    """``mbarrier.test_wait`` and ``try_wait`` with a token or ``.parity``.

    ``test_wait`` answers at once. ``try_wait`` may hold threads back for a time: here until the
    phase is complete, or until nothing else in the wave can run, in which case it says false.
    """

    ends_block = True
    own_block = True
    progress = False
    allowed = frozenset(("parity",))

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(bool)]
        self.by_parity = "parity" in instr.parts
        self.holds = instr.parts[1] == "try_wait"
        self.sources = instr.operands[1:3]  # a time limit behind them changes nothing

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        addresses, values = sources
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        w0, _, c0, _ = ctx.rect
        done = np.zeros(addresses.shape, bool)
        passing: dict[tuple[int, int, int], tuple[Mbarrier, np.ndarray]] = {}
        blocked: dict[int, tuple[Mbarrier, np.ndarray]] = {}
        astray = np.array(ctx.lanes.dense_mask() if mask is None else mask)
        for bar, w, c, lanes in self.barriers(ctx, mask, addresses):
            astray[w, c] &= ~lanes
            good = self._passed(ctx, table, bar, c0 + c, w0 + w, values[w, c], lanes)
            if good.any():
                key = bar.slot, bar.offset, c0 + c
                if key not in passing:
                    passing[key] = bar, np.zeros(ctx.wave.num_warps, bool)
                passing[key][1][w0 + w] = True
                done[w, c] |= good
            if (lanes & ~good).any():
                if id(bar) not in blocked:
                    blocked[id(bar)] = bar, np.zeros(addresses.shape, bool)
                blocked[id(bar)][1][w, c] |= lanes & ~good
        for (_, _, slot), (bar, warps) in passing.items():
            table.acquire(bar, slot, warps, relaxed=self.relaxed)
        for bar, lanes in blocked.values():
            self._hold(ctx, bar, lanes)
        if astray.any():  # no mbarrier there, which has been reported: perhaps there will be one
            ctx.yield_(astray)
        return (done,)

    def _passed(
        self,
        ctx: BlockContext,
        table: Mbarriers,
        bar: Mbarrier,
        slot: int,
        warp: int,
        values: np.ndarray,
        lanes: np.ndarray,
    ) -> np.ndarray:
        """The lanes whose phase is complete."""
        given = np.unique(values[lanes])
        good = np.zeros(32, bool)
        for value in given:
            if self.by_parity:
                passed = table.passed(bar, int(value))
            else:
                passed = table.token_passed(ctx, bar, int(value), slot, warp)
            if passed:
                good |= lanes & (values == value)
        return good

    def _hold(self, ctx: BlockContext, bar: Mbarrier, lanes: np.ndarray) -> None:
        """Let lanes wait, if this is a ``try_wait`` that has not run out of time."""
        expired = ctx.timed_out is not None
        hasty = ctx.wave.options.completion == "random" and ctx.wave.rng.random() < 0.5
        if not self.holds or expired or hasty:
            ctx.yield_(lanes)
            return
        name = f"mbarrier {bar.number} at {bar.offset:#x} of CTA {ctx.cta_of(bar.slot)}"
        phase = bar.phase
        reason = WaitReason(
            f"waits for phase {phase} (parity {phase & 1}, {bar.transactions} bytes to come) of",
            bar.expected,
            lambda: bar.expected - bar.pending if bar.phase == phase else bar.expected,
            name,
        )
        bar.waiting.append(ctx.park(lanes, reason, may_time_out=True, retry=True))


@effect("mbarrier.pending_count")
class PendingCount(Decoded):
    """``mbarrier.pending_count.b64 count, state``."""

    counter_class = "mbarrier"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.uint32)]
        self.sources = instr.operands[1:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        return ((sources[0] & np.uint64(pending_of(-1))).astype(np.uint32),)
