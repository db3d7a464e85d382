"""A timeline as an SVG: one row per lane, one rectangle per interval, a legend, a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from cute_fa.sim.timeline.intervals import Interval

WIDTH, LEFT, RIGHT = 1000, 120, 16
ROW, BAR, TOP, BOTTOM = 30, 20, 56, 64

COLOURS: dict[str, str] = {
    "products": "#3b6fb6",
    "softmax": "#d9822b",
    "arithmetic": "#e6b877",
    "load": "#4f9d69",
    "store": "#7c5fa8",
    "other": "#c9ccd1",
    "wait": "#f3f4f6",
    "copy": "#86c29b",
}
LABELS = {"products": "issues products", "arithmetic": "other arithmetic"}
ISSUERS = ("#3b6fb6", "#7fb0e6", "#1f3f6e", "#a9c8ee")
"""Colours of products by the role that issued them, in the order of the lanes."""


def draw(
    lanes: Mapping[str, Sequence[Interval]],
    *,
    title: str,
    note: str,
    window: tuple[float, float] | None = None,
    unit: str = "cycles",
) -> str:
    """The SVG text.

    Args:
        lanes: intervals by the name of the row, from top to bottom.
        note: printed below the scale: what this is, and what it is not.
        window: the part of the time to show; None for all of it.
    """
    rows = {name: list(row) for name, row in lanes.items()}
    every = [one for row in rows.values() for one in row]
    begin, end = window or (
        min((one.start for one in every), default=0.0),
        max((one.stop for one in every), default=1.0),
    )
    scale = (WIDTH - LEFT - RIGHT) / max(end - begin, 1e-9)
    height = TOP + ROW * len(rows) + BOTTOM
    issuers = {name: ISSUERS[i % len(ISSUERS)] for i, name in enumerate(_issuers(rows))}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    out += _legend(every, issuers)
    for number, (name, row) in enumerate(rows.items()):
        y = TOP + ROW * number
        out.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for one in row:
            start, stop = max(one.start, begin), min(one.stop, end)
            if stop <= start or (stop - start) * scale < 0.2:
                continue
            out.append(
                _bar(one, LEFT + (start - begin) * scale, (stop - start) * scale, y, issuers)
            )
    out += _axis(begin, end, scale, TOP + ROW * len(rows), unit)
    out.append(f'<text x="{LEFT}" y="{height - 10}" fill="#555555">{escape(note)}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _issuers(rows: Mapping[str, Sequence[Interval]]) -> list[str]:
    """Who issued products, in the order of the rows."""
    named = {one.detail for row in rows.values() for one in row if one.what == "product"}
    ordered = [name for name in rows if name in named]
    return ordered + sorted(named - set(ordered))


def _bar(one: Interval, x: float, width: float, y: int, issuers: Mapping[str, str]) -> str:
    colour = issuers[one.detail] if one.what == "product" else COLOURS[one.what]
    tip = f"{one.what} {one.detail}".strip()
    text = f"{tip}, {one.start:.0f} to {one.stop:.0f}"
    border = ' stroke="#d5d7db" stroke-width="0.5"' if one.what == "wait" else ""
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"{border}>'
        f"<title>{escape(text)}</title></rect>"
    )


def _legend(every: Sequence[Interval], issuers: Mapping[str, str]) -> list[str]:
    used = {one.what for one in every}
    entries = [(LABELS.get(what, what), COLOURS[what]) for what in COLOURS if what in used]
    entries += [(f"product of {name}", colour) for name, colour in issuers.items()]
    out, x = [], float(LEFT)
    for text, colour in entries:
        out.append(
            f'<rect x="{x:.0f}" y="30" width="10" height="10" fill={quoteattr(colour)} '
            'stroke="#999999" stroke-width="0.5"/>'
        )
        out.append(f'<text x="{x + 14:.0f}" y="39" font-size="11">{escape(text)}</text>')
        x += 24 + 6.2 * len(text)
    return out


def _axis(begin: float, end: float, scale: float, y: int, unit: str) -> list[str]:
    """A line with some ten marks at round numbers."""
    span = end - begin
    step = 1.0
    while span / step > 10:
        step *= 2.5 if str(step)[0] == "2" else 2
    out = [f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#333333"/>']
    mark = -(-begin // step) * step
    while mark <= end:
        x = LEFT + (mark - begin) * scale
        out.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#333333"/>')
        out.append(
            f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle" font-size="11">{mark:.0f}</text>'
        )
        mark += step
    out.append(
        f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end" font-size="11">{escape(unit)}</text>'
    )
    return out
