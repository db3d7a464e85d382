"""FA3's synchronisation is needed, all of it: whatever is left out or changed, it shows.

The surveys of every fault, of a persistent and of a single-tile kernel, are marked slow, which
``tools/dev.py test`` leaves out; it runs a fixed part of the first: every eighth fault of a kind.
"""

from __future__ import annotations

import pytest

from cute_fa.testing.faults import faults
from tests.faults import (
    assert_arguments_have_survivors,
    assert_survivors_are_redundant,
    every,
    run_survey,
)
from tests.surveys import FA3_FOR_PTXAS, FA3_PERSISTENT, FA3_SINGLE


def test_part_of_the_faults(monkeypatch):
    found = run_survey(monkeypatch, FA3_PERSISTENT, only=every(8))
    assert_survivors_are_redundant(found, FA3_PERSISTENT.redundant)
    assert {verdict.outcome for verdict in found.verdicts} >= {"hazard", "deadlock"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault(monkeypatch):
    """At least 95 % of the persistent kernel's faults are caught, and of both kernels' together,
    those aside that only touch what is there for ptxas; survivors have an argument, and every
    argument a survivor."""
    caught = tried = 0
    for kernel in (FA3_PERSISTENT, FA3_SINGLE):
        found = run_survey(monkeypatch, kernel)
        assert_survivors_are_redundant(found, kernel.redundant)
        assert_arguments_have_survivors(found, kernel.redundant)
        for_ptxas = [f for f in found.survivors if any(r.covers(f) for r in FA3_FOR_PTXAS)]
        caught += found.caught
        tried += len(found.verdicts) - len(for_ptxas)
        assert caught >= 0.95 * tried, found.table()


def test_every_kind_of_synchronisation_is_there():
    """The list is of the kinds that the kernel has; rings come from a trace."""
    kinds = {fault.kind for fault in faults(FA3_PERSISTENT.program.ptx)}
    assert kinds == {
        *("fence", "commit", "wait", "arrive", "expect_tx", "barrier", "parity", "bytes")
    }
