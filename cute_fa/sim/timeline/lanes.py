"""Which lanes a picture shows, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cute_fa.sim.timeline.intervals import Interval

_WARP = re.compile(r"warp (\d+)")
ENGINES = ("tensor core", "copies")


def role_of(lane: str, roles: Mapping[str, range]) -> str:
    """The role of the warp that a lane's or detail's text names; "" if it has none."""
    match = _WARP.match(lane)
    if match is None:
        return ""
    warp = int(match[1])
    return next((name for name, members in roles.items() if warp in members), "")


def role_intervals(
    intervals: Sequence[Interval], roles: Mapping[str, range]
) -> dict[str, list[Interval]]:
    """The intervals of each role's first warp, and of the engines, by lane to draw.

    Warps of one role do the same at nearly the same time. What the tensor core works on is named
    by the role that issued it. Roles that never do more than wait have no lane.
    """
    shown: dict[str, list[Interval]] = {}
    for name, members in roles.items():
        if members:
            lane = f"warp {members[0]}"
            shown[name] = [one for one in intervals if one.lane == lane]
    for engine in ENGINES:
        shown[engine] = [
            replace(one, detail=role_of(one.detail, roles) or one.detail)
            for one in intervals
            if one.lane == engine
        ]
    return {
        lane: row
        for lane, row in shown.items()
        if any(one.what not in ("other", "wait") for one in row)
    }
