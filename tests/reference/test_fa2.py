"""FA2's own: K/V blocks go from right to left. The rest: test_loops."""

from __future__ import annotations

import torch

from cute_fa.reference import fa2


def test_order_of_blocks_is_free():
    """Right to left (as the loop goes) on reversed keys is left to right on the given ones."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 20, 4, 16, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 50, 2, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    out, lse = fa2.forward(q, k, v, tile_m=16, tile_n=10)
    flipped, flipped_lse = fa2.forward(q, k.flip(1), v.flip(1), tile_m=16, tile_n=10)
    torch.testing.assert_close(out, flipped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, flipped_lse, rtol=1e-12, atol=1e-12)
