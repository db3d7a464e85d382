"""What packing query heads into row tiles saves; that it is right: tests/rungs."""

from __future__ import annotations

from dataclasses import replace

from cute_fa.problem import AttentionProblem
from cute_fa.reference.traffic import fa3_hbm_traffic

BASE = AttentionProblem(2, 37, 300, 8, 2, 64, 64, "bfloat16", causal=True)


def test_a_quarter_of_the_tiles(fa3):
    """Four heads of 37 queries are 148 of 192 rows, and one pass over K and V; bytes are what
    ``fa3_hbm_traffic`` says, with heads packed and apart."""
    problem = replace(BASE, batch=1)
    tiles, read = [], []
    for group in (4, 1):
        launch = fa3.check(problem, packed_group=group)
        traffic = fa3_hbm_traffic(problem, fa3.config(problem, packed_group=group))
        assert launch.counters.global_bytes_read == traffic.read
        assert launch.counters.global_bytes_written == traffic.written
        tiles.append(launch.grid[0])
        read.append(traffic.read)
    assert tiles == [2, 8]
    assert read[1] - read[0] == 6 * 300 * 2 * 128
