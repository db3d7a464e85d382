"""Which kernels exist, and which of them serves a problem on a target.

Kernels are named by strings and imported when they are asked for: reading this table costs
neither torch nor the DSL.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cute_fa.errors import CuteFAError, InvalidArgumentError, InvalidTypeError, UnsupportedError
from cute_fa.exp2 import MAX_RELATIVE_ERROR
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import TARGETS, Target, get_target
from cute_fa.varlen import VarlenProblem

Problem = AttentionProblem | VarlenProblem

GENERATIONS = ("fa1", "fa2", "fa3", "fa4")
DIRECTIONS = ("fwd", "bwd")


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of one rung of the ladder.

    Attributes:
        generation, direction: "fa1" … "fa4", "fwd" or "bwd".
        archs: the architectures it compiles for.
        kernel: "module:class"; ``class(config)`` is a ``@cute.jit`` callable.
        pick: "module:function"; ``function(variant, target)`` gives the config, or raises
            UnsupportedError. Its module imports no DSL.
        sources: packages or modules whose files decide what the kernel compiles to.
        summary: the idea in a few words.
        features: what it serves, in words.
        automatic: whether ``generation="auto"`` may choose it.
        preference: "module:function", ``function(problem)`` being how many query heads had better
            share row tiles; None for a kernel that does not pack them.
        exp2_error: relative error of its exponentials beyond a few fp32 roundings, which its LSE
            may show (``testing.check_attention``).
        arguments: "module:function"; ``function(config)`` gives the symbolic compile arguments.
    """

    generation: str
    direction: str
    archs: tuple[str, ...]
    kernel: str
    pick: str
    sources: tuple[str, ...]
    summary: str
    features: tuple[str, ...]
    automatic: bool = True
    exp2_error: float = 0.0
    preference: str | None = None
    arguments: str = "cute_fa.blocks.signature:fake_forward_arguments"

    @property
    def name(self) -> str:
        """E.g. "fa2 fwd"."""
        return f"{self.generation} {self.direction}"

    def preferred_group(self, problem: Problem) -> int:
        """How many query heads of a K/V head had better share row tiles; 1 for none."""
        return 1 if self.preference is None else load(self.preference)(problem)

    def config(self, variant: KernelVariant, target: Target, overrides: Mapping[str, Any]) -> Any:
        """The kernel's config for a variant on a target, with some of its fields replaced.

        Raises:
            UnsupportedError: the kernel does not serve the variant on this target.
            InvalidArgumentError: an override is no field of the config, breaks its rules, or makes
                another variant.
            InvalidTypeError: an override is not of its field's type.
        """
        if target.arch not in self.archs:
            why = NOT_COMPILED.get(target.arch)
            raise UnsupportedError(
                f"{self.name} is not built for this architecture",
                got=target.arch if why is None else f"{target.arch}: {why}",
                expected=", ".join(self.archs),
            )
        config = load(self.pick)(variant, target)
        names = [field.name for field in fields(config)]
        unknown = sorted(set(overrides) - set(names))
        if unknown:
            may_be_set = [name for name in names if name not in _DECIDED_FIELDS]
            raise InvalidArgumentError(
                f"{', '.join(unknown)}: no such field of the {self.name} kernel's config",
                got=", ".join(f"{name}={overrides[name]!r}" for name in unknown),
                expected=", ".join(may_be_set),
                fix="set one of these, or leave it out",
            )
        for name, value in overrides.items():
            self._check_override(name, value, getattr(config, name))
        return replace(config, **overrides) if overrides else config

    def _check_override(self, name: str, value: object, own: object) -> None:
        """That an override is of its field's type (a bool is no number of stages), and that it does
        not make another variant of the kernel."""
        if type(value) is not type(own):
            raise InvalidTypeError(
                f"{name}: not what this field of the {self.name} kernel's config holds",
                got=f"{value!r} ({type(value).__name__})",
                expected=f"{type(own).__name__}, as in {name}={own!r}",
                fix=f"leave {name} out for the kernel's own choice",
            )
        if name in _DECIDED_FIELDS and value != own:
            raise InvalidArgumentError(
                f"{name} follows from what the {self.name} kernel is for",
                got=f"{name}={value!r}",
                expected=f"{name}={own!r} here",
                fix="ask for another architecture, dtype, head dim, mask or packing by its own "
                "argument",
            )


# Fields of a config that its variant or architecture decides, not its plan. Heads are packed by
# either.
_DECIDED_FIELDS = {
    "smem_limit_bytes",
    *(
        "is_causal" if field.name == "causal" else field.name
        for field in fields(KernelVariant)
        if field.name != "packed_group"
    ),
}

_FEATURES = (
    "causal",
    "sliding window",
    "softcap",
    "MHA/GQA/MQA",
    "Dv ≠ D",
    "any Sq, Sk",
    "strided inputs",
    "LSE",
)

NOT_COMPILED: dict[str, str] = {
    "sm_110a": "the DSL compiles it as sm_101a, its name before CUDA 13 (PTX 8.8), and Thor's "
    "drivers are CUDA 13's; simulated devices run such code",
}
"""Architectures that no kernel is built for, and why."""

COMPILED = tuple(arch for arch in TARGETS if arch not in NOT_COMPILED)

KERNELS: tuple[KernelEntry, ...] = (
    KernelEntry(
        generation="fa1",
        direction="fwd",
        archs=COMPILED,
        kernel="cute_fa.fa1.fwd:Fa1Fwd",
        pick="cute_fa.fa1.config:pick_fwd",
        sources=("cute_fa.fa1", "cute_fa.blocks"),
        summary="K/V outer, Q inner; O and the softmax state live in HBM",
        features=(*_FEATURES, "varlen"),
        automatic=False,
    ),
    KernelEntry(
        generation="fa2",
        direction="fwd",
        archs=COMPILED,
        kernel="cute_fa.fa2.fwd:Fa2Fwd",
        pick="cute_fa.fa2.config:pick_fwd",
        sources=("cute_fa.fa2", "cute_fa.blocks"),
        summary="Q outer, K/V inner; O and the softmax state live in registers",
        features=(*_FEATURES, "varlen"),
    ),
    KernelEntry(
        generation="fa3",
        direction="fwd",
        archs=("sm_90a",),
        kernel="cute_fa.fa3.fwd:Fa3Fwd",
        pick="cute_fa.fa3.config:pick_fwd",
        preference="cute_fa.fa3.config:preferred_group",
        sources=("cute_fa.fa3", "cute_fa.blocks"),
        summary="TMA and wgmma by specialised warps; softmax beside the products",
        features=(*_FEATURES, "varlen", "packed GQA", "FP8 (e4m3)"),
    ),
    KernelEntry(
        generation="fa4",
        direction="fwd",
        archs=("sm_100a", "sm_103a"),
        kernel="cute_fa.fa4.fwd:Fa4Fwd",
        pick="cute_fa.fa4.config:pick_fwd",
        preference="cute_fa.fa4.config:preferred_group",
        sources=("cute_fa.fa4", "cute_fa.blocks", "cute_fa.exp2"),
        summary="tcgen05 and tensor memory; exp2 on two units; O rescaled only when it matters",
        features=(*_FEATURES, "varlen", "packed GQA", "FP8 (e4m3)"),
        exp2_error=MAX_RELATIVE_ERROR,
    ),
)


@dataclass(frozen=True)
class Support:
    """Whether a problem runs on a target.

    Attributes:
        ok: whether ``generation`` serves it.
        reason: why not; empty if ``ok``.
        alternatives: generations that would serve the same problem there.
        generation: the generation that was chosen or asked about.
    """

    ok: bool
    reason: str
    alternatives: tuple[str, ...]
    generation: str

    def __bool__(self) -> bool:
        return self.ok


def load(name: str) -> Any:
    """The object that "module:attribute" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find(generation: str, direction: str = "fwd") -> KernelEntry:
    """The registered kernel.

    Raises:
        InvalidArgumentError: no such generation or direction exists.
        UnsupportedError: it exists, but this build has no such kernel.
    """
    for entry in KERNELS:
        if (entry.generation, entry.direction) == (generation, direction):
            return entry
    if generation not in GENERATIONS:
        raise InvalidArgumentError(
            "unknown generation",
            got=repr(generation),
            expected="auto, " + ", ".join(GENERATIONS),
            fix="generation='auto' takes the newest that serves the problem",
        )
    if direction not in DIRECTIONS:
        raise InvalidArgumentError(
            "unknown direction",
            got=repr(direction),
            expected=" or ".join(DIRECTIONS),
            fix="direction='fwd'",
        )
    raise UnsupportedError(
        f"there is no {generation} {direction} kernel in this version",
        got=f"{generation} {direction}",
        expected=", ".join(entry.name for entry in KERNELS),
        fix="cute_fa.reference.dense.DenseAttention has a backward" if direction == "bwd" else None,
        alternatives=[e.generation for e in KERNELS if e.direction == direction],
    )


def can_run(
    problem: Problem,
    target: str | Target,
    generation: str = "auto",
    direction: str = "fwd",
) -> Support:
    """Whether ``generation`` serves ``problem`` on ``target``, why not, and what else would.

    Raises:
        InvalidTypeError: ``problem`` is no problem.
        InvalidArgumentError: the target, generation or direction does not exist.
    """
    if not isinstance(problem, (AttentionProblem, VarlenProblem)):
        raise InvalidTypeError(
            "problem describes no attention",
            got=f"{problem!r} ({type(problem).__name__})",
            expected="an AttentionProblem or a VarlenProblem",
            fix="cute_fa.AttentionProblem(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, "
            "head_dim_v, dtype)",
        )
    where = get_target(target)
    variant = problem.variant
    if generation == "auto":
        entries = _automatic(direction)
    else:
        try:
            entries = [find(generation, direction)]
        except UnsupportedError as error:
            return Support(False, error.what, _servers(variant, where, direction), generation)
    reasons = []
    for entry in entries:
        reason = _why_not(entry, variant, where)
        if reason is None:
            return Support(True, "", (), entry.generation)
        reasons.append(reason)
    others = tuple(name for name in _servers(variant, where, direction) if name != generation)
    return Support(False, "\n".join(reasons), others, generation)


def choose_generation(
    problem: Problem,
    target: str | Target,
    generation: str = "auto",
    direction: str = "fwd",
) -> str:
    """The generation that will run: the one asked for, or the newest that serves the problem.

    Raises:
        UnsupportedError: it does not serve the problem on this target; says why and what would.
    """
    support = can_run(problem, target, generation, direction)
    if support.ok:
        return support.generation
    who = "no generation serves" if generation == "auto" else f"{generation} does not serve"
    raise UnsupportedError(
        f"{who} this problem on {get_target(target).arch}",
        got=support.reason.replace("\n", "\n            "),
        alternatives=support.alternatives,
    )


def rows() -> list[dict[str, Any]]:
    """The table that ``cute-fa list`` prints: one row per kernel, of JSON-able values."""
    return [
        {
            "generation": entry.generation,
            "direction": entry.direction,
            "archs": list(entry.archs),
            "features": list(entry.features),
            "summary": entry.summary,
            "automatic": entry.automatic,
        }
        for entry in KERNELS
    ]


def _automatic(direction: str) -> list[KernelEntry]:
    """What "auto" considers, the newest generation first; each entry's archs narrow it further."""
    entries = [e for e in KERNELS if e.automatic and e.direction == direction]
    return sorted(entries, key=lambda entry: GENERATIONS.index(entry.generation), reverse=True)


def _why_not(entry: KernelEntry, variant: KernelVariant, target: Target) -> str | None:
    try:
        entry.config(variant, target, {})
    except CuteFAError as error:
        return str(error)
    return None


def _servers(variant: KernelVariant, target: Target, direction: str) -> tuple[str, ...]:
    entries = (entry for entry in KERNELS if entry.direction == direction)
    return tuple(e.generation for e in entries if _why_not(e, variant, target) is None)
