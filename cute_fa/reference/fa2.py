"""FlashAttention-2 (2023), Algorithm 1, in plain PyTorch: Q blocks outside, K/V blocks inside.

Beside ``fa1``, three things change, and they are the paper's: O stays on the chip and is divided by
l once, at the end, instead of after every step; only the log-sum-exp is kept, not m and l; and the
outer loop's rounds are independent, so that each can be a thread block of its own. The inner loop
goes from right to left as the kernel's does, which changes nothing but roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cute_fa.reference.operands import Operands, attention_by

NEG_INF = float("-inf")


@attention_by
def forward(operands: Operands, *, tile_m: int = 128, tile_n: int = 64) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by FA2's loop."""
    mQ, mK, mV, scale, softcap, visible, dtype = operands
    seqlen_q, seqlen_k = visible.shape
    out = mQ.new_empty(*mQ.shape[:-1], mV.shape[-1])  # (B, Hq, Sq, Dv)
    lse = mQ.new_empty(mQ.shape[:-1])  # (B, Hq, Sq)

    for m_start in range(0, seqlen_q, tile_m):
        rows = slice(m_start, m_start + tile_m)
        Q = mQ[:, :, rows]  # (B, Hq, M, D)
        acc_O = torch.zeros_like(out[:, :, rows])  # (B, Hq, M, Dv), not normalised
        row_max = Q.new_full(Q.shape[:-1], NEG_INF)  # (B, Hq, M)
        row_sum = Q.new_zeros(Q.shape[:-1])  # (B, Hq, M)
        for n_start in reversed(range(0, seqlen_k, tile_n)):
            columns = slice(n_start, n_start + tile_n)
            seen = visible[rows, columns]  # (M, N)
            if not seen.any():
                continue
            # S = τ Q Kᵀ   (M, N) = (M, D) @ (D, N)
            S = scale * (Q @ mK[:, :, columns].mT)
            if softcap > 0.0:
                S = softcap * torch.tanh(S / softcap)
            S = S.masked_fill(~seen, NEG_INF)

            # m' = max(m, rowmax S);  P = exp(S − m');  l' = e^(m − m') l + rowsum P
            new_max = torch.maximum(row_max, S.amax(dim=-1))
            anchor = torch.where(new_max == NEG_INF, 0.0, new_max)  # −inf − (−inf) is no number
            rescale = torch.exp(row_max - anchor)
            P = torch.exp(S - anchor[..., None])
            row_sum = rescale * row_sum + P.sum(dim=-1)
            row_max = new_max

            # O ← e^(m − m') O + P V   (M, Dv) = (M, N) @ (N, Dv)
            acc_O = rescale[..., None] * acc_O + P.to(dtype).to(mQ.dtype) @ mV[:, :, columns]

        inverse = torch.where(row_sum == 0.0, 1.0, 1.0 / row_sum)
        out[:, :, rows] = inverse[..., None] * acc_O
        lse[:, :, rows] = row_max + torch.log(row_sum)  # −inf + −inf where nothing was seen

    return out, lse
