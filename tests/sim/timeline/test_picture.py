"""Intervals, and what is drawn of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from cute_fa.sim.timeline import Interval, chrome_trace, draw, overlap
from cute_fa.sim.timeline.intervals import merged
from cute_fa.sim.timeline.lanes import role_intervals, role_of

ROLES = {"load": range(1), "first": range(4, 8), "second": range(8, 12)}
INTERVALS = [
    Interval("warp 0", 0, 10, "load"),
    Interval("warp 4", 0, 40, "softmax"),
    Interval("warp 5", 0, 40, "softmax"),
    Interval("warp 8", 0, 30, "wait", "barrier 1"),
    Interval("warp 8", 30, 60, "products"),
    Interval("tensor core", 5, 35, "product", "warp 8"),
    Interval("tensor core", 40, 60, "product", "warp 4"),
]


def test_overlap_is_a_share_of_the_first():
    a = [Interval("a", 0, 10, "softmax"), Interval("a", 20, 30, "softmax")]
    b = [Interval("b", 5, 22, "product"), Interval("b", 8, 12, "product")]
    assert overlap(a, b) == pytest.approx((5 + 2) / 20)
    assert overlap([], b) == 0.0
    assert overlap(a, []) == 0.0


def test_merged_joins_what_touches_and_swallows_the_short():
    rows = [
        Interval("a", 0, 10, "softmax"),
        Interval("a", 10, 12, "other"),
        Interval("a", 12, 20, "softmax"),
        Interval("a", 20, 40, "wait"),
        Interval("b", 0, 1, "other"),
    ]
    assert merged(rows[:4], gap=5) == [
        Interval("a", 0, 20, "softmax"),
        Interval("a", 20, 40, "wait"),
    ]
    assert merged(rows[:4]) == rows[:4]
    assert len(merged(rows, gap=5)) == 3  # another lane's is never joined


def test_lanes_are_roles_and_engines():
    lanes = role_intervals(INTERVALS, ROLES)
    assert list(lanes) == ["load", "first", "second", "tensor core"]
    waiting = [Interval("warp 0", 0, 10, "wait")]
    assert list(role_intervals(waiting, ROLES)) == []
    assert [one.what for one in lanes["first"]] == ["softmax"]  # of its first warp only
    assert [one.detail for one in lanes["tensor core"]] == ["second", "first"]
    assert role_of("warp 11", ROLES) == "second"
    assert role_of("copies", ROLES) == ""


def drawn(**more):
    text = draw(role_intervals(INTERVALS, ROLES), title="a <title>", note="a note", **more)
    return ET.fromstring(text)


def bars(root):
    space = "{http://www.w3.org/2000/svg}"
    return [rect for rect in root.iter(space + "rect") if rect.find(space + "title") is not None]


def test_every_interval_is_a_rectangle_to_scale():
    root = drawn()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <title>", "a note", "load", "first", "second", "tensor core"} <= set(texts)
    found = bars(root)
    assert len(found) == 6  # warp 5 is not drawn
    widths = [float(rect.get("width")) for rect in found]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.2)


def test_products_have_the_colour_of_who_issued_them():
    found = bars(drawn())
    tensor = [rect.get("fill") for rect in found[-2:]]
    assert len(set(tensor)) == 2


def test_a_window_cuts():
    found = bars(drawn(window=(30, 40)))
    spans = [(float(r.get("x")), float(r.get("width"))) for r in found]
    assert len(found) == 3  # the softmax, the products issued, the end of a product
    assert max(width for _, width in spans) == pytest.approx(1000 - 120 - 16, abs=0.1)


def test_chrome_trace_has_one_event_per_interval():
    data = json.loads(chrome_trace(INTERVALS, ROLES))
    complete = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in complete] == [
        (one.what, one.start, one.length) for one in INTERVALS
    ]
    names = {
        event["tid"]: event["args"]["name"]
        for event in data["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert names[complete[0]["tid"]] == "load: warp 0"
    assert names[complete[-1]["tid"]] == "tensor core"
    assert "not measured" in data["otherData"]["note"]
