"""What the loops of all rungs have in common: how they are called, and what they begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_fa.reference.dense import Window, visible_mask


class Operands(NamedTuple):
    """The inputs of a loop, in fp32, or in fp64 if they came so.

    Attributes:
        q: (B, Hq, Sq, D).
        k: (B, Hq, Sk, D), each head of K once for every query head that reads it.
        v: (B, Hq, Sk, Dv), likewise.
        scale: τ.
        softcap: 0.0 for none.
        visible: (Sq, Sk) bool, whether a row sees a column.
        dtype: as they came, to which P is rounded before P V.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float
    visible: Tensor
    dtype: torch.dtype


Results = tuple[Tensor, Tensor]


def attention_by(loop: Callable[..., Results]) -> Callable[..., Results]:
    """Attention and its log-sum-exp by a rung's loop, called as ``dense.attention``.

    Args:
        loop: of ``Operands`` and keywords of its own, such as tile sizes, which the result takes as
            well; gives O (B, Hq, Sq, Dv) and the LSE.

    Returns:
        a function of q (B, Sq, Hq, D), k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv) that gives out (B,
        Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq); rows that see nothing have 0 and −inf.
    """

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        **plan: Any,
    ) -> Results:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = q.shape[2] // k.shape[2]
        operands = Operands(
            q=q.transpose(1, 2).to(compute),
            k=k.transpose(1, 2).to(compute).repeat_interleave(group, dim=1),
            v=v.transpose(1, 2).to(compute).repeat_interleave(group, dim=1),
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            softcap=softcap,
            visible=visible_mask(
                q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
            ),
            dtype=q.dtype,
        )
        out, lse = loop(operands, **plan)
        return out.transpose(1, 2).to(q.dtype), lse

    forward.__doc__ = loop.__doc__
    return forward
