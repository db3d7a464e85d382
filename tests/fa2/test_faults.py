"""Every barrier, every cp.async group and every wait of FA2 is needed: leaving one out shows."""

from __future__ import annotations

from collections import Counter

import pytest

from cute_fa.problem import AttentionProblem
from cute_fa.testing.faults import faults
from tests.faults import assert_survivors_are_redundant, dense_call, run_survey

# Two row tiles; masked and unmasked blocks in both, more of each than the rings have slots; and a
# negative scale, because only then is Q changed in shared memory before the first barrier.
PROBLEM = AttentionProblem(1, 200, 600, 1, 1, 64, 64, "float16", causal=True, softmax_scale=-0.2)
# Prologue: Q, K, V, K (a ring of two slots) and the wait for Q. Each of the two loop bodies: the
# table of the kernel's docstring. Epilogue: the barrier between staging O and storing it.
PROLOGUE = ["commit", "commit", "commit", "commit", "wait"]
LOOP = ["wait", "barrier", "commit", "wait", "barrier", "commit"]
EXPECTED = [*PROLOGUE, *LOOP, *LOOP, "barrier"]


@pytest.fixture
def calls(fa2):
    config = fa2.config(PROBLEM)
    return [dense_call(fa2.program(config), config, PROBLEM)]


def test_synchronisation_is_as_documented(fa2):
    ptx = fa2.program(fa2.config(PROBLEM)).ptx
    assert [fault.kind for fault in faults(ptx)] == EXPECTED


def test_every_deletion_is_reported_when_copies_complete_late(calls, monkeypatch):
    found = run_survey(monkeypatch, "sm_80", calls, policies=[("late", 0)])
    assert_survivors_are_redundant(found)
    assert found.caught == len(EXPECTED)


def test_every_barrier_is_reported_when_copies_complete_at_once(calls, monkeypatch):
    """No copy can be read too early then; what is left are races between warps."""
    found = run_survey(monkeypatch, "sm_80", calls, policies=[("eager", 0)])
    caught = Counter(verdict.fault.kind for verdict in found.verdicts if verdict.caught)
    assert caught["barrier"] == EXPECTED.count("barrier"), found.table()
