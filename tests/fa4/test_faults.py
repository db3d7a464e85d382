"""FA4's synchronisation is needed, all of it: whatever is left out or changed, it shows.

Every rule of the simulator is on, the strict ones too. The surveys of every fault, of a persistent
kernel and of what cluster launch control adds, take several minutes and are marked slow, which
``tools/dev.py test`` leaves out; it runs a fixed part of each.
"""

from __future__ import annotations

import pytest

from cute_fa.testing.fault_survey import POLICIES
from cute_fa.testing.faults import KINDS, faults
from tests.faults import assert_survivors_are_redundant, every, run_survey
from tests.surveys import FA4_LAUNCH_CONTROL, FA4_PERSISTENT

KERNELS = pytest.mark.parametrize(
    ("kernel", "step", "tries"),
    [(FA4_PERSISTENT, 16, 3), (FA4_LAUNCH_CONTROL, 6, len(POLICIES))],
    ids=["persistent", "launch-control"],
)


@KERNELS
def test_part_of_the_faults(kernel, step, tries, monkeypatch):
    found = run_survey(monkeypatch, kernel, only=every(step), policies=POLICIES[:tries])
    assert_survivors_are_redundant(found, kernel.redundant)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@KERNELS
def test_every_fault(kernel, step, tries, monkeypatch):
    """At least 95 % are caught, and what is not is argued to be harmless."""
    found = run_survey(monkeypatch, kernel)
    assert_survivors_are_redundant(found, kernel.redundant)
    assert len(found.verdicts) > 40
    assert found.caught >= 0.95 * len(found.verdicts), found.table()


def test_every_kind_of_synchronisation_is_there():
    """Rings, "stage", come from a trace."""
    assert {fault.kind for fault in faults(FA4_PERSISTENT.program.ptx)} == set(KINDS) - {"stage"}
