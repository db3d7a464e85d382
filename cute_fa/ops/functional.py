"""``flash_attn_func``, and the operator ``cute_fa::fwd`` that stands for it in torch's graphs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from cute_fa.errors import UnsupportedError
from cute_fa.ops import checks, launch, plans, sources
from cute_fa.ops.checks import Options
from cute_fa.ops.descales import Descales, check_descales
from cute_fa.problem import normalise_window
from cute_fa.target import Target

if TYPE_CHECKING:
    from cute_fa.ops.bundle import LoadedBundle

Window = tuple[int | None, int | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
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
    """softmax(softmax_scale · q kᵀ) v by a compiled FlashAttention kernel.

    CUDA tensors run on their GPU. CPU tensors run the very PTX that was compiled, in the simulator;
    inside ``with cute_fa.sim.Device(...) as dev`` they run on that device, which records the
    launches, and otherwise ``cute_fa.ops.last_launches()`` has them.

    >>> import torch, cute_fa
    >>> q, k, v = (torch.randn(1, 100, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    >>> out, lse = cute_fa.flash_attn_func(q, k, v, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 100]))

    Args:
        q: (B, Sq, Hq, D), float16 or bfloat16; float8_e4m3fn with FA3 and FA4.
        k: (B, Sk, Hk, D). Hk divides Hq: query head h attends to K/V head h // (Hq // Hk).
        v: (B, Sk, Hk, Dv). D and Dv are multiples of 8, of FP8 inputs of 16, up to 256. The last
            stride of q, k, v is 1 and the others are multiples of 16 bytes (0 too); no tensor is
            copied.
        softmax_scale: None for D**-0.5.
        causal: row i sees columns up to i + Sk - Sq (aligned bottom-right).
        window_size: inclusive (left, right) around that diagonal; -1 or None for unbounded.
        softcap: scores become softcap · tanh(score / softcap); 0.0 for none.
        deterministic: ask for bitwise the same result on every call. The forward always gives it,
            each output element being summed by one CTA in a fixed order, so both values run the
            same kernel.
        return_lse: return the row-wise log-sum-exp of the masked scores too.
        generation: "fa1" … "fa4", or "auto" for the newest that serves the problem.
        backend: "cuda", "sim", or "auto" for where the tensors are.
        arch: the architecture to simulate, e.g. "sm_90a"; None for the entered device's, or else
            the generation's first ("sm_80" for FA1 and FA2).
        kernels: a bundle (``cute_fa.load_bundle``) whose kernels run; None compiles them here.
        pack_gqa: whether the query heads of a K/V head share row tiles, which changes no result.
            None: where the kernel can and it makes fewer tiles, as when there are few queries.
        q_descale, k_descale, v_descale: of FP8 inputs, what their numbers are to be multiplied by:
            fp32 (B, Hk), or all three (B, Hk, blocks) with one for every 128 rows; None for 1. They
            are positive. ``cute_fa.quant.quantize_qkv`` makes inputs and descales.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, bfloat16 for FP8; with ``return_lse`` also lse
        (B, Hq, Sq), fp32, natural logarithm. A row that sees no column gives 0 and -inf. No
        gradient flows to the inputs.

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
    numbers = (softmax_scale, causal, window_size, softcap, pack_gqa, deterministic, return_lse)
    descales = (q_descale, k_descale, v_descale)
    more = () if q_descale is k_descale is v_descale is None else descales
    key = None
    if not is_dynamo_compiling():  # tensors say whether anything else traces
        plan, key = plans.look_up(q, k, v, more, numbers, names)
        if plan is not None:
            out, lse = plan.run(q, k, v, more)
            return (out, lse) if return_lse else out
    options = Options(softmax_scale, causal, window_size, softcap, *names, pack_gqa)
    checks.check_flag("deterministic", deterministic)
    checks.check_flag("return_lse", return_lse)
    if is_for_dispatcher(q, k, v, *descales):
        out, lse = _traced(q, k, v, options, Descales(*descales))
    else:
        out, lse = _run(q, k, v, options, Descales(*descales), key)
    return (out, lse) if return_lse else out


def _run(
    q: Tensor, k: Tensor, v: Tensor, options: Options, descales: Descales, key: Any = None
) -> tuple[Tensor, Tensor]:
    """Check and run a call; the next one on a GPU that has its key goes without the checks."""
    # A simulated device tells Python that CPU tensors are CUDA tensors; here the truth counts.
    with torch._C.DisableTorchFunction():
        device = launch.entered_device()
        call = checks.check_call(q, k, v, options, descales=descales, device=device)
        return launch.forward(q, k, v, call, descales.more, device=device, key=key)


def is_for_dispatcher(q: Any, k: Any, v: Any, *others: Any) -> bool:
    """Whether torch has to see the call as one operator: it is tracing, a mode looks at operators,
    or a tensor is something else than its memory. What is no tensor is left to the checks."""
    if is_compiling():
        return True
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        return False
    if not all(x is None or isinstance(x, Tensor) for x in others):
        return False
    if plans.dispatch_modes():  # also that of make_fx, which traces plain tensors
        return True
    return any(x is not None and _is_not_its_memory(x) for x in (q, k, v, *others))


def _is_not_its_memory(x: Tensor) -> bool:
    if x.is_meta:
        return True
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True  # fake tensors, DTensor and other subclasses that the dispatcher asks
    # functorch's wrappers (vmap, grad) look like plain tensors
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


# --- the operator


def _traced(
    q: Tensor, k: Tensor, v: Tensor, options: Options, descales: Descales
) -> tuple[Tensor, Tensor]:
    """The call as one node of a graph; shapes now, memory when the graph runs."""
    checks.check_names(options)
    checks.check_no_gradient(q, k, v, descales)
    return torch.ops.cute_fa.fwd(q, k, v, *operator_options(options), *descales)


def operator_options(options: Options) -> tuple[Any, ...]:
    """Options as the operators' schemas have them; ``options_of`` is the way back."""
    left, right = normalise_window(options.causal, options.window_size)
    arch = options.arch
    return (
        options.softmax_scale,
        options.causal,
        -1 if left is None else left,
        -1 if right is None else right,
        options.softcap,
        options.generation,
        options.backend,
        arch.arch if isinstance(arch, Target) else arch,
        options.kernels,
        options.pack_gqa,
    )


# Of both operators' schemas: options as ``options_of`` takes them, then descales.
OPTIONS_SCHEMA = (
    "float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, "
    "str generation, str backend, str? arch, str? kernels, bool? pack_gqa=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None"
)
RESULTS_SCHEMA = "(Tensor out, Tensor lse)"

torch.library.define(
    "cute_fa::fwd", f"(Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}) -> {RESULTS_SCHEMA}"
)


@torch.library.impl("cute_fa::fwd", ("CPU", "CUDA"))
def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    options, descales = options_and_descales(*rest)
    return _run(q, k, v, options, descales)


@torch.library.register_fake("cute_fa::fwd")
def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    options, descales = options_and_descales(*rest)
    checks.check_tensors(q, k, v)
    check_descales(descales, q, k)
    checks.check_names(options)
    return launch.empty_outputs(q, v)


def options_and_descales(*rest: Any) -> tuple[Options, Descales]:
    """What follows q, k and v among the operator's arguments."""
    count = len(inspect.signature(options_of).parameters)
    return options_of(*rest[:count]), Descales(*rest[count:])


def refuse_gradients(operator: str, instead: str) -> None:
    """Let a gradient through an operator be an error that says what to use instead."""

    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> None:
        raise UnsupportedError(
            "there is no backward kernel in this version",
            got=f"a gradient of {operator}",
            fix=f"use {instead}",
        )

    torch.library.register_autograd(operator, backward)


refuse_gradients("cute_fa::fwd", "cute_fa.reference.dense.DenseAttention")


def options_of(
    softmax_scale: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    generation: str,
    backend: str,
    arch: str | None,
    kernels: str | None,
    pack_gqa: bool | None = None,
) -> Options:
    """The options that ``operator_options`` wrote down."""
    window = (window_left, window_right)
    places = (generation, backend, arch, kernels)
    return Options(softmax_scale, causal, window, softcap, *places, pack_gqa)
