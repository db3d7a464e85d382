"""What the timeline tests of the rungs share."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from cute_fa.bench.model import ModelledForward
from cute_fa.sim.timeline import Interval
from cute_fa.sim.timeline.lanes import role_intervals


def steady_lanes(forward: ModelledForward) -> dict[str, list[Interval]]:
    """The intervals of the middle half of the time, by role and engine."""
    begin, end = 0.25 * forward.timeline.cycles, 0.75 * forward.timeline.cycles
    rows = role_intervals(forward.timeline.intervals, forward.roles)
    return {
        name: [one for one in row if begin <= one.start and one.stop <= end]
        for name, row in rows.items()
    }


def of(lane: list[Interval], what: str, detail: str | None = None) -> list[Interval]:
    """The intervals of one activity, and of one issuer if it is given."""
    return [one for one in lane if one.what == what and detail in (None, one.detail)]


def words(svg: str) -> set[str]:
    """What an SVG says in writing, but for the numbers of its scale."""
    space = "{http://www.w3.org/2000/svg}"
    found = [element.text or "" for element in ET.fromstring(svg).iter(space + "text")]
    return {text for text in found if not text.isdigit()}
