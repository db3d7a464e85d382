"""The order in which a compiler would put a block's instructions.

PTX comes in the order of the source, often one long chain after another. ptxas interleaves what is
independent; here a list schedule by the longest path to the end of the block stands for it. What
synchronises, or starts something asynchronous, stays where it is, and nothing moves across it; but
arithmetic does move across stores to tensor memory, in ptxas's output too, up to the wait for them.
Register pressure is left out of account.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from cute_fa.sim.timeline.costs import Cost


def scheduled(costs: Sequence[Cost]) -> list[Cost]:
    """The instructions of one block in the order of issue."""
    out: list[Cost] = []
    for segment, fixed in _segments(costs):
        out += _list_schedule(segment)
        if fixed is not None:
            out.append(fixed)
    return out


def _segments(costs: Sequence[Cost]) -> Iterator[tuple[list[Cost], Cost | None]]:
    """What may be reordered, and the instruction behind it that may not move."""
    segment: list[Cost] = []
    for cost in costs:
        if _stays(cost):
            yield segment, cost
            segment = []
        else:
            segment.append(cost)
    yield segment, None


def _stays(cost: Cost) -> bool:
    if cost.unit == "tmem":
        return cost.instr.parts[1] != "st"
    return cost.special or cost.unit == "global" or cost.instr.op in ("bra", "brx", "ret", "exit")


def _list_schedule(segment: Sequence[Cost]) -> list[Cost]:
    count = len(segment)
    if count < 3:
        return list(segment)
    after, before = _dependences(segment)
    priority = [0.0] * count
    for i in reversed(range(count)):
        priority[i] = segment[i].latency + max((priority[j] for j in after[i]), default=0.0)
    waiting = [len(sources) for sources in before]
    earliest = [0.0] * count
    # What is ready, most urgent first; what will be, by the time at which it is.
    ready = [(-priority[i], i) for i in range(count) if not waiting[i]]
    heapq.heapify(ready)
    later: list[tuple[float, int]] = []
    free: dict[str, float] = {}
    out: list[Cost] = []
    time = 0.0
    while ready or later:
        while later and later[0][0] <= time:
            _, i = heapq.heappop(later)
            heapq.heappush(ready, (-priority[i], i))
        if not ready:
            time = later[0][0]
            continue
        _, i = heapq.heappop(ready)
        cost = segment[i]
        if cost.unit and free.get(cost.unit, 0.0) > time:
            heapq.heappush(later, (free[cost.unit], i))
            continue
        free[cost.unit] = time + cost.cycles
        out.append(cost)
        for j in after[i]:
            earliest[j] = max(earliest[j], time + cost.latency)
            waiting[j] -= 1
            if not waiting[j]:
                heapq.heappush(later, (earliest[j], j))
        time += 1.0 if cost.issues else 0.0
    return out


def _dependences(segment: Sequence[Cost]) -> tuple[list[set[int]], list[set[int]]]:
    """(who waits for each, for whom each waits): values, overwritten registers, memory order."""
    after: list[set[int]] = [set() for _ in segment]
    before: list[set[int]] = [set() for _ in segment]
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    memory: int | None = None
    for i, cost in enumerate(segment):
        sources = {writer[name] for name in cost.reads if name in writer}
        for name in cost.writes:
            sources.update(readers.get(name, ()))
            if name in writer:
                sources.add(writer[name])
        if cost.unit in ("shared", "tmem"):
            if memory is not None:
                sources.add(memory)
            memory = i
        sources.discard(i)
        before[i] = sources
        for j in sources:
            after[j].add(i)
        for name in cost.reads:
            readers.setdefault(name, []).append(i)
        for name in cost.writes:
            writer[name] = i
            readers[name] = []
    return after, before
