"""What a trace keeps of the instructions that synchronise or start asynchronous work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa.sim.addresses import RANK_SHIFT, SHARED_OFFSET_MASK
from cute_fa.sim.boxes import map_at
from cute_fa.sim.isa import Decoded, Mask
from cute_fa.sim.isa.mbarrier import groups
from cute_fa.sim.umma_instruction import decode

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext


@dataclass(frozen=True)
class Event:
    """One thing that one warp did to a barrier, or one copy that it started.

    Attributes:
        kind: "init", "arrive", "expect", "wait" (mbarriers); "sync", "named arrive" (named
            barriers); "load", "store" (bulk and tensor copies); "cluster arrive", "cluster wait";
            "product", "commit" (tcgen05).
        barrier: (CTA slot, offset) of an mbarrier, or (CTA slot, number) of a named barrier.
        count: arrivals, or threads that a named barrier expects.
        nbytes: announced, copied, or read from shared memory by a product.
        parity: of the phase that was waited for.
        tile: offset in shared memory of a copy's destination or source.
        flops: of a product; bits: width of its operands' elements; ctas: that share it.
    """

    kind: str
    barrier: tuple[int, int] | None = None
    count: int = 0
    nbytes: int = 0
    parity: int = 0
    tile: int | None = None
    flops: int = 0
    bits: int = 0
    ctas: int = 1


Extracted = dict[tuple[int, int], tuple[Event, ...]]  # (CTA slot, warp) → events
Extractor = Callable[[Decoded, "BlockContext", Mask, Sequence[Any], Any], Extracted]


class _Collection:
    """Events by warp, in the making."""

    def __init__(self, ctx: BlockContext) -> None:
        self.ctx = ctx
        self.found: dict[tuple[int, int], list[Event]] = {}

    def add(self, w: int, c: int, event: Event) -> None:
        w0, _, c0, _ = self.ctx.rect
        self.found.setdefault((c0 + c, w0 + w), []).append(event)

    def barrier(self, c: int, address: int) -> tuple[int, int]:
        """(slot, offset) of an mbarrier as the CTA in column ``c`` names it."""
        slot = self.ctx.rect[2] + c
        rank = address >> RANK_SHIFT
        first = slot - int(self.ctx.wave.cta_rank[slot])
        return first + rank, address & SHARED_OFFSET_MASK

    def result(self) -> Extracted:
        return {warp: tuple(events) for warp, events in self.found.items()}


def _mbarrier(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    verb = handler.instr.parts[1]
    found = _Collection(ctx)
    if handler.instr.op == "cp":  # cp.async.mbarrier.arrive: it comes when the copies have landed
        verb = "arrive"
    if verb not in ("init", "arrive", "arrive_drop", "expect_tx", "try_wait", "test_wait"):
        return {}
    for w, c, lanes, address in groups(ctx, mask, sources[0]):
        bar = found.barrier(c, address)
        number = int(np.count_nonzero(lanes))
        given = sources[1][w, c][lanes] if len(sources) > 1 else None
        if verb == "init":
            assert given is not None
            found.add(w, c, Event("init", bar, count=int(given[0])))
        elif verb == "expect_tx":
            assert given is not None
            found.add(w, c, Event("expect", bar, nbytes=int(given.astype(np.int64).sum())))
        elif verb.startswith("arrive"):
            nbytes = 0
            if given is not None and "expect_tx" in handler.instr.parts:
                nbytes = int(given.astype(np.int64).sum())
            elif given is not None:
                number = int(given.astype(np.int64).sum())
            found.add(w, c, Event("arrive", bar, count=number, nbytes=nbytes))
        elif bool(out[0][w, c][lanes].all()):
            assert given is not None
            value = int(given[0])
            parity = value & 1 if handler.by_parity else value >> 61 & 1
            found.add(w, c, Event("wait", bar, parity=parity))
    return found.result()


def _barrier(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    found = _Collection(ctx)
    active = ctx.lanes.dense_mask() if mask is None else mask
    parts = handler.instr.parts
    if "warp" in parts:
        return {}
    in_cluster = "cluster" in parts
    for w, c in np.argwhere(active.any(axis=-1)):
        slot = ctx.rect[2] + int(c)
        if in_cluster:
            found.add(int(w), int(c), Event(f"cluster {'wait' if 'wait' in parts else 'arrive'}"))
            continue
        lane = int(np.argmax(active[w, c]))
        threads = ctx.wave.num_warps * 32
        if handler.has_count:
            threads = int(sources[1][w, c, lane])
        kind = "named arrive" if "arrive" in parts else "sync"
        number = int(sources[0][w, c, lane])
        found.add(int(w), int(c), Event(kind, (slot, number), count=threads))
    return found.result()


def _tensor_copy(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    found = _Collection(ctx)
    if handler.loads:
        shared, (maps, _) = sources[:2]
        lanes = handler.threads(ctx, mask)
    else:
        (maps, coordinates), shared = sources[:2]
        lanes = _first_of_each(handler.threads(ctx, mask), (maps, shared, *coordinates))
    for w, c, lane in lanes:
        at = w, c, lane
        nbytes = map_at(ctx.wave, int(maps[at])).box_bytes * (4 if handler.rows else 1)
        offset = int(shared[at]) & SHARED_OFFSET_MASK
        if not handler.loads:
            found.add(w, c, Event("store", nbytes=nbytes, tile=offset))
            continue
        ranks = int(sources[3][at]) if handler.multicast else None
        for bar in _signals(found, c, int(sources[2][at]), ranks):
            found.add(w, c, Event("load", bar, nbytes=nbytes, tile=offset))
    return found.result()


def _bulk_copy(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    found = _Collection(ctx)
    if len(sources) < 3:  # commit_group and wait_group have no event
        return {}
    to, origin, sizes = sources[:3]
    lanes = handler.threads(ctx, mask)
    for w, c, lane in lanes if handler.signals else _first_of_each(lanes, (to, origin, sizes)):
        at = w, c, lane
        nbytes = int(sizes[at])
        if not handler.signals:
            offset = int(origin[at]) & SHARED_OFFSET_MASK
            found.add(w, c, Event("store", nbytes=nbytes, tile=offset))
            continue
        offset = int(to[at]) & SHARED_OFFSET_MASK
        ranks = int(sources[4][at]) if handler.multicast else None
        for bar in _signals(found, c, int(sources[3][at]), ranks):
            found.add(w, c, Event("load", bar, nbytes=nbytes, tile=offset))
    return found.result()


def _first_of_each(
    lanes: Iterable[tuple[int, int, int]], arrays: Sequence[np.ndarray]
) -> Iterator[tuple[int, int, int]]:
    """The lanes but those that repeat the operands of an earlier lane of their warp."""
    seen: set[tuple[int, ...]] = set()
    for at in lanes:
        key = (*at[:2], *(int(array[at]) for array in arrays))
        if key not in seen:
            seen.add(key)
            yield at


def _signals(found: _Collection, c: int, signal: int, ranks: int | None) -> list[tuple[int, int]]:
    """The mbarriers that a copy signals: one, or one of each CTA of a multicast mask."""
    if ranks is None:
        return [found.barrier(c, signal)]
    offset = signal & SHARED_OFFSET_MASK
    return [
        found.barrier(c, rank << RANK_SHIFT | offset) for rank in range(16) if ranks >> rank & 1
    ]


_BITS = {"f16": 16, "tf32": 32, "mxf4": 4, "mxf4nvf4": 4}


def _executing(ctx: BlockContext, mask: Mask) -> list[tuple[int, ...]]:
    """(w, c, lane) in the rectangle of each executing thread."""
    active = ctx.lanes.dense_mask() if mask is None else mask
    return [tuple(at) for at in np.argwhere(active).tolist()]


def _tcgen05_mma(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    found = _Collection(ctx)
    for at in _executing(ctx, mask):
        form = decode(int(sources[3][at]), handler.kind)
        bits = _BITS.get(handler.kind, 8)
        rows = form.n + (0 if handler.a_in_tmem else form.m)
        event = Event(
            "product",
            nbytes=rows * form.k * bits // 8,
            flops=2 * form.m * form.n * form.k,
            bits=bits,
            ctas=2 if handler.pair else 1,
        )
        found.add(at[0], at[1], event)
    return found.result()


def _tcgen05_commit(
    handler: Any, ctx: BlockContext, mask: Mask, sources: Sequence[Any], out: Any
) -> Extracted:
    found = _Collection(ctx)
    for at in _executing(ctx, mask):
        ranks = int(sources[1][at]) if handler.multicast else None
        for bar in _signals(found, at[1], int(sources[0][at]), ranks):
            found.add(at[0], at[1], Event("commit", bar, count=1))
    return found.result()


EXTRACTORS: dict[str, Extractor] = {
    "mbarrier": _mbarrier,
    "barrier": _barrier,
    "tensor_copy": _tensor_copy,
    "bulk_copy": _bulk_copy,
    "tcgen05_mma": _tcgen05_mma,
    "tcgen05_commit": _tcgen05_commit,
}
"""By the class under which an instruction is counted."""
