"""FA4's synchronisation is needed, all of it: whatever is left out or changed, it shows.

Every rule of the simulator is on, the strict ones too. The surveys of every fault, of a persistent
kernel, of one whose CTAs are pairs, and of what cluster launch control adds to either, take several
minutes and are marked slow, which ``tools/dev.py test`` leaves out; it runs a fixed part of each.
"""

from __future__ import annotations

import pytest

from cute_fa.testing.fault_survey import POLICIES
from cute_fa.testing.faults import KINDS, faults
from tests.faults import (
    assert_arguments_have_survivors,
    assert_survivors_are_redundant,
    every,
    run_survey,
)
from tests.surveys import FA4_PAIRED, FA4_PERSISTENT, SURVEYS

ALL = len(POLICIES)
# Name, every which fault of a kind is in the part, and its tries; those that few of the random
# policies notice are in the whole only.
PARTS = {
    "fa4 persistent": (17, 3),
    "fa4 pairs of CTAs": (16, 3),
    "fa4 launch control": (6, ALL),
    "fa4 launch control of pairs": (8, ALL),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_of_the_faults(name, monkeypatch):
    kernel, (step, tries) = SURVEYS[name], PARTS[name]
    found = run_survey(monkeypatch, kernel, only=every(step), policies=POLICIES[:tries])
    assert_survivors_are_redundant(found, kernel.redundant)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PARTS)
def test_every_fault(name, monkeypatch):
    """At least 95 % are caught, and what is not is argued to be harmless."""
    kernel = SURVEYS[name]
    found = run_survey(monkeypatch, kernel)
    assert_survivors_are_redundant(found, kernel.redundant)
    assert_arguments_have_survivors(found, kernel.redundant)
    assert len(found.verdicts) > 40
    assert found.caught >= 0.95 * len(found.verdicts), found.table()


def test_no_survey_is_left_out():
    assert set(PARTS) == {name for name, kernel in SURVEYS.items() if kernel.generation == "fa4"}


@pytest.mark.parametrize("kernel", [FA4_PERSISTENT, FA4_PAIRED], ids=["persistent", "pairs"])
def test_every_kind_of_synchronisation_is_there(kernel):
    """Rings, "stage", come from a trace."""
    assert {fault.kind for fault in faults(kernel.program.ptx)} == set(KINDS) - {"stage"}
