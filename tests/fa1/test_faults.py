"""Every barrier and every cp.async group of FA1 is needed: leaving one out is reported."""

from __future__ import annotations

from cute_fa.testing.faults import faults
from tests.faults import assert_survivors_are_redundant, run_survey
from tests.surveys import FA1

# One group of copies per step, and per step the four barriers of the class docstring and the one
# between chunks of columns.
EXPECTED = ["commit", "wait", *["barrier"] * 5]


def test_synchronisation_is_as_documented():
    assert [fault.kind for fault in faults(FA1.program.ptx)] == EXPECTED


def test_every_deletion_is_reported(monkeypatch):
    """A race between warps for a barrier; bytes that are not there yet for a group of copies."""
    found = run_survey(monkeypatch, FA1, policies=[("late", 0)])
    assert_survivors_are_redundant(found)
    rules = {verdict.fault.kind: verdict.rule for verdict in found.verdicts}
    assert rules["barrier"] == "shared-race"
    assert rules["commit"] == rules["wait"] == "read-before-arrival"
