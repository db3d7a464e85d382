"""Who did what when: intervals of warps and engines, and what can be read off them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cute_fa import ptx
from cute_fa.sim.program import Program
from cute_fa.sim.trace import Trace

ACTIVITIES: dict[str, str] = {
    "products": "issues matrix products",
    "softmax": "exponentials, maxima and sums",
    "arithmetic": "other arithmetic: rescaling, conversion",
    "load": "starts copies into shared memory",
    "store": "writes results",
    "other": "addresses, branches, barriers that do not wait",
    "wait": "waits",
    "product": "an engine: a matrix product",
    "copy": "an engine: a copy",
}
"""What an interval may say."""

_MANY = 8  # instructions of a kind that give a block its name


@dataclass(frozen=True)
class Interval:
    """Something that a warp or an engine did from ``start`` to ``stop`` of some clock.

    Attributes:
        lane: "warp 4" or the name of an engine: "tensor core", "copies".
        what: one of ``ACTIVITIES``.
        detail: a few words: the barrier that was waited for, the warp that issued a product.
    """

    lane: str
    start: float
    stop: float
    what: str
    detail: str = ""

    @property
    def length(self) -> float:
        return self.stop - self.start


def activity_of(program: Program, block: int) -> str:
    """What a warp is doing in a block, by the instructions that it is made of."""
    counts: dict[str, int] = {}
    for instr in program.body_of(block):
        kind = _kind(instr, program.counter_class(instr))
        counts[kind] = counts.get(kind, 0) + 1
    if counts.get("products"):
        return "products"
    if counts.get("exponentials", 0) >= _MANY:
        return "softmax"
    for kind in ("load", "store"):
        if counts.get(kind):
            return kind
    return "arithmetic" if counts.get("arithmetic", 0) >= _MANY else "other"


def _kind(instr: ptx.Instr, counter_class: str) -> str:
    if counter_class in ("mma", "tcgen05_mma") or instr.opcode.startswith("wgmma.mma_async"):
        return "products"
    if counter_class == "mufu":
        return "exponentials"
    if counter_class in ("tensor_copy", "bulk_copy", "cp_async"):
        into_shared = instr.op == "cp" and "bulk_group" not in instr.parts
        if "commit_group" in instr.parts or "wait_group" in instr.parts:
            return "other"
        return "load" if into_shared else "store"
    if counter_class in ("stmatrix", "st_global"):
        return "store"
    if counter_class in ("fma", "convert") or instr.parts[-1] in ("f32", "f32x2"):
        return "arithmetic"
    return "other"


def logical_intervals(trace: Trace, cta: tuple[int, int, int]) -> list[Interval]:
    """A CTA's warps and engines over the trace's logical clock.

    A warp's interval is a run of blocks of one activity; it waits from the clock of a blocking
    instruction's first try to that of its success. Copies last from their issue until somebody has
    waited for their mbarrier.
    """
    wave, _ = trace.find(cta)
    activities: dict[int, str] = {}
    intervals: list[Interval] = []
    copies: list[tuple[int, tuple[int, int], int]] = []
    waits: list[tuple[int, tuple[int, int]]] = []
    for warp in range(wave.num_warps):
        steps = trace.warp_steps(cta, warp)
        lane = f"warp {warp}"
        previous = None
        for step in steps:
            if step.block not in activities:
                activities[step.block] = activity_of(trace.program, step.block)
            events = [event for found in step.events.values() for event in found]
            for event in events:
                if event.kind == "load" and event.barrier is not None:
                    copies.append((step.clock, event.barrier, event.nbytes))
                if event.kind == "wait" and event.barrier is not None:
                    waits.append((step.clock, event.barrier))
            if previous is not None and any(e.kind in ("wait", "sync") for e in events):
                start = previous + 1
                if step.clock > start:
                    intervals.append(Interval(lane, start, step.clock, "wait"))
            what = activities[step.block]
            intervals.append(Interval(lane, step.clock, step.clock + 1, what))
            previous = step.clock
    for clock, barrier, nbytes in copies:
        later = [when for when, other in waits if other == barrier and when > clock]
        if later:
            intervals.append(Interval("copies", clock, min(later), "copy", f"{nbytes} bytes"))
    return merged(intervals)


def merged(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """Intervals of one lane, activity and detail that touch, or nearly do, as one.

    Args:
        gap: what may lie between two of them; also the length below which an interval of "other"
            counts as part of what came before it.
    """
    lanes: dict[str, list[Interval]] = {}
    for one in sorted(intervals, key=lambda one: (one.start, one.stop)):
        row = lanes.setdefault(one.lane, [])
        last = row[-1] if row else None
        same = last is not None and (last.what, last.detail) == (one.what, one.detail)
        absorbed = one.what == "other" and one.length <= gap
        if last is not None and (same or absorbed) and one.start - last.stop <= gap:
            row[-1] = Interval(
                last.lane, last.start, max(last.stop, one.stop), last.what, last.detail
            )
        else:
            row.append(one)
    return [one for row in lanes.values() for one in row]


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """The share of the time of ``a`` during which something of ``b`` goes on, 0 to 1."""
    total = sum(one.length for one in a)
    if not total:
        return 0.0
    spans: list[tuple[float, float]] = []
    for one in sorted(b, key=lambda one: one.start):
        if spans and one.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], one.stop)
        else:
            spans.append((one.start, one.stop))
    shared = sum(
        max(0.0, min(one.stop, stop) - max(one.start, start)) for one in a for start, stop in spans
    )
    return shared / total
