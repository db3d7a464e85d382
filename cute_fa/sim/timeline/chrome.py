"""A timeline as a Chrome trace, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cute_fa.sim.timeline.intervals import Interval
from cute_fa.sim.timeline.lanes import role_of


def chrome_trace(
    intervals: Sequence[Interval],
    roles: Mapping[str, range] | None = None,
    *,
    note: str = "modelled, not measured; 1 us here is 1 cycle",
) -> str:
    """JSON in the Trace Event Format: one complete event per interval, one thread per lane.

    Args:
        roles: warps by name; the lanes of warps then carry their role's name.
        note: what the clock is; it stands in the trace's metadata and process name.
    """
    lanes = list(dict.fromkeys(one.lane for one in intervals))
    numbers = {lane: number for number, lane in enumerate(lanes)}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": note}}
    ]
    for lane, number in numbers.items():
        role = role_of(lane, roles or {})
        label = f"{role}: {lane}" if role else lane
        events.append(
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": label}}
        )
    for one in intervals:
        events.append(
            {
                "name": one.what,
                "cat": "model",
                "ph": "X",
                "ts": one.start,
                "dur": one.length,
                "pid": 0,
                "tid": numbers[one.lane],
                "args": {"detail": one.detail},
            }
        )
    return json.dumps({"traceEvents": events, "otherData": {"note": note}})
