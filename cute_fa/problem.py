"""One attention problem as a value: shapes, dtype and masking, with its costs counted exactly.

Glossary of shape letters, used in every comment of this project:
    B batch · Sq, Sk sequence lengths · Hq, Hk heads · G = Hq / Hk · D, Dv head dims ·
    M, N tile_m, tile_n · stage pipeline depth · MMA, MMA_M, MMA_N, MMA_K fragment modes ·
    CPY, CPY_M, CPY_K copy modes · ? dynamic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from cute_fa.errors import InvalidArgumentError, InvalidTypeError

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
KERNEL_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
"""What some kernel of this version takes."""

MAX_HEAD_DIM = 256


# Kernels work on scores in fp32, in units of log2(e): a number must survive both conversions.
MAX_SCALAR = 2.0**126
MIN_SOFTCAP = 2.0**-100


@dataclass(frozen=True)
class KernelVariant:
    """What a forward kernel is specialised for; nothing here depends on a sequence length.

    Attributes:
        dtype: of Q, K and V: "float16", "bfloat16", or "float8_e4m3fn" with O in bfloat16.
        head_dim, head_dim_v: D and Dv, multiples of 8, in fp8 of 16, up to 256.
        causal: bottom-right aligned; a right window of 0 that kernels may treat specially.
        has_window_left, has_window_right: run-time bounds of a sliding window; a right one is never
            there together with ``causal``.
        has_softcap: scores pass through softcap·tanh(·/softcap).
        is_varlen: packed sequences (``cute_fa.varlen``).
        has_seqused_q, has_seqused_k: of which only the first rows of each count.
        packed_group: query heads of a K/V head that share a row tile, each query row becoming that
            many.
        has_block_descales: every 128 rows of FP8 inputs have a descale of their own, not each head.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool = False
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False
    is_varlen: bool = False
    has_seqused_q: bool = False
    has_seqused_k: bool = False
    packed_group: int = 1
    has_block_descales: bool = False

    @property
    def is_masked(self) -> bool:
        """Whether there are keys that some query does not see."""
        return self.causal or self.has_window_left or self.has_window_right


def head_dim_multiple(dtype: str) -> int:
    """What head dims are multiples of: rows are made of chunks of 16 bytes."""
    return 16 // DTYPE_BYTES[dtype]


def is_fp8(dtype: str) -> bool:
    """Whether ``dtype`` has 8 bits, so that tensors come with descales."""
    return DTYPE_BYTES[dtype] == 1


def out_dtype(dtype: str) -> str:
    """What attention gives on inputs of ``dtype``: FP8 inputs make bfloat16 outputs."""
    return "bfloat16" if is_fp8(dtype) else dtype


def check_integer(name: str, value: object) -> int:
    """``value`` as an int.

    Raises:
        InvalidTypeError: a bool, a float or anything else that is no integer.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(
            f"{name} is not an integer",
            got=f"{value!r} ({type(value).__name__})",
            expected="a Python int",
            fix=f"pass int({name})" if isinstance(value, Real) else "pass a whole number",
        )
    return int(value)


def check_flag(name: str, value: object, fix: str | None = None) -> None:
    """That a flag is True or False: "no", 0 or a tensor would otherwise pass for one."""
    if not isinstance(value, bool):
        raise InvalidTypeError(
            f"{name} is not a bool",
            got=f"{value!r} ({type(value).__name__})",
            expected="True or False",
            fix=fix or f"pass {name}=True or {name}=False",
        )


def check_scalar(name: str, value: object) -> float:
    """``value`` as a float, if it is a real number that fp32 can hold with room for log2(e).

    Raises:
        InvalidTypeError: not a number (a tensor, a string, a bool).
        InvalidArgumentError: NaN, infinite, or beyond 2**126.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(
            f"{name} is not a number",
            got=f"{value!r} ({type(value).__name__})",
            expected="a Python float",
            fix="pass a number" if value is None else f"pass float({name})",
        )
    number = float(value)
    if not math.isfinite(number) or abs(number) > MAX_SCALAR:
        raise InvalidArgumentError(
            f"{name} is not a finite fp32 number",
            got=number,
            expected=f"a finite number of magnitude up to {MAX_SCALAR:.3g}",
            fix=f"pass a finite number, or leave {name} out for its default",
        )
    return number


def normalise_window(
    causal: bool, window_size: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    """(left, right) with None for unbounded and causality folded into ``right``.

    Windows are inclusive: query row i, whose diagonal is column i + Sk - Sq, attends to columns
    diagonal - left … diagonal + right. -1 and None both mean unbounded. ``causal`` and a right
    bound are both honoured: the mask is their intersection, which is a right bound of 0.

    Raises:
        InvalidTypeError: not a pair, or a bound that is not an integer.
        InvalidArgumentError: a bound below -1.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise InvalidTypeError(
            "window_size is not a pair",
            got=repr(window_size),
            expected="(left, right)",
            fix="pass two bounds, -1 for one that does not bound: (255, -1)",
        ) from None
    expected = "an integer ≥ 0, or -1 / None for unbounded"
    bounds: list[int | None] = []
    for name, value in (("left", left), ("right", right)):
        if value is None:
            bounds.append(None)
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InvalidTypeError(
                f"window_size: the {name} bound is not an integer",
                got=f"{value!r} ({type(value).__name__})",
                expected=expected,
                fix="pass a Python int, or None",
            )
        if value < -1:
            raise InvalidArgumentError(
                f"window_size: the {name} bound is negative",
                got=value,
                expected=expected,
                fix="pass -1 for unbounded; every window holds its diagonal",
            )
        bounds.append(None if value == -1 else int(value))
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
        self._check_sizes()
        self._check_head_dims()
        check_flag("causal", self.causal)
        for name in ("window_left", "window_right"):
            bound = getattr(self, name)
            if bound is not None and check_integer(name, bound) < 0:
                raise InvalidArgumentError(
                    f"{name} is negative",
                    got=bound,
                    expected="≥ 0, or None for unbounded",
                    fix=f"pass {name}=None if that was meant",
                )
        check_scalar("softcap", self.softcap)
        if self.softcap < 0 or 0 < self.softcap < MIN_SOFTCAP:
            raise InvalidArgumentError(
                "softcap is not usable",
                got=self.softcap,
                expected=f"0 for none, or a number of at least {MIN_SOFTCAP}",
                fix="pass softcap=0.0 for none; scores are divided by it in fp32",
            )
        if self.softmax_scale is not None:
            check_scalar("softmax_scale", self.softmax_scale)

    def _check_sizes(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_k"):
            if check_integer(name, getattr(self, name)) < 0:
                raise InvalidArgumentError(
                    f"{name} is negative",
                    got=getattr(self, name),
                    expected="≥ 0",
                    fix=f"pass how many there are; {name}=0 makes an empty result",
                )
        for name in ("heads_q", "heads_k", "head_dim", "head_dim_v"):
            if check_integer(name, getattr(self, name)) < 1:
                raise InvalidArgumentError(
                    f"{name} is not positive",
                    got=getattr(self, name),
                    expected="≥ 1",
                    fix="check the order of the dimensions: (batch, sequence, heads, head dim)",
                )
        if self.heads_q % self.heads_k:
            raise InvalidArgumentError(
                "K/V heads do not divide Q heads",
                got=f"{self.heads_q} query heads and {self.heads_k} K/V heads",
                expected="heads_q to be a multiple of heads_k (MHA, GQA or MQA)",
                fix="check which dimension holds the heads; repeat_interleave(n, dim=-2) gives n "
                "query heads each a K/V head",
            )

    def _check_head_dims(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise InvalidTypeError(
                "dtype is not an attention dtype",
                got=self.dtype,
                expected=" or ".join(KERNEL_DTYPES),
                fix="pass one of these names, or use cute_fa.reference.dense.attention for others",
            )
        multiple = head_dim_multiple(self.dtype)
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            if value > MAX_HEAD_DIM:
                raise InvalidArgumentError(
                    f"{name} is larger than any kernel serves",
                    got=value,
                    expected=f"a multiple of {multiple} up to {MAX_HEAD_DIM}",
                    fix="use cute_fa.reference.dense.attention, which takes any head dim",
                )
            if value % multiple:
                padded = -(-value // multiple) * multiple
                fix = f"pad the last dimension with zeros to {padded}"
                if name == "head_dim":
                    fix += f" and pass softmax_scale={value}**-0.5"
                raise InvalidArgumentError(
                    f"{name} is not a multiple of {multiple}",
                    got=value,
                    expected=f"a multiple of {multiple} up to {MAX_HEAD_DIM}",
                    fix=fix,
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
        """Unmasked (row, column) pairs of one head: the area that the mask leaves. O(1)."""
        left, right = self.window
        # A pair is visible when -left ≤ j - i - (Sk - Sq) ≤ right; the pairs with a difference
        # of at most d are counted in closed form, so a band is one count minus another.
        offset = self.seqlen_k - self.seqlen_q
        everything = self.seqlen_q * self.seqlen_k
        below_right = everything if right is None else self._pairs_up_to(offset + right)
        below_left = 0 if left is None else self._pairs_up_to(offset - left - 1)
        return below_right - below_left

    def _pairs_up_to(self, difference: int) -> int:
        """Pairs (i, j), 0 ≤ i < Sq, 0 ≤ j < Sk, with j - i ≤ difference."""
        # Row i has min(max(i + difference + 1, 0), Sk) of them: a prefix sum of min(u, Sk).
        return _capped_sum(self.seqlen_q + difference, self.seqlen_k) - _capped_sum(
            difference, self.seqlen_k
        )

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


def _capped_sum(stop: int, cap: int) -> int:
    """Σ of min(u, cap) for u = 1 … stop (0 for stop ≤ 0)."""
    ramp = max(0, min(stop, cap))
    return ramp * (ramp + 1) // 2 + max(0, stop - cap) * cap
