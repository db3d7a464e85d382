"""Every argument of an attention call, checked before anything is compiled or allocated.

A check that fails raises an error of ``cute_fa.errors`` that says what, got, expected and how to
mend it. Nothing is repaired silently: a copy, a cast or another kernel is the caller's to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cute_fa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops import sources
from cute_fa.ops.descales import NO_DESCALES, Descales, check_descales, check_values
from cute_fa.problem import (
    DTYPE_BYTES,
    KERNEL_DTYPES,
    AttentionProblem,
    KernelVariant,
    check_flag,
    normalise_window,
)
from cute_fa.target import Target, get_target, target_of_capability
from cute_fa.varlen import VarlenProblem

if TYPE_CHECKING:
    from cute_fa.sim.device import Device

GENERATIONS = ("auto", "fa1", "fa2", "fa3", "fa4")
BACKENDS = ("auto", "cuda", "sim")
# What is simulated if nobody says (``default_arch``).
DEFAULT_ARCH = {
    "auto": "sm_80",
    "fa1": "sm_80",
    "fa2": "sm_80",
    "fa3": "sm_90a",
    "fa4": "sm_100a",
}
FP8_ARCH = "sm_90a"
ALIGNMENT_BYTES = 16  # of one global-memory access of a thread
# Heads and batches are grid dimensions y and z (CUDA C++ Programming Guide, compute capabilities).
MAX_GRID_YZ = 65535
DTYPES = {getattr(torch, name): name for name in KERNEL_DTYPES}

CAUSAL_HINT = "the causal mask is aligned bottom-right: the last row sees every column"


@dataclass(frozen=True)
class Options:
    """The keyword arguments of ``flash_attn_func`` that decide what is computed, and where.

    ``kernels`` is the name of a source of kernels (``sources.source``), None for the compiler.
    """

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] = (-1, -1)
    softcap: float = 0.0
    generation: str = "auto"
    backend: str = "auto"
    arch: str | Target | None = None
    kernels: str | None = None
    pack_gqa: bool | None = None


@dataclass(frozen=True)
class Call:
    """A call that was found to be in order.

    Attributes:
        problem: what to compute; with one head where the tensors have none.
        generation: the rung that serves it, never "auto".
        target: the architecture to run on.
        backend: "cuda" or "sim".
        has_work: False if there is no output element, or no column to attend to.
        kernels: of the options.
        packed_group: query heads of a K/V head that share row tiles.
        has_block_descales: whether FP8 inputs have a scale for every block of rows.
    """

    problem: AttentionProblem | VarlenProblem
    generation: str
    target: Target
    backend: str
    has_work: bool
    kernels: str | None = None
    packed_group: int = 1
    has_block_descales: bool = False

    @property
    def variant(self) -> KernelVariant:
        """What the kernel has to be compiled for."""
        variant = self.problem.variant
        if self.packed_group > 1:
            variant = replace(variant, packed_group=self.packed_group)
        if self.has_block_descales:
            variant = replace(variant, has_block_descales=True)
        return variant

    @property
    def padded(self) -> AttentionProblem:
        """The problem; of packed sequences, with each as long as the longest."""
        problem = self.problem
        return problem.padded if isinstance(problem, VarlenProblem) else problem


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    descales: Descales = NO_DESCALES,
    device: Device | None = None,
) -> Call:
    """Check a forward call whose tensors have memory.

    Args:
        device: the simulated device that was entered, if any.

    Raises:
        InvalidTypeError: not a tensor, a wrong dtype, a flag that is no bool, …
        InvalidArgumentError: shapes, strides, devices, numbers or names that no kernel takes.
        UnsupportedError: a valid call that the generation, architecture or build does not serve.
    """
    check_tensors(q, k, v)
    check_descales(descales, q, k)
    check_names(options)
    problem = make_problem(q, k, v, options)
    has_work = q.numel() > 0 and problem.seqlen_k > 0
    check_no_gradient(q, k, v, descales)
    backend, target = choose_backend_and_target(q, options, device)
    if backend == "sim":
        check_values(descales)
    if has_work:
        check_launch(q, k, v, problem)
    return make_call(problem, options, descales, backend, target, has_work)


def make_call(
    problem: AttentionProblem | VarlenProblem,
    options: Options,
    descales: Descales,
    backend: str,
    target: Target,
    has_work: bool,
) -> Call:
    """The call, with the kernel that serves it."""
    generation = choose_generation(problem, target, options)
    group = choose_packed_group(problem, target, generation, options)
    by_block = descales.by_block
    return Call(problem, generation, target, backend, has_work, options.kernels, group, by_block)


def choose_backend_and_target(
    q: Tensor, options: Options, device: Device | None
) -> tuple[str, Target]:
    """Where a call on tensors that are in order runs."""
    backend = choose_backend(q, options, device)
    return backend, choose_target(q, options, backend, device)


def check_launch(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> None:
    """What only a call that computes something needs: usable memory, and a grid that is not too
    large."""
    check_memory(q, k, v)
    for name, count in (("batch", problem.batch), ("heads_q", problem.heads_q)):
        if count > MAX_GRID_YZ:
            raise UnsupportedError(
                f"{name} is larger than a launch grid",
                got=count,
                expected=f"≤ {MAX_GRID_YZ}",
                fix="split the call along this dimension",
            )


# (shapes of q, k and v, what makes them of tensors with the heads first)
_DENSE_SHAPES = (
    "q (B, Sq, Hq, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv)",
    "tensors in (B, H, S, D) order need .transpose(1, 2)",
)
_PACKED_SHAPES = (
    "q (Tq, Hq, D), k (Tk, Hk, D), v (Tk, Hk, Dv)",
    "tensors in (H, T, D) order need .transpose(0, 1)",
)


def check_tensors(q: Any, k: Any, v: Any, *, is_packed: bool = False) -> None:
    """Types, devices, dtypes, ranks and shapes of q (B, Sq, Hq, D), k (B, Sk, Hk, D) and
    v (B, Sk, Hk, Dv), or packed ones without B; looks at no memory, so that fake and meta tensors
    pass."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        _check_attention_dtype(name, x)
        _check_rank(name, x, is_packed)
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise InvalidArgumentError(
                f"{name} is on another device than q",
                got=f"q on {q.device}, {name} on {x.device}",
                expected="one device",
                fix=f"{name} = {name}.to(q.device)",
            )
        if x.dtype != q.dtype:
            raise InvalidTypeError(
                f"{name} has another dtype than q",
                got=f"q {short(q.dtype)}, {name} {short(x.dtype)}",
                expected="one dtype",
                fix=f"{name} = {name}.to(q.dtype)",
            )
    for name, x, y, dim in _equal_dims(q, k, v, is_packed):
        if x.shape[dim] != y.shape[dim]:
            expected, fix = _PACKED_SHAPES if is_packed else _DENSE_SHAPES
            raise InvalidArgumentError(
                f"{name} differ",
                got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
                expected=expected,
                fix=fix,
            )


def _equal_dims(
    q: Tensor, k: Tensor, v: Tensor, is_packed: bool
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """(what, a tensor, another, the dimension that they share)."""
    if not is_packed:
        yield "batch sizes", q, k, 0
        yield "batch sizes", q, v, 0
    yield "key and value lengths", k, v, -3
    yield "key and value heads", k, v, -2
    yield "query and key head dims", q, k, -1


def check_tensor(name: str, x: Any, fix: str | None = None) -> None:
    """That ``x`` is a plain tensor whose memory holds its values.

    Args:
        fix: what makes one of something else.
    """
    if not isinstance(x, Tensor):
        raise InvalidTypeError(
            f"{name} is not a tensor",
            got=type(x).__name__,
            expected="a torch.Tensor",
            fix=fix or f"{name} = torch.as_tensor({name}).to(torch.bfloat16)",
        )
    if x.is_nested or x.layout != torch.strided or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
        raise InvalidTypeError(
            f"{name} is not a dense tensor",
            got=kind,
            expected="torch.strided, not quantized",
            fix=f"{name}.dequantize()" if x.is_quantized else f"{name}.to_dense() or a padded copy",
        )
    if x.is_neg():
        raise InvalidArgumentError(
            f"{name} is a lazily negated view, whose memory holds the opposite signs",
            got="a tensor with is_neg() set",
            expected="values as they are in memory",
            fix=f"{name}.resolve_neg()",
        )


def _check_attention_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise InvalidTypeError(
            f"{name} has a dtype that no kernel takes",
            got=short(x.dtype),
            expected=" or ".join(KERNEL_DTYPES),
            fix=f"{_convert(name, x)}, or cute_fa.reference.dense.attention for this dtype",
        )


def _convert(name: str, x: Tensor) -> str:
    """What makes ``x`` one of 16 bits; under autocast, which does not know our functions, too."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return (
            f"{name}.to(torch.get_autocast_dtype({device!r})), because torch.autocast converts "
            "inputs of PyTorch's own functions only"
        )
    return f"{name}.to(torch.bfloat16)"


_EVERY_DIMENSION = "every dimension is there, of size 1 where there is one of its kind"


def _check_rank(name: str, x: Tensor, is_packed: bool) -> None:
    if is_packed and x.ndim != 3:
        raise InvalidArgumentError(
            f"{name} does not have three dimensions",
            got=f"{x.ndim}: {tuple(x.shape)}",
            expected="(rows of all sequences, heads, head dim)",
            fix="flash_attn_func takes (B, S, H, D) tensors" if x.ndim == 4 else _EVERY_DIMENSION,
        )
    if not is_packed and x.ndim != 4:
        hint = {
            3: "packed (T, H, D) tensors are what flash_attn_varlen_func takes; a single sequence "
            f"gets its batch dimension by {name}[None]",
            5: "a packed q, k, v tensor is passed as three views of it",
        }
        raise InvalidArgumentError(
            f"{name} does not have four dimensions",
            got=f"{x.ndim}: {tuple(x.shape)}",
            expected="(batch, sequence, heads, head dim)",
            fix=hint.get(x.ndim, _EVERY_DIMENSION),
        )


def check_names(options: Options) -> None:
    """Flags, and names of generations and backends."""
    check_flag("causal", options.causal, CAUSAL_HINT)
    if options.pack_gqa is not None:
        check_flag("pack_gqa", options.pack_gqa, "None lets the library decide")
    for name, value, known, auto in (
        ("generation", options.generation, GENERATIONS, "the newest that serves the problem"),
        ("backend", options.backend, BACKENDS, "where the tensors are"),
    ):
        if value not in known:
            raise InvalidArgumentError(
                f"unknown {name}",
                got=repr(value),
                expected=" | ".join(known),
                fix=f"{name}='auto' takes {auto}",
            )


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sizes: tuple[int, int, int] | None = None,
) -> AttentionProblem:
    """The problem that the tensors and options state.

    A right bound of 0 is what causal means, so that both share a kernel.

    Args:
        sizes: B, Sq, Sk if the tensors do not say.
    """
    batch, seqlen_q, seqlen_k = (q.shape[0], q.shape[1], k.shape[1]) if sizes is None else sizes
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    left, right = normalise_window(options.causal, options.window_size)
    if heads_q == 0 and heads_k == 0:
        # No heads divide no heads: check the rest as if there was one.
        heads_q = heads_k = 1
    return AttentionProblem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_q or heads_k,
        heads_k=heads_k,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        dtype=DTYPES[q.dtype],
        causal=right == 0,
        window_left=left,
        window_right=None if right == 0 else right,
        softcap=options.softcap,
        softmax_scale=options.softmax_scale,
    )


def check_no_gradient(q: Tensor, k: Tensor, v: Tensor, descales: Descales = NO_DESCALES) -> None:
    """That nobody expects a derivative: there is none yet, and a result without one would be used
    as a constant."""
    inputs = (("q", q), ("k", k), ("v", v), *descales.given())
    if forward_ad._current_level >= 0:
        for name, x in inputs:
            if forward_ad.unpack_dual(x).tangent is not None:
                raise UnsupportedError(
                    "there is no forward-mode derivative in this version",
                    got=f"{name} has a tangent",
                    expected="inputs that have none",
                    fix=f"pass forward_ad.unpack_dual({name}).primal, or use "
                    "cute_fa.reference.dense.attention",
                )
    if not torch.is_grad_enabled():
        return
    for name, x in inputs:
        if x.requires_grad:
            raise UnsupportedError(
                "there is no backward kernel in this version",
                got=f"{name} requires a gradient",
                expected="inputs that require none",
                fix=f"call under torch.no_grad(), pass {name}.detach(), or use "
                "cute_fa.reference.dense.DenseAttention",
            )


def choose_backend(q: Tensor, options: Options, device: Device | None) -> str:
    """By where the tensors are, "cuda" or "sim"; what was asked for must agree."""
    place = q.device.type
    by_place = {"cuda": "cuda", "cpu": "sim"}.get(place)
    if by_place is None:
        raise InvalidArgumentError(
            "tensors are on a device that nothing here runs on",
            got=str(q.device),
            expected="cuda, or cpu for the simulator",
            fix="q, k, v = (x.cuda() for x in (q, k, v))",
        )
    if options.backend not in ("auto", by_place):
        fix = "q, k, v = (x.cuda() for x in (q, k, v))"
        if options.backend == "sim":
            fix = "q, k, v = (x.cpu() for x in (q, k, v))"
        raise InvalidArgumentError(
            f"backend {options.backend!r} does not run {place} tensors",
            got=f"tensors on {q.device}",
            expected=f"backend {by_place!r} or 'auto' for them",
            fix=fix,
        )
    if by_place == "cuda" and device is not None:
        raise InvalidArgumentError(
            "a GPU's tensors cannot run on a simulated device",
            got=f"tensors on {q.device} inside a sim.Device({device.target.arch!r}) block",
            expected="CPU tensors",
            fix="leave the block, or q, k, v = (x.cpu() for x in (q, k, v))",
        )
    return by_place


def choose_target(q: Tensor, options: Options, backend: str, device: Device | None) -> Target:
    """The GPU's own architecture, the entered device's, the one asked for, or the default."""
    asked = None if options.arch is None else get_target(options.arch)
    if backend == "cuda":
        own = target_of_capability(torch.cuda.get_device_capability(q.device))
        if asked is not None and asked.compute_capability != own.compute_capability:
            raise InvalidArgumentError(
                "this GPU does not run that architecture",
                got=f"arch {asked.arch} on a GPU of capability {own.capability_text}",
                expected=f"arch=None or {own.arch}",
                fix="move the tensors to the CPU to simulate another architecture",
            )
        return own if asked is None else asked
    if device is not None:
        if asked is not None and asked != device.target:
            raise InvalidArgumentError(
                "arch is not the simulated device's",
                got=f"arch {asked.arch} inside sim.Device({device.target.arch!r})",
                expected=f"arch=None or {device.target.arch}",
                fix=f"enter sim.Device({asked.arch!r}) instead",
            )
        return device.target
    if asked is not None:
        return asked
    return get_target(default_arch(options.generation, DTYPES[q.dtype]))


def default_arch(generation: str, dtype: str) -> str:
    """What is simulated if nobody names an architecture: the first that the generation was written
    for; of "auto", the first whose kernels take the dtype."""
    if generation == "auto" and DTYPE_BYTES[dtype] == 1:
        return FP8_ARCH
    return DEFAULT_ARCH[generation]


def choose_generation(
    problem: AttentionProblem | VarlenProblem, target: Target, options: Options
) -> str:
    """The generation that will run.

    Raises:
        UnsupportedError: nothing serves the problem there, or not the generation asked for.
    """
    return sources.generation(problem, target, options.generation, options.kernels)


def choose_packed_group(
    problem: AttentionProblem | VarlenProblem, target: Target, generation: str, options: Options
) -> int:
    """How many query heads of a K/V head share row tiles: all of them, or 1.

    Raises:
        UnsupportedError: ``pack_gqa`` is True, and no kernel packs this many.
    """
    padded = problem.padded if isinstance(problem, VarlenProblem) else problem
    heads = padded.heads_q // padded.heads_k
    if heads == 1 or options.pack_gqa is False:
        return 1
    if options.pack_gqa is None:
        return sources.packed_group(problem, target, generation, options.kernels)
    variant = replace(problem.variant, packed_group=heads)
    sources.source(options.kernels).check_variant(generation, target, variant)
    return heads


def check_memory(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Alignment and strides that 16-byte accesses along the last dimension need."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        elements = ALIGNMENT_BYTES // x.element_size()
        if x.stride(-1) != 1:
            raise InvalidArgumentError(
                f"the last dimension of {name} is not contiguous",
                got=f"strides {x.stride()}",
                expected="a stride of 1 in the last dimension",
                fix=f"{name} = {name}.contiguous()",
            )
        if x.data_ptr() % ALIGNMENT_BYTES:
            raise InvalidArgumentError(
                f"{name} does not start at a {ALIGNMENT_BYTES}-byte border",
                got=f"address {x.data_ptr():#x}, storage offset {x.storage_offset()}",
                expected=f"a multiple of {ALIGNMENT_BYTES} bytes",
                fix=f"{name} = {name}.clone(memory_format=torch.contiguous_format); contiguous() "
                "keeps a tensor that is already dense where it is",
            )
        for dim in range(x.ndim - 1):
            # A dimension of one element is never stepped along: launch gives it a legal stride.
            if x.shape[dim] > 1 and x.stride(dim) % elements:
                raise InvalidArgumentError(
                    f"rows of {name} are not {ALIGNMENT_BYTES}-byte aligned",
                    got=f"strides {x.stride()}",
                    expected=f"multiples of {elements} elements in all but the last dimension",
                    fix=f"{name} = {name}.contiguous()",
                )


def short(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")
