"""Plans that the tile table does not choose."""

from __future__ import annotations

import pytest

from cute_fa.problem import AttentionProblem

PROBLEM = AttentionProblem(1, 130, 330, 1, 1, 64, 64, "bfloat16", causal=True)


@pytest.mark.parametrize("stages", [1, 3])
def test_ring_depth(fa2, stages):
    """One slot loads V in its own iteration; three slots are more than some rows' blocks."""
    fa2.check(PROBLEM, stages=stages)
