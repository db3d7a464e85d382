"""Attention on FP8 inputs as an FP8 kernel computes it (FlashAttention-3, section 3.3), in PyTorch.

Q, K and V are e4m3 numbers times a descale per (batch, K/V head), or per block of their rows; P is
rounded to e4m3 too, before it multiplies V. Products add up in fp32.

A row's largest P is 2⁰, and e4m3 has no numbers below 2⁻⁹: without help, what is under 1/1000 of
the largest would count as nothing. P is therefore 2⁸ times as large while it is e4m3 (2⁸ ≤ 448),
and l grows with it, so that O / l needs no correction.

One descale of V multiplies O at the end. Descales of blocks of keys weigh P instead, before it is
rounded: dv·P is what an exponential of a score greater by ln dv would be, so it enters the running
maximum and stays at most 2⁸, and l is divided by dv again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_fa.quant import expand_descale
from cute_fa.reference.dense import Window, one_by_one, visible_mask
from cute_fa.varlen import Packing

NEG_INF = float("-inf")
LOG2_E = 1.4426950408889634
P_EXPONENT = 8.0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    *,
    block_rows: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    tile_n: int = 128,
    exp2: Callable[[Tensor], Tensor] = torch.exp2,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, key blocks from right to left.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), float8_e4m3fn.
        q_descale, k_descale, v_descale: fp32, (B, Hk), or (B, Hk, blocks) with ``block_rows``.
        tile_n: key columns of a step; what P is rounded against depends on it.
        exp2: 2ˣ of the scores of a step, (…, columns), as the kernel computes it.

    Returns:
        out (B, Sq, Hq, Dv) bf16 and lse (B, Hq, Sq) fp32, natural logarithm.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seqlen_k, heads = k.shape[1], q.shape[2]
    groups = heads // k.shape[2]
    visible = visible_mask(
        q.shape[1], seqlen_k, causal=causal, window_size=window_size, device=q.device
    )

    def rows_of(x: Tensor, descale: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Hq, S, D) and the descale of each row, (B, Hq, S)."""
        each = expand_descale(descale, x.shape[1], x.shape[2], block_rows=block_rows)[..., 0]
        x, each = x.float().transpose(1, 2), each.transpose(1, 2)
        if x.shape[1] != heads:
            x, each = (t.repeat_interleave(groups, dim=1) for t in (x, each))
        return x, each

    mQ, q_scale = rows_of(q, q_descale)
    mK, k_scale = rows_of(k, k_descale)
    mV, v_scale = rows_of(v, v_descale)
    # Of a block: what its P is multiplied by. Of a head: what O is multiplied by, at the end, (B,
    # Hq, 1, 1); without keys there is nothing to multiply.
    weight, of_out = (v_scale, 1.0) if block_rows else (None, v_scale[..., :1, None].sum(2, True))
    acc_O = mQ.new_zeros(*mQ.shape[:-1], v.shape[-1])  # (B, Hq, Sq, Dv)
    row_max = mQ.new_full(mQ.shape[:-1], NEG_INF)  # in units of log2(e)
    row_sum = mQ.new_zeros(mQ.shape[:-1])
    for n_start in reversed(range(0, seqlen_k, tile_n)):
        columns = slice(n_start, n_start + tile_n)
        # S = τ (dq Q) (dk K)ᵀ: descales belong to S, not to the products of e4m3 numbers
        S = mQ @ mK[:, :, columns].mT * (q_scale[..., None] * k_scale[:, :, None, columns] * scale)
        if softcap > 0.0:
            S = softcap * torch.tanh(S / softcap)
        S = (LOG2_E * S).masked_fill(~visible[:, columns], NEG_INF)
        if weight is not None:
            S = S + torch.log2(weight[:, :, None, columns])
        new_max = torch.maximum(row_max, S.amax(dim=-1))
        anchor = torch.where(new_max == NEG_INF, 0.0, new_max)
        rescale = torch.exp2(row_max - anchor)
        P = exp2(S - anchor[..., None] + P_EXPONENT)
        shares = P if weight is None else P / weight[:, :, None, columns]
        row_sum = rescale * row_sum + shares.sum(dim=-1)
        row_max = new_max
        rounded = P.to(torch.float8_e4m3fn).float()
        acc_O = rescale[..., None] * acc_O + rounded @ mV[:, :, columns]
    out = acc_O * of_out / torch.where(row_sum == 0.0, 1.0, row_sum)[..., None]
    lse = (row_max + torch.log2(row_sum) - P_EXPONENT) / LOG2_E
    return out.transpose(1, 2).to(torch.bfloat16), lse


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    *,
    packing: Packing,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``forward`` of each packed sequence by itself, with its own descales.

    Args:
        q, k, v: (Tq, Hq, D), (Tk, Hk, D), (Tk, Hk, Dv), float8_e4m3fn.
        q_descale, k_descale, v_descale: as of ``forward``, B being the number of sequences; blocks
            are counted from the first row of each, and those without rows are not looked at.
        packing: where the sequences lie.
        options: as of ``forward``.

    Returns:
        out (Tq, Hq, Dv) bf16 and lse (Hq, Tq) fp32; 0 and -inf in rows that do not count.
    """

    def of_sequence(number: int, of_q: slice, of_k: slice) -> tuple[Tensor, Tensor]:
        own = slice(number, number + 1)
        descales = (x[own] for x in (q_descale, k_descale, v_descale))
        return forward(q[None, of_q], k[None, of_k], v[None, of_k], *descales, **options)

    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.bfloat16)
    lse = q.new_full((q.shape[1], q.shape[0]), NEG_INF, dtype=torch.float32)
    return one_by_one(packing, of_sequence, out, lse)
