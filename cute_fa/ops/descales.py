"""The scales of FP8 inputs: what the numbers in q, k and v have to be multiplied by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cute_fa.errors import InvalidArgumentError, InvalidTypeError
from cute_fa.quant import BLOCK_ROWS

if TYPE_CHECKING:
    from cute_fa.varlen import Packing


More = tuple[Tensor | None, ...]


class Descales(NamedTuple):
    """``q_descale``, ``k_descale`` and ``v_descale`` of a call; None stands for 1."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def by_block(self) -> bool:
        """Whether any of them has a scale for every block of rows."""
        return any(x is not None and x.ndim == 3 for x in self)

    @property
    def more(self) -> More:
        """Their part of what ``plans.key_of`` takes: nothing if none is given."""
        return tuple(self) if any(x is not None for x in self) else ()

    def given(self) -> Iterator[tuple[str, Tensor]]:
        """Those that are tensors, by the name of their argument."""
        # Spelled out: torch.compile of torch 2.6 does not trace a named tuple's methods.
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if x is not None:
                yield f"{name}_descale", x


NO_DESCALES = Descales()


_one_on: dict[torch.device, Tensor] = {}


def ones(batch: int, heads_k: int, device: torch.device, *, is_kept: bool = False) -> Tensor:
    """What a kernel takes for descales that are left out: (B, Hk) in the memory of one.

    Args:
        is_kept: for later calls too, which may be in other streams: so that the 1 is there for all
            of them, it is waited for, once for each GPU. Not while a graph is captured, which only
            writes down that there will be a 1 when it is replayed.
    """
    one = _one_on.get(device)
    if one is None:
        one = torch.ones(1, 1, device=device)
        if is_kept and device.type == "cuda" and not is_capturing():
            torch.cuda.current_stream(device).synchronize()
            _one_on[device] = one
    return one.expand(batch, heads_k)


def is_capturing() -> bool:
    """Whether torch's current stream writes down what is launched, for a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def as_arguments(more: More, ones: Tensor) -> More:
    """``Descales.more`` as a kernel wants it; ``ones`` for what is left out."""
    if not more:
        return ones, ones, ones
    q, k, v = more
    if q is None or k is None or v is None:
        return tuple([ones if x is None else x for x in more])
    return more


def check_descales(
    descales: Descales, q: Tensor, k: Tensor, sizes: tuple[int, int, int] | None = None
) -> None:
    """Types, dtypes, devices and shapes; looks at no memory.

    Args:
        sizes: B and the longest lengths of packed q and k; None for dense tensors, which say.

    Raises:
        InvalidTypeError, InvalidArgumentError: inputs that have no descales, a tensor of another
            kind, or some with blocks and some without.
    """
    batch, rows_q, rows_k = (q.shape[0], q.shape[1], k.shape[1]) if sizes is None else sizes
    for name, x in descales.given():
        if q.dtype.itemsize != 1:
            raise InvalidArgumentError(
                f"{name} belongs to FP8 inputs",
                got=f"{name} and q in {str(q.dtype).removeprefix('torch.')}",
                expected="q, k and v in float8_e4m3fn",
                fix="cute_fa.quant makes both",
            )
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            raise InvalidTypeError(
                f"{name} is not an fp32 tensor",
                got=str(x.dtype) if isinstance(x, Tensor) else type(x).__name__,
                expected="torch.float32",
                fix=f"{name} = {name}.float()"
                if isinstance(x, Tensor)
                else f"{name} = torch.full((B, Hk), scale, device=q.device)",
            )
        if x.device != q.device:
            raise InvalidArgumentError(
                f"{name} is on another device than q",
                got=str(x.device),
                expected=str(q.device),
                fix=f"{name} = {name}.to(q.device)",
            )
        rows = rows_q if name == "q_descale" else rows_k
        per_head = (batch, k.shape[-2])
        by_block = (*per_head, -(-rows // BLOCK_ROWS))
        if tuple(x.shape) != (by_block if descales.by_block else per_head):
            raise InvalidArgumentError(
                f"{name} has the wrong shape",
                got=tuple(x.shape),
                expected=f"(B, Hk) = {per_head}, or all three (B, Hk, blocks of {BLOCK_ROWS} rows"
                f"{'' if sizes is None else ' of the longest sequence'}), {by_block} for {name}",
                fix=f"{name}.expand{per_head} of one scale for all, or cute_fa.quant's descales",
            )
    if descales.by_block and None in descales:
        raise InvalidArgumentError(
            "some descales have blocks and some are missing",
            got=", ".join(name for name, _ in descales.given()),
            expected=f"q_descale, k_descale and v_descale, each with blocks of {BLOCK_ROWS} rows",
            fix="pass ones where nothing was scaled",
        )


def check_values(descales: Descales, packing: Packing | None = None) -> None:
    """That all are positive and finite; for tensors on the CPU, where looking costs no wait.

    Args:
        packing: of packed sequences, whose last blocks may hold no rows: what stands there is not
            looked at.
    """
    for name, x in descales.given():
        if packing is not None and descales.by_block:
            rows = packing.rows_q if name == "q_descale" else packing.rows_k
            counts = torch.tensor([len(each) for each in rows])
            holds_rows = BLOCK_ROWS * torch.arange(x.shape[2]) < counts[:, None]  # (B, blocks)
            x = x.transpose(1, 2)[holds_rows]
        if not bool((x > 0).logical_and(x.isfinite()).all()):
            raise InvalidArgumentError(
                f"{name} holds numbers that scale nothing",
                got=f"from {float(x.min())} to {float(x.max())}",
                expected="positive, finite numbers",
                fix="a block of zeros has any positive scale: clamp_min(1e-12) before the division",
            )
