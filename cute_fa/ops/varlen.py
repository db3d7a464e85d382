"""``flash_attn_varlen_func``, and the operator ``cute_fa::varlen_fwd`` that stands for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from cute_fa.ops import checks, launch, plans, sources
from cute_fa.ops.checks import Options
from cute_fa.ops.descales import Descales, check_descales
from cute_fa.ops.functional import (
    OPTIONS_SCHEMA,
    RESULTS_SCHEMA,
    Window,
    is_for_dispatcher,
    operator_options,
    options_and_descales,
    refuse_gradients,
)
from cute_fa.ops.varlen_checks import Lengths, check_lengths, check_varlen_call
from cute_fa.target import Target

if TYPE_CHECKING:
    from cute_fa.ops.bundle import LoadedBundle


def flash_attn_varlen_func(
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
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    generation: str = "auto",
    backend: str = "auto",
    arch: str | Target | None = None,
    kernels: LoadedBundle | None = None,
    pack_gqa: bool | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of B sequences of different lengths, packed one behind the other.

    Sequence b has the rows ``cu_seqlens_q[b]`` … ``cu_seqlens_q[b + 1] - 1`` of q and of the
    results, and likewise of k and v. It may have no queries, no keys, or neither. Masks are those
    of the sequence by itself: its last query that counts stands at its last key that counts.

    >>> import torch, cute_fa
    >>> q, k, v = (torch.randn(100, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    >>> borders = torch.tensor([0, 30, 30, 100], dtype=torch.int32)  # 30, 0 and 70 rows
    >>> out = cute_fa.flash_attn_varlen_func(
    ...     q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=70, max_seqlen_k=70
    ... )
    >>> out.shape
    torch.Size([100, 2, 64])

    On a GPU nothing waits for it: the lengths stay there, and what is in them is not checked. They
    must be as described below. Where they are not, results are wrong, and rows outside the tensors
    may be read or written; but ``seqused_q[b]`` and ``seqused_k[b]`` reach no further than their
    sequence. On CPU tensors every length is checked.

    Args:
        q: (Tq, Hq, D), float16 or bfloat16; float8_e4m3fn with FA3 and FA4. Tq rows of all
            sequences together.
        k: (Tk, Hk, D). Hk divides Hq: query head h attends to K/V head h // (Hq // Hk).
        v: (Tk, Hk, Dv). D and Dv are multiples of 8, of FP8 inputs of 16, up to 256. The last
            stride of q, k, v is 1 and the others are multiples of 16 bytes (0 too); no tensor is
            copied.
        cu_seqlens_q: (B + 1,) int32, contiguous, on q's device: 0, then where each sequence ends in
            q; it never falls, and ends with Tq.
        cu_seqlens_k: the same for k and v; rows of theirs behind its end are never read.
        max_seqlen_q: no sequence has more queries that count. Larger values cost CTAs that find
            nothing to do; with a smaller one, queries would be left out.
        max_seqlen_k: no sequence has more keys that count.
        seqused_q: (B,) int32, contiguous, on q's device: only the first ``seqused_q[b]`` rows of
            sequence b count. The rows behind them give 0 and -inf. None: all rows count.
        seqused_k: the same for k and v; rows that do not count are not looked at.
        softmax_scale, causal, window_size, softcap, deterministic, return_lse, generation, backend,
            arch, kernels, pack_gqa: as for ``flash_attn_func``.
        q_descale, k_descale, v_descale: of FP8 inputs, what their numbers are to be multiplied by:
            fp32 (B, Hk), one for each sequence and K/V head; or all three (B, Hk, blocks), one for
            every 128 rows of each sequence, counted from its own first: row i of sequence b has
            ``[b, :, i // 128]``, blocks are ⌈max_seqlen / 128⌉, and those behind a sequence's end
            are not looked at. None for 1. They are positive. ``cute_fa.quant.quantize_varlen_qkv``
            makes inputs and descales.

    Returns:
        out (Tq, Hq, Dv) in q's dtype, bfloat16 for FP8; with ``return_lse`` also lse (Hq, Tq),
        fp32, natural logarithm. A row that sees no key gives 0 and -inf. No gradient flows to the
        inputs.

    Raises:
        InvalidTypeError, InvalidArgumentError: an argument that no kernel could take.
        UnsupportedError: the generation or architecture does not serve this, or an input requires
            a gradient while gradients are enabled.
        CompileError, MissingToolError: the kernel could not be built here.
        LaunchError: CUDA refused the launch.
        cute_fa.sim.HazardError: the simulator found a race, an access out of bounds, ….
    """
    source = None if kernels is None else sources.name_of(kernels)
    names = (generation, backend, arch, source)
    numbers = (
        *(softmax_scale, causal, window_size, softcap, pack_gqa, deterministic, return_lse),
        *(max_seqlen_q, max_seqlen_k),
    )
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    descales = (q_descale, k_descale, v_descale)
    more = tensors if q_descale is k_descale is v_descale is None else (*tensors, *descales)
    key = None
    if not is_dynamo_compiling():  # tensors say whether anything else traces
        plan, key = plans.look_up(q, k, v, more, numbers, names)
        if plan is not None:
            out, lse = plan.run(q, k, v, more)
            return (out, lse) if return_lse else out
    options = Options(softmax_scale, causal, window_size, softcap, *names, pack_gqa)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    checks.check_flag("deterministic", deterministic)
    checks.check_flag("return_lse", return_lse)
    if is_for_dispatcher(q, k, v, *tensors, *descales):
        checks.check_names(options)
        checks.check_no_gradient(q, k, v, Descales(*descales))
        out, lse = torch.ops.cute_fa.varlen_fwd(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            *(seqused_q, seqused_k, *operator_options(options), *descales),
        )
    else:
        out, lse = _run(q, k, v, lengths, options, Descales(*descales), key)
    return (out, lse) if return_lse else out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: Options,
    descales: Descales,
    key: Any = None,
) -> tuple[Tensor, Tensor]:
    """Check and run a call; the next one on a GPU that has its key goes without the checks."""
    # A simulated device tells Python that CPU tensors are CUDA tensors; here the truth counts.
    with torch._C.DisableTorchFunction():
        device = launch.entered_device()
        call = check_varlen_call(q, k, v, lengths, options, descales=descales, device=device)
        more = (*lengths.tensors, *descales.more)
        return launch.forward(q, k, v, call, more, device=device, key=key)


# --- the operator

torch.library.define(
    "cute_fa::varlen_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, "
    f"{OPTIONS_SCHEMA}) -> {RESULTS_SCHEMA}",
)


@torch.library.impl("cute_fa::varlen_fwd", ("CPU", "CUDA"))
def _varlen_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, Lengths(*rest[:6]), *options_and_descales(*rest[6:]))


@torch.library.register_fake("cute_fa::varlen_fwd")
def _varlen_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    checks.check_tensors(q, k, v, is_packed=True)
    lengths = Lengths(*rest[:6])
    options, descales = options_and_descales(*rest[6:])
    check_lengths(q, k, lengths)
    check_descales(descales, q, k, lengths.sizes)
    checks.check_names(options)
    return launch.empty_outputs(q, v)


refuse_gradients("cute_fa::varlen_fwd", "cute_fa.reference.dense.DenseAttention on each sequence")
