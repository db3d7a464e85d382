"""FlashAttention (2022), Algorithm 1, in plain PyTorch: K/V blocks outside, Q blocks inside.

What stays in HBM between two steps is what the kernel keeps there, under the kernel's names:

    o_accum  O over the keys seen so far, normalised after every step
    row_max  m, the running maximum of a row's scores
    row_sum  l, the running sum of exp(score − m)

Both kernels' references compute in fp64 for fp64 inputs and else in fp32, and round P to the
inputs' dtype before P V, as a tensor core takes it. Shape letters: see ``cute_fa.problem``; below a
block is written with its tile's M and N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cute_fa.reference.operands import Operands, attention_by

NEG_INF = float("-inf")


@attention_by
def forward(operands: Operands, *, tile_m: int = 64, tile_n: int = 128) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by FA1's loop.

    Args:
        tile_m, tile_n: the paper's Br and Bc.
    """
    mQ, mK, mV, scale, softcap, visible, dtype = operands
    seqlen_q, seqlen_k = visible.shape

    o_accum = mQ.new_zeros(*mQ.shape[:-1], mV.shape[-1])  # (B, Hq, Sq, Dv)
    row_max = mQ.new_full(mQ.shape[:-1], NEG_INF)  # (B, Hq, Sq)
    row_sum = mQ.new_zeros(mQ.shape[:-1])  # (B, Hq, Sq)

    for n_start in range(0, seqlen_k, tile_n):
        columns = slice(n_start, n_start + tile_n)
        K, V = mK[:, :, columns], mV[:, :, columns]  # (B, Hq, N, D), (B, Hq, N, Dv)
        for m_start in range(0, seqlen_q, tile_m):
            rows = slice(m_start, m_start + tile_m)
            seen = visible[rows, columns]  # (M, N)
            if not seen.any():
                continue
            # S = τ Q Kᵀ   (M, N) = (M, D) @ (D, N)
            S = scale * (mQ[:, :, rows] @ K.mT)
            if softcap > 0.0:
                S = softcap * torch.tanh(S / softcap)
            S = S.masked_fill(~seen, NEG_INF)

            # this block alone: m̃, P̃ = exp(S − m̃), l̃
            tile_max = S.amax(dim=-1)  # (B, Hq, M)
            P = torch.exp(S - _finite(tile_max)[..., None])
            tile_sum = P.sum(dim=-1)

            # together with the blocks before: m', l'
            new_max = torch.maximum(row_max[:, :, rows], tile_max)
            old_sum = row_sum[:, :, rows] * torch.exp(row_max[:, :, rows] - _finite(new_max))
            tile_scale = torch.exp(tile_max - _finite(new_max))
            new_sum = old_sum + tile_scale * tile_sum

            # O ← (l e^(m − m') O + e^(m̃ − m') P̃ V) / l'   (M, Dv)
            inverse = torch.where(new_sum == 0.0, 0.0, 1.0 / new_sum)
            scale_old, scale_new = old_sum * inverse, tile_scale * inverse
            partial_o = P.to(dtype).to(mQ.dtype) @ V
            o_accum[:, :, rows] = (
                scale_old[..., None] * o_accum[:, :, rows] + scale_new[..., None] * partial_o
            )
            row_max[:, :, rows], row_sum[:, :, rows] = new_max, new_sum

    lse = row_max + torch.log(row_sum)  # −inf + −inf where nothing was seen
    return o_accum, lse


def _finite(maximum: Tensor) -> Tensor:
    """What to subtract: 0 for a row without a visible column, whose −inf − (−inf) is no number."""
    return torch.where(maximum == NEG_INF, 0.0, maximum)
