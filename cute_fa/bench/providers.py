"""Who is timed: this library by rung, PyTorch's own attention, and other libraries if installed.

Every provider gets the same tensors, (B, S, H, D) in one piece; those that want (B, H, S, D) get
views of them. What a provider cannot do it refuses in words, or by failing its first call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cute_fa.bench.inputs import BenchInputs
from cute_fa.bench.shapes import Shape
from cute_fa.errors import CuteFAError, InvalidArgumentError, LaunchError, UnsupportedError

Call = Callable[[], Tensor]
OURS = ("fa1", "fa2", "fa3", "fa4")


class Provider(Protocol):
    """Somebody's attention.

    The name is what tables call it, e.g. "sdpa-cudnn".
    """

    @property
    def name(self) -> str: ...

    @property
    def refusals(self) -> type[Exception]:
        """What its first call raises if it does not serve a shape."""

    def why_not(self, shape: Shape) -> str | None:
        """Why the shape is not served, or None."""

    def bind(self, shape: Shape, inputs: BenchInputs) -> Call:
        """A call that computes the attention; its result has q's rows and heads."""

    def session(self) -> AbstractContextManager[Any]:
        """What must be entered around the calls, outside of what is timed."""


class _NoSession:
    def session(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()


class _Foreign:
    """Other libraries say what they do not serve by raising, each in its own way."""

    @property
    def refusals(self) -> type[Exception]:
        return Exception


@dataclass(frozen=True)
class Ours(_NoSession):
    """One generation of this library.

    Attributes:
        generation: "fa1", ….
        functions: has ``flash_attn_func`` and ``flash_attn_varlen_func``: the package or a bundle.
        backend, arch: of these functions; for tests on the simulator.
    """

    generation: str
    functions: Any
    backend: str = "cuda"
    arch: str | None = None

    @property
    def name(self) -> str:
        return f"cute_fa-{self.generation}"

    @property
    def refusals(self) -> type[Exception]:
        return UnsupportedError

    def why_not(self, shape: Shape) -> str | None:
        return None  # its functions refuse what they do not serve, with the reason

    def bind(self, shape: Shape, inputs: BenchInputs) -> Call:
        p = shape.padded
        options: dict[str, Any] = {
            "causal": p.causal,
            "generation": self.generation,
            "backend": self.backend,
            "arch": self.arch,
        }
        if shape.is_varlen:
            options |= {
                "cu_seqlens_q": inputs.cu_seqlens,
                "cu_seqlens_k": inputs.cu_seqlens,
                "max_seqlen_q": p.seqlen_q,
                "max_seqlen_k": p.seqlen_k,
            }
            function = self.functions.flash_attn_varlen_func
        else:
            function = self.functions.flash_attn_func
        return lambda: function(inputs.q, inputs.k, inputs.v, **options)


@dataclass(frozen=True)
class Sdpa(_Foreign):
    """``torch.nn.functional.scaled_dot_product_attention`` with one back end.

    Attributes:
        backend: name of a ``torch.nn.attention.SDPBackend``, which cannot be pickled itself.
    """

    name: str
    backend: str

    def why_not(self, shape: Shape) -> str | None:
        p = shape.padded
        if shape.is_varlen:
            return "scaled_dot_product_attention takes no packed sequences"
        if p.causal and p.seqlen_q != p.seqlen_k:
            return "its causal mask is aligned to the top left"
        if p.dtype == "float8_e4m3fn":
            return "no fp8"
        return None

    def bind(self, shape: Shape, inputs: BenchInputs) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        p = shape.padded
        grouped = p.heads_q != p.heads_k
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, is_causal=p.causal, enable_gqa=grouped).transpose(1, 2)

    def session(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(getattr(SDPBackend, self.backend))


@dataclass(frozen=True)
class TorchVarlen(_Foreign, _NoSession):
    """``torch.nn.attention.varlen.varlen_attn``: packed sequences only."""

    name: str = "torch-varlen"

    def why_not(self, shape: Shape) -> str | None:
        if not shape.is_varlen:
            return "packed sequences only"
        return None if _has("torch.nn.attention.varlen") else "not in this torch"

    def bind(self, shape: Shape, inputs: BenchInputs) -> Call:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        p = shape.padded
        borders = inputs.cu_seqlens
        window = (-1, 0) if p.causal else (-1, -1)
        grouped = {"enable_gqa": True} if p.heads_q != p.heads_k else {}
        return lambda: varlen_attn(
            inputs.q,
            inputs.k,
            inputs.v,
            borders,
            borders,
            p.seqlen_q,
            p.seqlen_k,
            window_size=window,
            **grouped,
        )


@dataclass(frozen=True)
class FlashAttention(_Foreign, _NoSession):
    """A package with flash_attn's functions: flash-attn 2, its Hopper interface, or its CuTe one.

    Attributes:
        module: where ``flash_attn_func`` and ``flash_attn_varlen_func`` are.
        fp8: whether it takes e4m3 tensors.
    """

    name: str
    module: str
    fp8: bool = False

    def why_not(self, shape: Shape) -> str | None:
        if not _has(self.module):
            return f"{self.module} is not installed"
        if shape.padded.dtype == "float8_e4m3fn" and not self.fp8:
            return "no fp8"
        return None

    def bind(self, shape: Shape, inputs: BenchInputs) -> Call:
        module = importlib.import_module(self.module)
        p = shape.padded
        tensors = (inputs.q, inputs.k, inputs.v)
        if not shape.is_varlen:
            return lambda: _first(module.flash_attn_func(*tensors, causal=p.causal))
        packing = {
            "cu_seqlens_q": inputs.cu_seqlens,
            "cu_seqlens_k": inputs.cu_seqlens,
            "max_seqlen_q": p.seqlen_q,
            "max_seqlen_k": p.seqlen_k,
        }
        return lambda: _first(module.flash_attn_varlen_func(*tensors, **packing, causal=p.causal))


COMPETITORS: tuple[Provider, ...] = (
    Sdpa("sdpa-flash", "FLASH_ATTENTION"),
    Sdpa("sdpa-cudnn", "CUDNN_ATTENTION"),
    Sdpa("sdpa-efficient", "EFFICIENT_ATTENTION"),
    TorchVarlen(),
    FlashAttention("flash-attn-2", "flash_attn"),
    FlashAttention("flash-attn-3", "flash_attn_interface", fp8=True),
    FlashAttention("flash-attn-4", "flash_attn.cute"),
)


def providers(names: Sequence[str] | None, functions: Any) -> list[Provider]:
    """Our generations and the competitors, or those of them that are named.

    Args:
        functions: what our generations are called through: the package, or a bundle.

    Raises:
        InvalidArgumentError: a name that nobody has.
    """
    known: list[Provider] = [*(Ours(name, functions) for name in OURS), *COMPETITORS]
    if names is None:
        return known
    by_name = {provider.name: provider for provider in known}
    unknown = sorted(set(names) - set(by_name))
    if unknown:
        raise InvalidArgumentError(
            "unknown provider", got=", ".join(unknown), expected=", ".join(by_name)
        )
    return [by_name[name] for name in dict.fromkeys(names)]


def first_call(provider: Provider, shape: Shape, inputs: BenchInputs) -> tuple[Call, Tensor] | str:
    """The provider's call and what it computes, or in words why it does not serve the shape.

    Raises:
        Exception: whatever its first call raises that is no refusal.
    """
    reason = provider.why_not(shape)
    if reason is not None:
        return reason
    try:
        call = provider.bind(shape, inputs)
        with provider.session():
            return call, call()
    except provider.refusals as error:
        return in_words(error)


def in_words(error: Exception) -> str:
    """What was raised, in one line; of a launch that CUDA refused, its error too."""
    if isinstance(error, LaunchError):
        return f"{error.what}: {error.got}"
    if isinstance(error, CuteFAError):
        return error.what
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _first(result: Any) -> Tensor:
    """The output of a function that may return the LSE too."""
    return result[0] if isinstance(result, tuple) else result


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
