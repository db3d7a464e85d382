"""FA3's synchronisation is needed, all of it: whatever is left out or changed, it shows.

The surveys of every fault, of a persistent and of a single-tile kernel, are marked slow, which
``tools/dev.py test`` leaves out, and so is that of pairs of CTAs; it runs a fixed part of the first
and of the last: every eighth or sixteenth fault of a kind.
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
from tests.surveys import FA3_FOR_PTXAS, FA3_PAIRED, FA3_PERSISTENT, FA3_SINGLE


@pytest.mark.parametrize(
    ("kernel", "part"), [(FA3_PERSISTENT, 8), (FA3_PAIRED, 16)], ids=["persistent", "pairs"]
)
def test_part_of_the_faults(monkeypatch, kernel, part):
    found = run_survey(monkeypatch, kernel, only=every(part))
    assert_survivors_are_redundant(found, kernel.redundant)
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_of_pairs(monkeypatch):
    """Half of those that survive only touch what is there for ptxas."""
    found = run_survey(monkeypatch, FA3_PAIRED)
    assert_survivors_are_redundant(found, FA3_PAIRED.redundant)
    assert_arguments_have_survivors(found, FA3_PAIRED.redundant)
    assert found.caught >= 0.9 * len(found.verdicts), found.table()


def test_every_kind_of_synchronisation_is_there():
    """The list is of the kinds that the kernel has; rings come from a trace."""
    kinds = {fault.kind for fault in faults(FA3_PERSISTENT.program.ptx)}
    assert kinds == {
        *("fence", "commit", "wait", "arrive", "expect_tx", "barrier", "parity", "bytes")
    }
