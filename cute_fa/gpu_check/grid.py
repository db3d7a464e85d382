"""The problems that a kernel's variant can serve, small and awkward, and what their inputs hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cute_fa.errors import UnsupportedError
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.testing.cases import Case
from cute_fa.testing.inputs import (
    Inputs,
    extreme_inputs,
    index_coded_inputs,
    make_inputs,
    one_hot_inputs,
)
from cute_fa.varlen import Packing, VarlenProblem

# (batch, Sq, Sk, K/V heads, query heads of each): one row, one column, odd lengths, more queries
# than keys, several tiles both ways.
FULL = (
    (1, 128, 128, 2, 1),
    (2, 113, 257, 2, 2),
    (1, 1, 300, 1, 4),
    (1, 65, 1, 3, 1),
    (1, 300, 150, 2, 3),
    (1, 777, 1030, 2, 2),
)
TINY = ((1, 33, 49, 1, 2),)
# Lengths of q and k of each packed sequence; an empty one, one without keys, one without queries.
PACKED_FULL = ((70, 0, 129, 5, 0, 300), (70, 0, 200, 0, 9, 257))
PACKED_TINY = ((20, 0, 13), (20, 5, 17))
WINDOW = (37, 11)
SOFTCAP = 15.0
EXTREME = 2000.0


@dataclass(frozen=True)
class GridCase:
    """A problem and one kind of inputs.

    Attributes:
        kind: "normal", "one hot", "index" or "extreme".
        exact: whether the right output is known to the last bit.
    """

    case: Case
    kind: str

    @property
    def exact(self) -> bool:
        return self.kind in ("index", "extreme")

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.kind}"

    def inputs(self) -> Inputs:
        """On the CPU, the same every time."""
        return _KINDS[self.kind](self.case)


_KINDS: dict[str, Callable[[Case], Inputs]] = {
    "normal": make_inputs,
    "one hot": lambda case: one_hot_inputs(case.problem, seed=case.seed),
    "index": lambda case: index_coded_inputs(case.problem, seed=case.seed),
    "extreme": lambda case: extreme_inputs(case.problem, magnitude=EXTREME),
}


def grid(variant: KernelVariant, *, tiny: bool = False) -> Iterator[GridCase]:
    """Every problem of the variant with normal inputs, and the first ones with structured inputs;
    nothing if no inputs are made in its dtype, or with the descales of blocks that it wants.

    Args:
        tiny: one small problem, for the simulator.
    """
    problems = list(_problems(variant, tiny))
    for number, (name, problem) in enumerate(problems):
        case = Case(name, problem, seed=100 + number)
        for kind in _KINDS if number < 2 else ("normal",):
            candidate = GridCase(case, kind)
            if _is_possible(candidate):
                yield candidate


def _is_possible(candidate: GridCase) -> bool:
    try:
        candidate.inputs()
    except UnsupportedError:
        return False
    return True


def _problems(
    variant: KernelVariant, tiny: bool
) -> Iterator[tuple[str, AttentionProblem | VarlenProblem]]:
    if variant.has_block_descales:
        return
    if variant.is_varlen:
        lengths_q, lengths_k = PACKED_TINY if tiny else PACKED_FULL
        yield (
            f"packed {lengths_q}",
            VarlenProblem.of(
                dense_problem(variant, 1, 1, 1, 2, variant.packed_group),
                Packing.of_lengths(
                    lengths_q,
                    lengths_k,
                    _used(lengths_q) if variant.has_seqused_q else None,
                    _used(lengths_k) if variant.has_seqused_k else None,
                ),
            ),
        )
        return
    for batch, seqlen_q, seqlen_k, heads_k, group in TINY if tiny else FULL:
        if variant.packed_group > 1:
            group = variant.packed_group
        name = f"b{batch} s{seqlen_q}×{seqlen_k} h{heads_k * group}/{heads_k}"
        yield name, dense_problem(variant, batch, seqlen_q, seqlen_k, heads_k, group)


def dense_problem(
    variant: KernelVariant, batch: int, seqlen_q: int, seqlen_k: int, heads_k: int, group: int
) -> AttentionProblem:
    """A problem that needs just this variant of a kernel, packing left aside."""
    left, right = WINDOW
    return AttentionProblem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_k * group,
        heads_k=heads_k,
        head_dim=variant.head_dim,
        head_dim_v=variant.head_dim_v,
        dtype=variant.dtype,
        causal=variant.causal,
        window_left=left if variant.has_window_left else None,
        window_right=right if variant.has_window_right else None,
        softcap=SOFTCAP if variant.has_softcap else 0.0,
    )


def _used(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """All of the first sequence, and about two thirds of the others."""
    return tuple(n if index == 0 else 2 * n // 3 for index, n in enumerate(lengths))
