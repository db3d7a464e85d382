"""Attention as it is defined: S = scale · Q Kᵀ, softcap, mask, P = softmax(S), O = P V.

The golden result of every test, in fp64 when the inputs are. Shapes use the letters of
``cute_fa.problem``; tensors are (B, S, H, D) and the LSE is (B, H, S), natural logarithm.

    S      = scale · Q @ Kᵀ                      (B, Hk, G, Sq, Sk)
    S      = softcap · tanh(S / softcap)          where softcap > 0
    S[i,j] = -inf                                 where j is not visible to i
    LSE[i] = log Σ_j exp(S[i,j])                  -inf for a row that sees nothing
    P[i,j] = exp(S[i,j] - LSE[i])                 0    for a row that sees nothing
    O      = P @ V                                (B, Sq, Hq, Dv)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_fa.problem import normalise_window
from cute_fa.varlen import Packing

Window = tuple[int | None, int | None]


def visible_mask(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    device: torch.device | str = "cpu",
) -> Tensor:
    """(Sq, Sk) bool, True where a query row attends to a column.

    Bottom-right aligned: the diagonal of row i is column i + Sk - Sq. Window bounds are inclusive.
    """
    left, right = normalise_window(causal, window_size)
    rows = torch.arange(seqlen_q, device=device)[:, None]  # (Sq, 1)
    columns = torch.arange(seqlen_k, device=device)[None, :]  # (1, Sk)
    distance = columns - (rows + seqlen_k - seqlen_q)  # (Sq, Sk), 0 on the diagonal
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Exact attention, computed in fp64 for fp64 inputs and in fp32 for all others.

    Args:
        q: (B, Sq, Hq, D).
        k: (B, Sk, Hk, D), Hk divides Hq.
        v: (B, Sk, Hk, Dv).
        softmax_scale: None for D**-0.5.
        causal: bottom-right aligned causal mask.
        window_size: inclusive (left, right) around the diagonal; -1 or None for unbounded.
        softcap: 0.0 for none.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, rounded once, and lse (B, Hq, Sq) in the computing
        dtype. Whatever stands in columns that a row does not see, NaN too, leaves it unchanged.
    """
    compute = _compute_dtype(q)
    visible = visible_mask(
        q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
    )
    scores, _ = _scores(q.to(compute), k.to(compute), _scale(q, softmax_scale), softcap, visible)
    probs, lse = _softmax(scores)  # (B, Hk, G, Sq, Sk), (B, Hk, G, Sq)
    out = _weighted_rows(probs, _by_kv_head(v.to(compute)), visible)  # (B, Hk, G, Sq, Dv)
    return _merge_heads(out).to(q.dtype), lse.flatten(1, 2)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention`` written out as formulas, computed as the forward is.

        dV = Pᵀ @ dO
        dP = dO @ Vᵀ
        Δ  = rowsum(dO ∘ O)                       (= rowsum(P ∘ dP))
        dS = P ∘ (dP - Δ + dLSE)                  since ∂LSE/∂S = P
        dS = dS ∘ (1 - tanh²(S / softcap))        where softcap > 0
        dQ = scale · dS @ K,   dK = scale · dSᵀ @ Q

    dK and dV are summed over the G query heads that share a K/V head.

    Args:
        dout: (B, Sq, Hq, Dv), gradient of out.
        dlse: (B, Hq, Sq) or None, gradient of lse. Rows that see nothing take none.

    Returns:
        dq, dk, dv, shaped and typed as q, k, v.
    """
    compute = _compute_dtype(q)
    scale = _scale(q, softmax_scale)
    groups = q.shape[2] // k.shape[2]
    visible = visible_mask(
        q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
    )
    scores, cap_slope = _scores(q.to(compute), k.to(compute), scale, softcap, visible)
    probs, _ = _softmax(scores)  # (B, Hk, G, Sq, Sk)

    q_heads = _by_query_group(q.to(compute), groups)  # (B, Hk, G, Sq, D)
    do_heads = _by_query_group(dout.to(compute), groups)  # (B, Hk, G, Sq, Dv)
    k_heads = _by_kv_head(k.to(compute))  # (B, Hk, 1, Sk, D)
    v_heads = _by_kv_head(v.to(compute))  # (B, Hk, 1, Sk, Dv)

    # dV = Pᵀ @ dO, summed over the group   (Sk, Dv) = (Sk, Sq) @ (Sq, Dv)
    dv = _weighted_rows(probs.mT, do_heads, visible.mT).sum(dim=2)  # (B, Hk, Sk, Dv)
    # dP = dO @ Vᵀ   (Sq, Sk) = (Sq, Dv) @ (Dv, Sk)
    dp = (do_heads @ v_heads.mT).masked_fill(~visible, 0.0)  # (B, Hk, G, Sq, Sk)
    delta = (probs * dp).sum(dim=-1, keepdim=True)  # (B, Hk, G, Sq, 1)
    ds = probs * (dp - delta)  # (B, Hk, G, Sq, Sk)
    if dlse is not None:
        ds = ds + probs * dlse.to(compute).unflatten(1, (-1, groups))[..., None]
    if cap_slope is not None:
        ds = ds * cap_slope
    dq = scale * _weighted_rows(ds, k_heads, visible)  # (B, Hk, G, Sq, D)
    dk = scale * _weighted_rows(ds.mT, q_heads, visible.mT).sum(dim=2)  # (B, Hk, Sk, D)
    return (
        _merge_heads(dq).to(q.dtype),
        dk.transpose(1, 2).to(k.dtype),
        dv.transpose(1, 2).to(v.dtype),
    )


class DenseAttention(torch.autograd.Function):
    """``attention`` with ``attention_backward`` as its gradient: what gradcheck is run on.

    ``DenseAttention.apply(q, k, v, softmax_scale, causal, window_size, softcap)`` returns
    (out, lse). There is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None,
        causal: bool,
        window_size: Window,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.features = {
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
        }
        return attention(q, k, v, **ctx.features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return (*attention_backward(dout, q, k, v, dlse=dlse, **ctx.features), *(None,) * 4)


def attention_low_precision(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same computation by eager PyTorch at the input precision: the yardstick of errors.

    Scores, probabilities and output are each rounded to q's dtype, as an unfused program rounds
    them. The LSE comes from fp32 scores, which is what a program that wants one would keep.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) in fp32 (fp64 for fp64 inputs).
    """
    scale = _scale(q, softmax_scale)
    visible = visible_mask(
        q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device
    )
    scores, _ = _scores(q, k, scale, softcap, visible)  # q's dtype
    probs, _ = _softmax(scores)
    out = _weighted_rows(probs, _by_kv_head(v), visible)
    compute = _compute_dtype(q)
    wide_scores, _ = _scores(q.to(compute), k.to(compute), scale, softcap, visible)
    return _merge_heads(out), _softmax(wide_scores)[1].flatten(1, 2)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    packing: Packing,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    compute: Callable[..., tuple[Tensor, Tensor]] = attention,
) -> tuple[Tensor, Tensor]:
    """``attention`` of each packed sequence by itself, one after another.

    Args:
        q: (Tq, Hq, D).
        k: (Tk, Hk, D), Hk divides Hq.
        v: (Tk, Hk, Dv).
        packing: where the sequences lie; lengths that differ are what this is for.
        softmax_scale, causal, window_size, softcap: as for ``attention``, for each sequence.
        compute: what is done with each sequence; ``attention_low_precision`` for the yardstick.

    Returns:
        out (Tq, Hq, Dv) in q's dtype and lse (Hq, Tq) in the computing dtype. Rows that do not
        count give 0 and -inf; what stands in keys and values that do not count is not looked at.
    """

    def of_sequence(number: int, of_q: slice, of_k: slice) -> tuple[Tensor, Tensor]:
        return compute(
            q[None, of_q],
            k[None, of_k],
            v[None, of_k],
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
        )

    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=_compute_dtype(q))
    return one_by_one(packing, of_sequence, out, lse)


def one_by_one(
    packing: Packing,
    of_sequence: Callable[[int, slice, slice], tuple[Tensor, Tensor]],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """``out`` (Tq, Hq, Dv) and ``lse`` (Hq, Tq), filled in the rows that count.

    Args:
        of_sequence: from the number of a sequence, its rows of q and its rows of k and v to its out
            (1, Sq, Hq, Dv) and LSE (1, Hq, Sq).
    """
    for number, (rows_q, rows_k) in enumerate(zip(packing.rows_q, packing.rows_k, strict=True)):
        of_q, of_k = slice(rows_q.start, rows_q.stop), slice(rows_k.start, rows_k.stop)
        own_out, own_lse = of_sequence(number, of_q, of_k)
        out[of_q], lse[:, of_q] = own_out[0], own_lse[0]
    return out, lse


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)


def _by_query_group(x: Tensor, groups: int) -> Tensor:
    """(B, S, Hq, D) → (B, Hk, G, S, D): query head h reads K/V head h // G."""
    return x.unflatten(2, (x.shape[2] // groups, groups)).permute(0, 2, 3, 1, 4)


def _by_kv_head(x: Tensor) -> Tensor:
    """(B, S, Hk, D) → (B, Hk, 1, S, D), to broadcast over the group."""
    return x.transpose(1, 2)[:, :, None]


def _merge_heads(x: Tensor) -> Tensor:
    """(B, Hk, G, S, D) → (B, S, Hq, D)."""
    return x.flatten(1, 2).transpose(1, 2)


def _scores(
    q: Tensor, k: Tensor, scale: float, softcap: float, visible: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (B, Hk, G, Sq, Sk) and, with a softcap, its slope ∂capped/∂score."""
    groups = q.shape[2] // k.shape[2]
    # S = scale · Q @ Kᵀ   (Sq, Sk) = (Sq, D) @ (D, Sk)
    scores = (_by_query_group(q, groups) @ _by_kv_head(k).mT) * scale
    slope = None
    if softcap > 0.0:
        # tanh of a masked NaN score must not reach the backward, so its slope is cleared.
        tanh = torch.tanh(scores / softcap)
        slope = (1.0 - tanh * tanh).masked_fill(~visible, 0.0)
        scores = softcap * tanh
    return scores.masked_fill(~visible, float("-inf")), slope


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, 0 in rows that see nothing, and the log-sum-exp, -inf there.

    (…, Sq, Sk) → (…, Sq, Sk), (…, Sq).
    """
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probs = torch.softmax(scores, dim=-1)
    is_empty = (lse == float("-inf"))[..., None]
    return probs.masked_fill(is_empty, 0.0), lse


def _weighted_rows(weights: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
    """weights @ rows in which an invisible row counts for nothing, even a NaN or infinite one.

    (…, M, N), (…, N, D), (M, N) → (…, M, D). A matrix multiply alone would give 0 · NaN = NaN, so
    rows with a non-finite element are left out of it and added by hand where they are visible.
    """
    is_bad = ~torch.isfinite(rows).all(dim=-1, keepdim=True)  # (…, N, 1)
    result = weights @ rows.masked_fill(is_bad, 0.0)
    for n in is_bad[..., 0].flatten(0, -2).any(dim=0).nonzero()[:, 0].tolist():
        bad_row = torch.where(is_bad, rows, 0.0)[..., n, :][..., None, :]  # (…, 1, D)
        term = weights[..., n][..., None] * bad_row  # (…, M, D)
        result = result + term.masked_fill(~visible[:, n][:, None], 0.0)
    return result
