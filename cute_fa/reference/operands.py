"""What the loops of all rungs begin with: inputs by head, the scale, and who sees whom."""

from __future__ import annotations

from typing import NamedTuple

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
        visible: (Sq, Sk) bool, whether a row sees a column.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: Tensor

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None,
        causal: bool,
        window_size: Window,
    ) -> Operands:
        """From the arguments of a rung's ``forward``: q (B, Sq, Hq, D), k and v (B, Sk, Hk, D)."""
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = q.shape[2] // k.shape[2]
        return Operands(
            q=q.transpose(1, 2).to(compute),
            k=k.transpose(1, 2).to(compute).repeat_interleave(group, dim=1),
            v=v.transpose(1, 2).to(compute).repeat_interleave(group, dim=1),
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            visible=visible_mask(
                q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
            ),
        )
