"""Functions that generated blocks call to run effect and blocking handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.collectives import check_members
from cute_fa.sim.isa import Decoded, Mask
from cute_fa.sim.lanes import LaneSet

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

Array = np.ndarray


def run_effect(
    handler: Decoded, ctx: BlockContext, instr: ptx.Instr, mask: Mask, *sources: Any
) -> tuple[Array, ...]:
    """Run an unguarded effect; its results come back with the rectangle's full shape."""
    ctx.instr = instr
    if mask is not None and handler.collective:
        check_members(handler, ctx, mask, sources)
    out = handler.run(ctx, mask, *sources)
    if ctx.trace is not None:
        ctx.trace.effect(handler, ctx, mask, sources, out)
    return () if out is None else _full(out, ctx.lanes.shape)


def _full(out: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Array, ...]:
    for item in out:
        if type(item) is tuple or item.shape != shape:
            flat = [part for item in out for part in (item if isinstance(item, tuple) else (item,))]
            return tuple(np.broadcast_to(part, shape) for part in flat)
    return out


def run_guarded(
    handler: Decoded,
    ctx: BlockContext,
    instr: ptx.Instr,
    guard: Array,
    mask: Mask,
    old: tuple[Array | None, ...],
    *sources: Any,
) -> tuple[Array | None, ...]:
    """Run an effect where its guard holds; elsewhere the destinations keep their old values."""
    shape = ctx.lanes.shape
    active = _active(guard, mask, shape)
    count = int(np.count_nonzero(active))
    if count == 0:
        return old
    out = run_effect(handler, ctx, instr, None if count == active.size else active, *sources)
    if count == active.size:
        return out
    return tuple(
        new if before is None else np.where(active, new, before)
        for new, before in zip(out, old, strict=True)
    )


def _active(guard: Array, mask: Mask, shape: tuple[int, ...]) -> Array:
    active = guard if mask is None else guard & mask
    return active if np.shape(active) == shape else np.broadcast_to(active, shape)


def run_blocking(
    handler: Decoded,
    ctx: BlockContext,
    instr: ptx.Instr,
    guard: Array | None,
    mask: Mask,
    *sources: Any,
) -> LaneSet | None:
    """Run a blocking handler where its guard holds; returns the lanes that go on now.

    None means nobody does. Lanes whose guard fails just go on.
    """
    ctx.instr = instr
    arriving = ctx.lanes
    passing: LaneSet | None = None
    if guard is not None:
        taken, passing = ctx.lanes.split(guard)
        if taken is None:
            return passing
        arriving = taken
        mask = None if arriving is ctx.lanes else _active(guard, mask, ctx.lanes.shape)
        if mask is None:
            mask = ctx.lanes.mask
    if mask is not None and handler.collective:
        check_members(handler, ctx, mask, sources)
    out = handler.run(ctx, mask, *sources)
    if ctx.trace is not None:
        ctx.trace.effect(handler, ctx, mask, sources, out)
    if handler.dests:
        out, *results = out
        ctx.store_results(handler, arriving if out is None else out, results)
    going = ctx.not_parked(arriving) if out is None else out
    ctx.parked.clear()
    if going is None or passing is None:
        return going or passing
    return going.union(passing)


HELPERS: dict[str, Any] = {
    "run_effect": run_effect,
    "run_guarded": run_guarded,
    "run_blocking": run_blocking,
}
"""Names that generated code may call besides the semantics functions and numpy's ufuncs."""
