"""One attention problem as a value: shapes, dtype and masking, with its costs counted exactly.

Glossary of shape letters, used in every comment of this project:
    B batch · Sq, Sk sequence lengths · Hq, Hk heads · G = Hq / Hk · D, Dv head dims ·
    M, N tile_m, tile_n · stage pipeline depth · MMA, MMA_M, MMA_N, MMA_K fragment modes ·
    CPY, CPY_M, CPY_K copy modes · ? dynamic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cute_fa.errors import InvalidArgumentError, InvalidTypeError

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8


@dataclass(frozen=True)
class KernelVariant:
    """What a forward kernel is specialised for; nothing here depends on a sequence length.

    ``causal`` is a right window of 0 that kernels may treat specially; ``has_window_left`` and
    ``has_window_right`` ask for the run-time bounds of a sliding window (``has_window_right``
    is never set together with ``causal``).
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool = False
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False


def normalise_window(
    causal: bool, window_size: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    """(left, right) with None for unbounded and causality folded into ``right``.

    Windows are inclusive: query row i, whose diagonal is column i + Sk - Sq, attends to columns
    diagonal - left … diagonal + right. -1 and None both mean unbounded.

    Raises:
        InvalidArgumentError: a bound below -1 or not an integer.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidTypeError(
            "window_size is not a pair", got=repr(window_size), expected="(left, right)"
        ) from None
    bounds: list[int | None] = []
    for name, value in (("left", left), ("right", right)):
        if value is None or value == -1:
            bounds.append(None)
        elif isinstance(value, bool) or not isinstance(value, int) or value < -1:
            raise InvalidArgumentError(
                f"window_size: the {name} bound is not usable",
                got=repr(value),
                expected="an integer ≥ 0, or -1 / None for unbounded",
            )
        else:
            bounds.append(value)
    return bounds[0], 0 if causal else bounds[1]


@dataclass(frozen=True)
class AttentionProblem:
    """Shapes, dtype and masking of one attention forward.

    Attributes:
        batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v: B, Sq, Sk, Hq, Hk, D, Dv.
        dtype: "float16", "bfloat16" or "float8_e4m3fn".
        causal: bottom-right aligned causal mask.
        window_left, window_right: inclusive bounds around the diagonal, None for unbounded.
        softcap: 0.0 for none; else scores become softcap·tanh(score / softcap).
        softmax_scale: None for D**-0.5.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_k"):
            if getattr(self, name) < 0:
                raise InvalidArgumentError(
                    f"{name} is negative", got=getattr(self, name), expected="≥ 0"
                )
        for name in ("heads_q", "heads_k", "head_dim", "head_dim_v"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(
                    f"{name} is not positive", got=getattr(self, name), expected="≥ 1"
                )
        if self.heads_q % self.heads_k:
            raise InvalidArgumentError(
                "K/V heads do not divide Q heads",
                got=f"{self.heads_q} query heads and {self.heads_k} K/V heads",
                expected="heads_q to be a multiple of heads_k (MHA, GQA or MQA)",
            )
        if self.dtype not in DTYPE_BYTES:
            raise InvalidTypeError(
                "dtype is not an attention dtype",
                got=self.dtype,
                expected=", ".join(DTYPE_BYTES),
            )
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value % HEAD_DIM_MULTIPLE or value > MAX_HEAD_DIM:
                up = min(-(-value // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE, MAX_HEAD_DIM)
                raise InvalidArgumentError(
                    f"{name} is not one that any kernel serves",
                    got=value,
                    expected=f"a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}",
                    fix=f"pad the last dimension with zeros to {up}"
                    if value <= MAX_HEAD_DIM
                    else "split the head dimension, or use a reference implementation",
                )
        if not math.isfinite(self.softcap) or self.softcap < 0:
            raise InvalidArgumentError(
                "softcap is not usable", got=self.softcap, expected="a finite number ≥ 0 (0: none)"
            )
        if self.softmax_scale is not None and not math.isfinite(self.softmax_scale):
            raise InvalidArgumentError(
                "softmax_scale is not finite",
                got=self.softmax_scale,
                expected="a finite number, or None for head_dim ** -0.5",
            )

    @property
    def scale(self) -> float:
        """softmax_scale with its default D**-0.5 filled in."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def window(self) -> tuple[int | None, int | None]:
        """(left, right) with causality folded in; None is unbounded."""
        right = 0 if self.causal else self.window_right
        return self.window_left, right

    @property
    def variant(self) -> KernelVariant:
        """What a kernel must be compiled for to serve this problem."""
        return KernelVariant(
            dtype=self.dtype,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            causal=self.causal,
            has_window_left=self.window_left is not None,
            has_window_right=not self.causal and self.window_right is not None,
            has_softcap=self.softcap > 0.0,
        )

    def visible_columns(self, row: int) -> tuple[int, int]:
        """Half-open range of the K columns that query ``row`` attends to (empty: lo == hi)."""
        left, right = self.window
        diagonal = row + self.seqlen_k - self.seqlen_q
        lo = 0 if left is None else max(0, diagonal - left)
        hi = self.seqlen_k if right is None else min(self.seqlen_k, diagonal + right + 1)
        return (lo, hi) if lo < hi else (0, 0)

    def score_count(self) -> int:
        """Unmasked (row, column) pairs of one head: the area that the mask leaves."""
        total = 0
        for row in range(self.seqlen_q):
            lo, hi = self.visible_columns(row)
            total += hi - lo
        return total

    def flops(self) -> int:
        """Matrix-multiply FLOPs of the forward: 2·(D + Dv) per unmasked score and head."""
        per_head = 2 * (self.head_dim + self.head_dim_v) * self.score_count()
        return self.batch * self.heads_q * per_head

    def ideal_hbm_bytes(self) -> int:
        """Bytes if each of Q, K, V is read once and O and the fp32 LSE are written once."""
        size = DTYPE_BYTES[self.dtype]
        out_size = max(size, 2)
        q = self.batch * self.seqlen_q * self.heads_q * self.head_dim * size
        kv = self.batch * self.seqlen_k * self.heads_k * (self.head_dim + self.head_dim_v) * size
        o = self.batch * self.seqlen_q * self.heads_q * self.head_dim_v * out_size
        lse = self.batch * self.seqlen_q * self.heads_q * 4
        return q + kv + o + lse

    def standard_hbm_bytes(self) -> int:
        """Bytes of the unfused algorithm (FlashAttention paper, Algorithm 0): S and P, Sq × Sk in
        the input dtype, are each written once and read once beside the inputs and outputs."""
        size = DTYPE_BYTES[self.dtype]
        scores = self.batch * self.heads_q * self.seqlen_q * self.seqlen_k * size
        return self.ideal_hbm_bytes() + 4 * scores
