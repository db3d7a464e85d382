"""Communication between the lanes of a warp (PTX ISA 9.7.9.6 shfl, 9.7.13.6 to 9.7.13.10).

The member mask names the lanes that take part. The scheduler brings them together before ``run``;
members that have exited take no part. A lane that executes the instruction without being a member
of its own mask is a hazard, and so is a member that never comes (``collectives.check_members``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.collectives import EVERYONE, bits_to_lanes, lane_bits
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import (
    Decoded,
    Mask,
    Subsystem,
    Ticket,
    WaitReason,
    blocking,
    effect,
    register_names,
    subsystem,
)

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

LANES = np.arange(32, dtype=np.int64)


def shuffle_source(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ``shfl`` reads from (PTX ISA 9.7.9.6, pseudocode).

    Args:
        mode: "up", "down", "bfly" or "idx".
        b: lane or delta; c: clamp in bits 0-4, segment mask in bits 8-12. Integers ``(…, 32)``.

    Returns:
        source lane (the own lane where out of range), and whether it was in range.
    """
    b = b.astype(np.int64) & 31
    c = c.astype(np.int64)
    segment, clamp = c >> 8 & 31, c & 31
    most = (LANES & segment) | (clamp & ~segment)
    least = LANES & segment
    if mode == "up":
        source = LANES - b
        good = source >= most
    else:
        source = {"down": LANES + b, "bfly": LANES ^ b, "idx": least | (b & ~segment)}[mode]
        good = source <= most
    return np.where(good, source, LANES), good


def active_lanes(ctx: BlockContext, mask: Mask) -> np.ndarray:
    """The executing lanes as a bool array over ``ctx.rect``."""
    return ctx.lanes.dense_mask() if mask is None else mask


def members(ctx: BlockContext, mask: Mask, membermask: np.ndarray) -> np.ndarray:
    """The lanes that take part with each lane, uint32 ``(w, c, 32)``: its mask less the absent.

    Reports lanes that are not in their own mask.
    """
    active = active_lanes(ctx, mask)
    here = lane_bits(active)
    outside = active & (membermask >> LANES.astype(np.uint32) & np.uint32(1) == 0)
    if outside.any():
        text = f"lane outside its member mask {int(membermask[outside][0]):#010x}"
        report_lanes(ctx, "membermask", text, outside)
    return membermask & here


class _Collective(Decoded):
    """An instruction of the lanes of a member mask, an operand."""

    collective = True

    def take(self, sources: tuple[ptx.Operand, ...], mask: int) -> None:
        """Keep the source operands; the one numbered ``mask`` is the member mask.

        A mask in a register has to be known before the lanes are brought together.
        """
        self.sources = sources
        if mask < len(sources):
            if not isinstance(sources[mask], (ptx.Imm, ptx.Reg)):
                raise self.unsupported("a member mask that is neither a literal nor a register")
            self.member_source = mask  # type: ignore[misc]
            self.own_block = isinstance(sources[mask], ptx.Reg)  # type: ignore[misc]


def _u32(operand_values: np.ndarray) -> np.ndarray:
    return operand_values.astype(np.uint32, copy=False)


@effect("shfl.sync", "shfl")
class Shuffle(_Collective):
    """``shfl.sync.mode.b32 d{|p}, a, b, c, membermask``; ``p``: the source is in range."""

    counter_class = "shfl"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        modes = [part for part in instr.parts if part in ("up", "down", "bfly", "idx")]
        if len(modes) != 1 or instr.parts[-1] != "b32":
            raise self.unsupported("mode or type")
        self.mode = modes[0]
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.uint32), np.dtype(bool)][: len(self.dests)]
        self.take(instr.operands[1:], 3)
        self.has_mask = len(self.sources) == 4
        self._fixed: tuple[np.ndarray, np.ndarray] | None = None
        b, c = self.sources[1], self.sources[2]
        if isinstance(b, ptx.Imm) and isinstance(c, ptx.Imm):
            self._fixed = shuffle_source(self.mode, np.full(32, b.value), np.full(32, c.value))
        every = self.sources[3] if self.has_mask else ptx.Imm(EVERYONE)
        self._everyone = isinstance(every, ptx.Imm) and every.value & EVERYONE == EVERYONE

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        value, b, c = sources[:3]
        source, good = self._fixed or shuffle_source(self.mode, b, c)
        if self._fixed:
            out = value[..., source]
            good = np.broadcast_to(good, value.shape)
        else:
            out = np.take_along_axis(value, source, axis=-1)
        if mask is not None or not self._everyone:
            self._check(ctx, mask, sources, np.broadcast_to(source, value.shape), good)
        return (out, good)[: len(self.dests)]

    def _check(
        self,
        ctx: BlockContext,
        mask: Mask,
        sources: tuple[Any, ...],
        source: np.ndarray,
        good: np.ndarray,
    ) -> None:
        """Report lanes outside their mask, and reads from lanes that do not take part."""
        active = active_lanes(ctx, mask)
        everyone = np.full(active.shape, EVERYONE, np.uint32)
        present = members(ctx, mask, _u32(sources[3]) if self.has_mask else everyone)
        absent = active & good & ((present >> source.astype(np.uint32)) & np.uint32(1) == 0)
        if absent.any():
            lane = int(source[absent][0])
            text = f"the value of lane {lane} is read, but that lane does not take part"
            report_lanes(ctx, "shuffle-inactive-lane", text, absent)


@effect("vote.sync", "vote")
class Vote(_Collective):
    """``vote.sync.mode d, {!}a, membermask`` (PTX ISA 9.7.13.7): all, any, uni, ballot."""

    counter_class = "vote"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        modes = [part for part in instr.parts if part in ("all", "any", "uni", "ballot")]
        if len(modes) != 1:
            raise self.unsupported("mode")
        self.mode = modes[0]
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.uint32 if self.mode == "ballot" else bool)]
        self.take(instr.operands[1:], 1)
        self.has_mask = len(self.sources) == 2

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        predicate = sources[0].astype(bool, copy=False)
        if self.has_mask:
            taking = members(ctx, mask, _u32(sources[1]))
        else:
            taking = np.broadcast_to(lane_bits(active_lanes(ctx, mask)), predicate.shape)
        votes = lane_bits(np.ascontiguousarray(predicate)) & taking
        if self.mode == "ballot":
            return (votes,)
        if self.mode == "all":
            return (votes == taking,)
        if self.mode == "any":
            return (votes != 0,)
        return ((votes == taking) | (votes == 0),)


@effect("match.any.sync", "match.all.sync")
class Match(_Collective):
    """``match.any/all.sync.b32/b64 d{|p}, a, membermask`` (PTX ISA 9.7.13.8)."""

    counter_class = "vote"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.all = instr.parts[1] == "all"
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.uint32), np.dtype(bool)][: len(self.dests)]
        self.take(instr.operands[1:3], 1)
        self.source_dtypes = (np.dtype(f"u{int(instr.parts[-1][1:]) // 8}"), None)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        value, membermask = sources
        taking = members(ctx, mask, _u32(membermask))
        same = value[..., :, None] == value[..., None, :]
        equal = lane_bits(same)[..., 0] & taking
        if not self.all:
            return (equal,)
        agree = equal == taking
        return (np.where(agree, taking, np.uint32(0)), agree)[: len(self.dests)]


@effect("redux.sync")
class Redux(_Collective):
    """``redux.sync.op.type d, a, membermask`` (PTX ISA 9.7.13.9).

    add, min, max on u32 and s32; and, or, xor on b32; min, max with ``.abs`` and ``.NaN`` on f32.
    """

    counter_class = "redux"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.operator, kind = instr.parts[2], instr.parts[-1]
        dtypes = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32}
        if kind not in dtypes:
            raise self.unsupported(f"type .{kind}")
        self.dtype = np.dtype(dtypes[kind])
        self.absolute, self.nan = "abs" in instr.parts, "NaN" in instr.parts
        allowed = {"f32": ("min", "max"), "b32": ("and", "or", "xor")}
        if self.operator not in allowed.get(kind, ("add", "min", "max")):
            raise self.unsupported(f".{self.operator} on .{kind}")
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [self.dtype]
        self.take(instr.operands[1:3], 1)
        self.source_dtypes = (self.dtype, None)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray]:
        value, membermask = sources
        taking = members(ctx, mask, _u32(membermask))
        if self.dtype == np.float32:
            if self.absolute:
                value = np.abs(value)
            function: Any = {
                ("min", False): np.fmin,
                ("max", False): np.fmax,
                ("min", True): np.minimum,
                ("max", True): np.maximum,
            }[self.operator, self.nan]
            neutral: Any = np.float32(np.nan)
            if self.nan:
                neutral = np.float32(np.inf if self.operator == "min" else -np.inf)
        else:
            info: Any = np.iinfo(str(self.dtype))
            function, neutral = {
                "add": (np.add, 0),
                "min": (np.minimum, info.max),
                "max": (np.maximum, info.min),
                "and": (np.bitwise_and, info.max),
                "or": (np.bitwise_or, 0),
                "xor": (np.bitwise_xor, 0),
            }[self.operator]
        if (taking == EVERYONE).all():
            return (function.reduce(value, axis=-1, keepdims=True, dtype=self.dtype),)
        part = bits_to_lanes(taking[..., None])
        spread = np.where(part, value[..., None, :], self.dtype.type(neutral))
        return (function.reduce(spread, axis=-1, dtype=self.dtype),)


@effect("elect.sync")
class Elect(_Collective):
    """``elect.sync d|p, membermask`` (PTX ISA 9.7.13.10): the lowest member lane leads."""

    counter_class = "vote"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.uint32), np.dtype(bool)]
        self.take(instr.operands[1:2], 0)
        every = instr.operands[1]
        self._everyone = isinstance(every, ptx.Imm) and every.value & EVERYONE == EVERYONE

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, np.ndarray]:
        if mask is None and self._everyone:
            shape = sources[0].shape
            return np.zeros(shape, np.uint32), np.broadcast_to(LANES == 0, shape)
        taking = members(ctx, mask, _u32(sources[0]))
        lowest = taking & (~taking + np.uint32(1))
        leader = (np.frexp(lowest.astype(np.float64))[1] - 1).astype(np.uint32)
        return leader, leader == LANES


@subsystem
class WarpBarriers(Subsystem):
    """Lanes that wait at ``bar.warp.sync``, by CTA slot, warp and member mask."""

    name = "warp-barriers"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.arrived: dict[tuple[int, int, int], int] = {}
        self.waiting: dict[tuple[int, int, int], list[Ticket]] = {}

    def missing(self, key: tuple[int, int, int]) -> int:
        """The members that have neither come nor exited, as bits."""
        slot, warp, members = key
        alive = int(lane_bits(self.wave.alive[warp, slot])[0])
        return members & alive & ~self.arrived.get(key, 0)

    def complete(self, ctx: BlockContext, key: tuple[int, int, int]) -> None:
        """Let the lanes that wait go on."""
        self.arrived.pop(key, None)
        ctx.release(*self.waiting.pop(key, ()))

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        for key in [key for key in self.waiting if not self.missing(key)]:
            self.complete(ctx, key)


@blocking("bar.warp.sync")
class WarpSync(Decoded):
    """``bar.warp.sync membermask`` (PTX ISA 9.7.13.2): the members wait for each other.

    Unlike the lanes of the other instructions of this chapter, which exchange values, they may come
    to different ones. Memory effects of a warp's lanes are in program order already.
    """

    counter_class = "barrier"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        membermask = _u32(sources[0])
        if mask is None and (membermask == EVERYONE).all():
            return
        unit: WarpBarriers = ctx.subsystem(WarpBarriers.name)
        active = active_lanes(ctx, mask)
        members(ctx, mask, membermask)
        w0, _, c0, _ = ctx.rect
        for w, c in np.argwhere(active.any(axis=-1)):
            for value in np.unique(membermask[w, c][active[w, c]]):
                here = np.zeros_like(active)
                here[w, c] = active[w, c] & (membermask[w, c] == value)
                self._arrive(ctx, unit, (c0 + int(c), w0 + int(w), int(value)), here)

    @staticmethod
    def _arrive(
        ctx: BlockContext, unit: WarpBarriers, key: tuple[int, int, int], here: np.ndarray
    ) -> None:
        slot, warp, value = key
        w0, _, c0, _ = ctx.rect
        bits = int(lane_bits(here[warp - w0, slot - c0])[0])
        unit.arrived[key] = unit.arrived.get(key, 0) | bits
        if not unit.missing(key):
            unit.complete(ctx, key)
            return
        whom = value.bit_count()
        reason = WaitReason(
            f"waits at bar.warp.sync {value:#010x}",
            whom,
            lambda: whom - unit.missing(key).bit_count(),
        )
        unit.waiting.setdefault(key, []).append(ctx.park(here, reason))
