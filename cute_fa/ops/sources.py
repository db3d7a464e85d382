"""Where kernels come from: the compiler of this machine, or a bundle that was made elsewhere.

Options and graphs of torch hold a source by its name, a plain string.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

from cute_fa.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.ops import plans
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import Target
from cute_fa.varlen import VarlenProblem


class KernelSource(Protocol):
    """Gives the kernel for a problem, or says why there is none."""

    def choose_generation(
        self, problem: AttentionProblem | VarlenProblem, target: Target, generation: str
    ) -> str:
        """The generation that will run: the one asked for, or for "auto" the newest that can.

        Raises:
            UnsupportedError: none does, or not the one asked for.
        """

    def check_variant(self, generation: str, target: Target, variant: KernelVariant) -> None:
        """That it has a kernel for a variant.

        Raises:
            UnsupportedError: it has none.
        """

    def kernel(self, generation: str, arch: str, variant: KernelVariant) -> Any:
        """What launches it, with ``.host(backend)``, ``.ptx``, ``.arch`` and ``.config``."""


class Compiler:
    """Kernels from this process, the disk cache or the compiler."""

    def choose_generation(
        self, problem: AttentionProblem | VarlenProblem, target: Target, generation: str
    ) -> str:
        from cute_fa import build

        return build.choose_generation(problem, target, generation)

    def check_variant(self, generation: str, target: Target, variant: KernelVariant) -> None:
        from cute_fa.build import registry

        registry.find(generation).config(variant, target, {})

    def kernel(self, generation: str, arch: str, variant: KernelVariant) -> Any:
        from cute_fa import build

        return build.compile(
            generation,
            "fwd",
            arch=arch,
            dtype=variant.dtype,
            head_dim=variant.head_dim,
            head_dim_v=variant.head_dim_v,
            **variant_features(variant),
        )


_sources: dict[str | None, KernelSource] = {None: Compiler()}
_generations: dict[tuple[KernelVariant, str, str, str | None], str] = {}
_lock = threading.Lock()


def register(name: str, source: KernelSource) -> None:
    """Make a source known; one of the same name is replaced."""
    with _lock:
        _sources[name] = source
        kernel.cache_clear()
        _generations.clear()
        plans.forget()


def name_of(kernels: Any) -> str | None:
    """The name under which the ``kernels`` argument of a public function is known.

    Raises:
        InvalidTypeError: it is no bundle.
    """
    if kernels is None:
        return None
    name = getattr(kernels, "source_name", None)
    if name is None or name not in _sources:
        raise InvalidTypeError(
            "kernels is not a bundle",
            got=f"{kernels!r} ({type(kernels).__name__})",
            expected="what cute_fa.load_bundle returns, or None to compile",
            fix="kernels=cute_fa.load_bundle(folder)",
        )
    return name


def source(name: str | None) -> KernelSource:
    """The source of that name.

    Raises:
        InvalidArgumentError: nothing of that name has been loaded in this process.
    """
    found = _sources.get(name)
    if found is None:
        raise InvalidArgumentError(
            "a bundle that this call was traced with is not loaded here",
            got=name,
            fix=f"cute_fa.load_bundle({name!r}) first",
        )
    return found


def generation(
    problem: AttentionProblem | VarlenProblem, target: Target, asked: str, name: str | None
) -> str:
    """``choose_generation`` of a source, which depends on the problem's variant only; asked once
    for each."""
    key = (problem.variant, target.arch, asked, name)
    chosen = _generations.get(key)
    if chosen is None:
        chosen = source(name).choose_generation(problem, target, asked)
        _generations[key] = chosen
    return chosen


def packed_group(
    problem: AttentionProblem | VarlenProblem, target: Target, generation: str, name: str | None
) -> int:
    """How many query heads share row tiles if nobody says: what the rung prefers, where the source
    has such a kernel."""
    from cute_fa.build import registry

    group = registry.find(generation).preferred_group(problem)
    if group > 1:
        try:
            variant = replace(problem.variant, packed_group=group)
            source(name).check_variant(generation, target, variant)
        except UnsupportedError:
            return 1
    return group


@cache
def kernel(generation: str, arch: str, variant: KernelVariant, name: str | None) -> Any:
    """``kernel`` of a source, asked once for each."""
    return source(name).kernel(generation, arch, variant)


def variant_features(variant: KernelVariant) -> dict[str, Any]:
    """Masking, softcap and packing as ``build.compile`` takes them; the numbers themselves are
    arguments of the launch, any that say the same will do."""
    return {
        "causal": variant.causal,
        "window_size": (
            0 if variant.has_window_left else None,
            1 if variant.has_window_right else None,
        ),
        "softcap": 1.0 if variant.has_softcap else 0.0,
        "varlen": variant.is_varlen,
        "seqused_q": variant.has_seqused_q,
        "seqused_k": variant.has_seqused_k,
        "packed_group": variant.packed_group,
        "block_descales": variant.has_block_descales,
    }
