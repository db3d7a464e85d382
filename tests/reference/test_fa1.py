"""FA1's own hard case, a maximum that rises with every K/V block. The rest: test_loops."""

from __future__ import annotations

import torch

from cute_fa.reference import fa1


def test_growing_scores_rescale():
    """Each K/V block raises the maximum by 50: everything before it is scaled away, not lost."""
    q = torch.ones(1, 3, 1, 8, dtype=torch.float64)
    k = 50.0 * torch.arange(6, dtype=torch.float64).reshape(1, 6, 1, 1).expand(1, 6, 1, 8)
    v = torch.arange(6, dtype=torch.float64).reshape(1, 6, 1, 1).expand(1, 6, 1, 8)
    out, lse = fa1.forward(q, k, v, softmax_scale=1 / 8, tile_m=2, tile_n=1)
    torch.testing.assert_close(out, torch.full_like(out, 5.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 250.0), rtol=1e-12, atol=0)
