"""What the counters are called."""

from __future__ import annotations

import re
from pathlib import Path

import cute_fa.sim
from cute_fa.sim.counters import DESCRIPTIONS

SOURCES = Path(cute_fa.sim.__file__).parent
ADDED = re.compile(r'(?:counters\.add\(|static_counts = \{)\s*f?"([^"]+)"')


def test_every_counter_is_described():
    """A part in braces stands for one of several words, as one in <> of a description does."""
    names = {name for path in SOURCES.rglob("*.py") for name in ADDED.findall(path.read_text())}
    assert {"barrier_waits", "mma_flops.{kind}"} <= names
    for name in names:
        known = re.sub(r"\\\{.+?\\\}", ".+", re.escape(name))
        assert any(re.fullmatch(known, described) for described in DESCRIPTIONS), name
