"""Attention inputs to FP8 (e4m3), with the two steps that keep its error low.

FlashAttention-3, section 3.3: *block quantisation* gives every block of rows of a head a scale of
its own, so that one outlier coarsens its block only, and *incoherent processing* rotates Q and K by
the same random orthogonal matrix first, which spreads an outlier over its row and leaves Q Kᵀ, and
so the result, unchanged. Everything here is PyTorch, runs where its inputs are, and can be traced
(torch.compile).

>>> import torch
>>> from cute_fa import quant
>>> q, k, v = (torch.randn(1, 256, 2, 64, dtype=torch.bfloat16) for _ in range(3))
>>> fp8 = quant.quantize_qkv(q, k, v)
>>> fp8.q.dtype, tuple(fp8.q_descale.shape)
(torch.float8_e4m3fn, (1, 2, 2))

What is stored is x / descale, rounded to e4m3; x is about stored · descale. Packed sequences have
scales of their own each (``quantize_varlen_qkv``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cute_fa.errors import InvalidArgumentError, InvalidTypeError

FP8_MAX = 448.0
"""The largest e4m3 number (OCP 8-bit floating point specification)."""

BLOCK_ROWS = 128
"""Rows of one scale in block quantisation, unless asked otherwise; kernels take multiples of it."""


class QuantizedQKV(NamedTuple):
    """Q, K, V in e4m3 and their scales.

    Attributes:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), float8_e4m3fn, contiguous; of
            packed sequences (Tq, Hq, D), (Tk, Hk, D), (Tk, Hk, Dv).
        q_descale, k_descale, v_descale: fp32, (B, Hk) for one scale per K/V head (the query heads
            that share it share theirs), or (B, Hk, blocks) for one per block of rows; of packed
            sequences B is their number, and their rows are counted from the first of each.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_rows: int | None = BLOCK_ROWS,
    is_rotated: bool = True,
    seed: int = 0,
) -> QuantizedQKV:
    """Q, K, V as an FP8 attention kernel takes them.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), floating point.
        block_rows: rows of a scale; None for one scale per (batch, K/V head).
        is_rotated: rotate Q and K first (``rotate``).
        seed: of the rotation's signs.

    Raises:
        InvalidTypeError: not a floating-point tensor; block_rows or a seed that is no integer.
        InvalidArgumentError: shapes that do not fit, or block_rows below 1.
    """
    _check_qkv(q, k, v, ("batch", "sequence"))
    if is_rotated:
        q, k = rotate(q, seed=seed), rotate(k, seed=seed)
    stored, descales = zip(
        *(quantize(x, heads_k=k.shape[2], block_rows=block_rows) for x in (q, k, v)), strict=True
    )
    return QuantizedQKV(*stored, *descales)


def quantize_varlen_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_rows: int | None = BLOCK_ROWS,
    is_rotated: bool = True,
    seed: int = 0,
) -> QuantizedQKV:
    """Packed q, k, v as an FP8 attention kernel takes them; nothing waits for a GPU.

    >>> import torch
    >>> from cute_fa import quant
    >>> q, k, v = (torch.randn(400, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    >>> borders = torch.tensor([0, 300, 300, 400], dtype=torch.int32)
    >>> lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
    >>> lengths.update(max_seqlen_q=300, max_seqlen_k=300)
    >>> fp8 = quant.quantize_varlen_qkv(q, k, v, **lengths)
    >>> tuple(fp8.q.shape), tuple(fp8.q_descale.shape)
    ((400, 2, 64), (3, 2, 3))

    Args:
        q, k, v: (Tq, Hq, D), (Tk, Hk, D), (Tk, Hk, Dv), floating point.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k: where the
            sequences lie, as ``flash_attn_varlen_func`` has them. Rows that do not count become 0.
        block_rows, is_rotated, seed: as of ``quantize_qkv``; blocks begin anew in each sequence.

    Raises:
        InvalidTypeError, InvalidArgumentError: as ``quantize_qkv``; also, of CPU tensors where
            nothing is compiled, for a longest length that is smaller than a sequence.
    """
    _check_qkv(q, k, v, ("row",))
    count = None
    for side, borders, used in (("q", cu_seqlens_q, seqused_q), ("k", cu_seqlens_k, seqused_k)):
        _check_lengths(f"cu_seqlens_{side}", borders, count, q)
        count = borders.shape[0]
        if used is not None:
            _check_lengths(f"seqused_{side}", used, count - 1, q)
    if is_rotated:
        q, k = rotate(q, seed=seed), rotate(k, seed=seed)
    of_q = (cu_seqlens_q, max_seqlen_q, seqused_q)
    of_k = (cu_seqlens_k, max_seqlen_k, seqused_k)
    stored, descales = zip(
        *(
            _quantize_packed(x, k.shape[1], block_rows, *lengths)
            for x, lengths in ((q, of_q), (k, of_k), (v, of_k))
        ),
        strict=True,
    )
    return QuantizedQKV(*stored, *descales)


def quantize(
    x: Tensor, *, heads_k: int | None = None, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """x / descale in e4m3, and descale: the largest magnitude of each group over 448.

    Args:
        x: (B, S, H, D), floating point.
        heads_k: K/V heads; the H / heads_k heads of each share a scale. None for H.
        block_rows: rows of a group; None for all S.

    Returns:
        (B, S, H, D) float8_e4m3fn, contiguous, and fp32 descales (B, heads_k), or
        (B, heads_k, ceil(S / block_rows)) with ``block_rows``. A group of zeros has descale 1.

    Raises:
        InvalidTypeError, InvalidArgumentError: as ``quantize_qkv``; heads_k that does not divide H.
    """
    _check("x", x, ("batch", "sequence"))
    batch, rows, heads, _ = x.shape
    borders = rows * torch.arange(batch + 1, device=x.device)
    heads_k = heads if heads_k is None else heads_k
    stored, descale = _quantize_packed(x.flatten(0, 1), heads_k, block_rows, borders, rows)
    return stored.view(x.shape), descale


def _quantize_packed(
    x: Tensor,
    heads_k: int,
    block_rows: int | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``quantize`` of packed x (T, H, D): stored (T, H, D), descales (B, Hk[, blocks])."""
    _check_groups(x.shape[1], heads_k, block_rows)
    batch = cu_seqlens.shape[0] - 1
    blocks = 1 if block_rows is None else -(-max_seqlen // block_rows)
    sequence, row, counts = _places(x, cu_seqlens, used)
    block = 0 if block_rows is None else row // block_rows
    is_readable = x.device.type == "cpu" and not is_compiling()
    if is_readable and bool((row[counts] >= max_seqlen).any()):
        raise InvalidArgumentError(
            "the longest length is smaller than a sequence",
            got=max_seqlen,
            expected=f"at least {int(row[counts].max()) + 1}",
            fix="max_seqlen_q and max_seqlen_k count the rows of the longest sequence",
        )
    # One group more, for the rows that do not count.
    group = torch.where(counts, sequence * blocks + block, batch * blocks)
    heads = x.masked_fill(~counts[:, None, None], 0.0).float().unflatten(1, (heads_k, -1))
    of_rows = heads.abs().amax(dim=(2, 3)) if x.numel() else heads.new_zeros(len(x), heads_k)
    largest = of_rows.new_zeros(batch * blocks + 1, heads_k)
    largest.scatter_reduce_(0, group[:, None].expand_as(of_rows), of_rows, "amax")
    # The descale of the smallest numbers would be 0.
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    descale = torch.where(largest > 0.0, scale, 1.0)
    # Division may round the largest element up past 448, which e4m3 has no number for.
    scaled = (heads / descale[group][..., None, None]).clamp(-FP8_MAX, FP8_MAX)
    stored = scaled.to(torch.float8_e4m3fn).flatten(1, 2)
    descale = descale[:-1].unflatten(0, (batch, blocks)).transpose(1, 2)  # (B, Hk, blocks)
    return stored, (descale[..., 0] if block_rows is None else descale).contiguous()


def _places(x: Tensor, cu_seqlens: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of packed x: its sequence, which row of it, and whether it counts."""
    index = torch.arange(x.shape[0], device=x.device)
    # The last sequence that begins at or before the row; those without rows lie before it.
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    row = index - cu_seqlens[sequence]
    lengths = cu_seqlens.diff() if used is None else used
    # Behind all sequences no row counts.
    return sequence, row, row < torch.nn.functional.pad(lengths, (0, 1))[sequence]


def dequantize(stored: Tensor, descale: Tensor, *, block_rows: int | None = None) -> Tensor:
    """The fp32 numbers that ``quantize``'s results stand for, (B, S, H, D)."""
    return stored.float() * expand_descale(
        descale, stored.shape[1], stored.shape[2], block_rows=block_rows
    )


def expand_descale(
    descale: Tensor, rows: int, heads: int, *, block_rows: int | None = None
) -> Tensor:
    """A descale for every row and head, (B, S, H, 1), of one (B, Hk) or (B, Hk, blocks). Blocks
    behind the last row, as shorter sequences of a batch have, are left out.

    Raises:
        InvalidTypeError: block_rows that is no integer.
        InvalidArgumentError: a descale of another rank than ``block_rows`` asks for, too few
            blocks, or Hk that does not divide the heads.
    """
    expected = 2 if block_rows is None else 3
    if descale.ndim != expected:
        raise InvalidArgumentError(
            "descale has the wrong number of dimensions",
            got=f"{tuple(descale.shape)} and block_rows={block_rows}",
            expected="(B, Hk)" if block_rows is None else "(B, Hk, blocks)",
            fix="pass the block_rows that it was made with",
        )
    _check_groups(heads, descale.shape[1], block_rows)
    if block_rows is not None and descale.shape[2] * block_rows < rows:
        raise InvalidArgumentError(
            "descale has fewer blocks than the rows",
            got=f"{descale.shape[2]} blocks of {block_rows} rows for {rows}",
            expected=f"at least {-(-rows // block_rows)} blocks",
            fix="pass the block_rows that it was made with",
        )
    per_head = descale.repeat_interleave(heads // descale.shape[1], dim=1)  # (B, H[, blocks])
    if block_rows is None:
        return per_head[:, None, :, None].expand(-1, rows, -1, -1)
    return per_head.transpose(1, 2).repeat_interleave(block_rows, dim=1)[:, :rows, :, None]


def rotate(x: Tensor, *, seed: int = 0) -> Tensor:
    """x M for a random orthogonal M: random signs, then Hadamard transforms.

    The transform works on runs of the largest power of two that divides D (all of D for 64, 128 and
    256; 32 columns each for 96), in D·log2(run) additions (fast Walsh–Hadamard).

    Args:
        x: (..., D), floating point.
        seed: of the signs, 64 bits; Q and K must be rotated with the same.

    Returns:
        same shape and dtype; computed in fp32.

    Raises:
        InvalidTypeError: not a floating-point tensor, or a seed that is no integer.
        InvalidArgumentError: a seed of more bits, or no columns.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidTypeError(
            "x is not a floating-point tensor",
            got=_kind(x),
            expected="a floating-point torch.Tensor",
            fix="x = torch.as_tensor(x).float()",
        )
    _check_integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise InvalidArgumentError(
            "seed has more than 64 bits",
            got=seed,
            expected="-2**63 ≤ seed < 2**63",
            fix="seed % 2**63",
        )
    dim = x.shape[-1] if x.ndim else 0
    if dim < 1:
        raise InvalidArgumentError(
            "x has no columns",
            got=tuple(x.shape),
            expected="(..., D), D ≥ 1",
            fix="the head dim is the last dimension",
        )
    signs = torch.ops.cute_fa.random_signs(dim, seed, x.device)
    run = dim & -dim
    y = (x.float() * signs).reshape(*x.shape[:-1], dim // run, run)
    width = 1
    while width < run:
        pairs = y.reshape(*y.shape[:-1], run // (2 * width), 2, width)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2).reshape(y.shape)
        width *= 2
    return (y * run**-0.5).reshape(x.shape).to(x.dtype)


# An operator, because torch.compile traces no generator. The signs are kept, because a CUDA graph
# copies nothing from the host.
torch.library.define(
    "cute_fa::random_signs", "(SymInt count, int seed, Device device) -> Tensor signs"
)


@torch.library.impl("cute_fa::random_signs", "CompositeExplicitAutograd")
def _random_signs(count: int, seed: int, device: torch.device) -> Tensor:
    # Whoever has an operator's result may write into it.
    return _kept_signs(count, seed, device).clone()


@torch.library.register_fake("cute_fa::random_signs")
def _random_signs_fake(count: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _kept_signs(count: int, seed: int, device: torch.device) -> Tensor:
    """The same ``count`` numbers out of -1 and 1 for a seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read them
    return signs


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, outer: tuple[str, ...]) -> None:
    """Tensors with the ``outer`` dimensions and heads and head dims that fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check(name, x, outer)
    is_one_batch = q.shape[:-3] == k.shape[:-3]
    if not is_one_batch or q.shape[-1] != k.shape[-1] or v.shape[:-1] != k.shape[:-1]:
        rows = ("B, Sq", "B, Sk") if len(outer) == 2 else ("Tq", "Tk")
        raise InvalidArgumentError(
            "shapes of q, k and v do not fit each other",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            expected=f"q ({rows[0]}, Hq, D), k ({rows[1]}, Hk, D), v ({rows[1]}, Hk, Dv)",
            fix="check the order of the dimensions: heads stand before the head dim",
        )


def _check_lengths(name: str, lengths: object, count: int | None, x: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise InvalidTypeError(
            f"{name} is not a tensor of integers",
            got=_kind(lengths),
            expected="torch.int32",
            fix=f"{name} = torch.tensor({name}, dtype=torch.int32, device=q.device)",
        )
    expected = (max(lengths.numel(), 1) if count is None else count,)
    if lengths.shape != expected or lengths.device != x.device:
        raise InvalidArgumentError(
            f"{name} does not describe the batch",
            got=f"shape {tuple(lengths.shape)} on {lengths.device}",
            expected=f"shape {expected} on {x.device}",
            fix="pass what flash_attn_varlen_func takes",
        )


def _check_groups(heads: int, heads_k: int, block_rows: int | None) -> None:
    if heads_k < 1 or heads % heads_k:
        raise InvalidArgumentError(
            "K/V heads do not divide the heads",
            got=f"{heads} heads, heads_k {heads_k}",
            expected="a positive divisor of the heads",
            fix="pass how many heads k and v have",
        )
    if block_rows is None:
        return
    _check_integer("block_rows", block_rows)
    if block_rows < 1:
        raise InvalidArgumentError(
            "block_rows is not positive",
            got=block_rows,
            expected="≥ 1",
            fix="pass None for one scale for each head",
        )


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTypeError(
            f"{name} is not an integer",
            got=repr(value),
            expected="int",
            fix=f"{name}=int(…)",
        )


def _check(name: str, x: object, outer: tuple[str, ...]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InvalidTypeError(
            f"{name} is not a floating-point tensor",
            got=_kind(x),
            expected="a floating-point torch.Tensor",
            fix=f"{name} = torch.as_tensor({name}).float()",
        )
    if x.ndim != len(outer) + 2:
        raise InvalidArgumentError(
            f"{name} does not have {'four' if len(outer) == 2 else 'three'} dimensions",
            got=tuple(x.shape),
            expected=f"({', '.join(outer)}, heads, head dim)",
            fix="every dimension is there, of size 1 where there is one of its kind",
        )


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
