"""What a call on packed sequences needs beyond a dense one: the lengths, checked.

Shapes, dtypes and places are checked for every tensor. The numbers inside the length tensors are
checked where they can be read without waiting for a GPU, which is on CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, int32

from cute_fa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops import checks
from cute_fa.ops.checks import Call, Options
from cute_fa.ops.descales import NO_DESCALES, Descales, check_descales, check_values
from cute_fa.problem import check_integer
from cute_fa.varlen import Packing, VarlenProblem

if TYPE_CHECKING:
    from cute_fa.sim.device import Device

MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Lengths:
    """The arguments of ``flash_attn_varlen_func`` that say where sequences lie.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32, contiguous, on q's device.
        max_seqlen_q, max_seqlen_k: no sequence has more rows that count.
        seqused_q, seqused_k: (B) int32, contiguous, on q's device; or None.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Their part of what ``plans.key_of`` takes."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B and the longest lengths: the sizes of the problem if every sequence were as long."""
        return self.batch, self.max_seqlen_q, self.max_seqlen_k


def check_varlen_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: Options,
    *,
    descales: Descales = NO_DESCALES,
    device: Device | None = None,
) -> Call:
    """Check a forward call on packed tensors that have memory.

    Args:
        device: the simulated device that was entered, if any.

    Raises:
        InvalidTypeError, InvalidArgumentError, UnsupportedError: as ``checks.check_call``; also for
            length tensors of another dtype, shape or device, and on CPU tensors for lengths that
            describe no sequences of these tensors.
    """
    checks.check_tensors(q, k, v, is_packed=True)
    checks.check_names(options)
    check_lengths(q, k, lengths)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        _check_longest(name, getattr(lengths, name))
    sizes = lengths.sizes
    check_descales(descales, q, k, sizes)
    padded = checks.make_problem(q, k, v, options, sizes)
    checks.check_no_gradient(q, k, v, descales)
    backend, target = checks.choose_backend_and_target(q, options, device)
    packing = _packing(lengths) if backend == "sim" else None
    problem = VarlenProblem(
        padded,
        q.shape[0],
        k.shape[0],
        packing,
        lengths.seqused_q is not None,
        lengths.seqused_k is not None,
    )
    if packing is not None:
        check_values(descales, packing)
    has_work = q.numel() > 0 and k.shape[0] > 0 and min(sizes) > 0
    if has_work:
        checks.check_launch(q, k, v, padded)
    return checks.make_call(problem, options, descales, backend, target, has_work)


def check_lengths(q: Tensor, k: Tensor, lengths: Lengths) -> None:
    """Types, dtypes, devices and shapes of the length tensors; looks at no memory."""
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        x = getattr(lengths, name)
        if x is not None or name.startswith("cu_seqlens"):
            _check_length_tensor(name, x, q)
    borders_q, borders_k = lengths.cu_seqlens_q.shape[0], lengths.cu_seqlens_k.shape[0]
    if borders_q == 0 or borders_q != borders_k:
        raise InvalidArgumentError(
            "cu_seqlens_q and cu_seqlens_k do not describe one batch",
            got=f"{borders_q} and {borders_k} numbers",
            expected="batch + 1 of each",
            fix="a sequence without queries or keys has two equal borders",
        )
    for name in ("seqused_q", "seqused_k"):
        used = getattr(lengths, name)
        if used is not None and used.shape[0] != borders_q - 1:
            raise InvalidArgumentError(
                f"{name} is of another batch than cu_seqlens_q",
                got=f"{used.shape[0]} lengths",
                expected=f"{borders_q - 1}",
                fix="give one length for each sequence, its whole length where all rows count",
            )
    for name, x in (("q", q), ("k", k)):
        if x.shape[0] > MAX_INT32:
            raise UnsupportedError(
                f"{name} has more rows than int32 lengths can number",
                got=x.shape[0],
                expected=f"≤ {MAX_INT32}",
                fix="split the batch into two calls",
            )


def _check_length_tensor(name: str, x: Any, q: Tensor) -> None:
    fix = f"{name} = torch.tensor({name}, dtype=torch.int32, device=q.device)"
    if x is None:
        fix = "give where the sequences end; flash_attn_func takes dense (B, S, H, D) tensors"
    checks.check_tensor(name, x, fix)
    if x.dtype != int32:
        raise InvalidTypeError(
            f"{name} is not of dtype int32",
            got=checks.short(x.dtype),
            expected="int32",
            fix=f"{name} = {name}.to(torch.int32)",
        )
    if x.device != q.device:
        raise InvalidArgumentError(
            f"{name} is on another device than q",
            got=f"q on {q.device}, {name} on {x.device}",
            expected="one device",
            fix=f"{name} = {name}.to(q.device)",
        )
    if x.ndim != 1:
        raise InvalidArgumentError(
            f"{name} is not a row of numbers",
            got=f"shape {tuple(x.shape)}",
            expected="(batch + 1,)" if name.startswith("cu_seqlens") else "(batch,)",
            fix=f"{name} = {name}.flatten()",
        )
    if not x.is_contiguous():
        raise InvalidArgumentError(
            f"{name} is not contiguous",
            got=f"stride {x.stride(0)}",
            expected="a stride of 1",
            fix=f"{name} = {name}.contiguous()",
        )


def _check_longest(name: str, value: Any) -> None:
    fix = None
    if isinstance(value, Tensor):
        fix = f"pass an int: reading it from {name} would wait for the GPU on every call"
        raise InvalidTypeError(f"{name} is a tensor", got=value, expected="a Python int", fix=fix)
    if not 0 <= check_integer(name, value) <= MAX_INT32:
        raise InvalidArgumentError(
            f"{name} is no length",
            got=value,
            expected=f"0 to {MAX_INT32}",
            fix="pass how many rows the longest sequence has; a larger number does no harm",
        )


def _packing(lengths: Lengths) -> Packing:
    """The numbers themselves; only ever asked of CPU tensors."""

    def numbers(x: Tensor) -> tuple[int, ...]:
        return tuple(x.tolist())

    used_q, used_k = lengths.seqused_q, lengths.seqused_k
    return Packing(
        numbers(lengths.cu_seqlens_q),
        numbers(lengths.cu_seqlens_k),
        None if used_q is None else numbers(used_q),
        None if used_k is None else numbers(used_k),
    )
