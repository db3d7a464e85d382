"""Every barrier, every cp.async group and every wait of FA2 is needed: leaving one out shows."""

from __future__ import annotations

from collections import Counter

from cute_fa.testing.faults import faults
from tests.faults import assert_survivors_are_redundant, run_survey
from tests.surveys import FA2

# Prologue: Q, K, V, K (a ring of two slots) and the wait for Q. Each of the two loop bodies: the
# table of the kernel's docstring. Epilogue: the barrier between staging O and storing it.
PROLOGUE = ["commit", "commit", "commit", "commit", "wait"]
LOOP = ["wait", "barrier", "commit", "wait", "barrier", "commit"]
EXPECTED = [*PROLOGUE, *LOOP, *LOOP, "barrier"]


def test_synchronisation_is_as_documented():
    assert [fault.kind for fault in faults(FA2.program.ptx)] == EXPECTED


def test_every_deletion_is_reported_when_copies_complete_late(monkeypatch):
    found = run_survey(monkeypatch, FA2, policies=[("late", 0)])
    assert_survivors_are_redundant(found)
    assert found.caught == len(EXPECTED)


def test_every_barrier_is_reported_when_copies_complete_at_once(monkeypatch):
    """No copy can be read too early then; what is left are races between warps."""
    found = run_survey(monkeypatch, FA2, policies=[("eager", 0)])
    caught = Counter(verdict.fault.kind for verdict in found.verdicts if verdict.caught)
    assert caught["barrier"] == EXPECTED.count("barrier"), found.table()
