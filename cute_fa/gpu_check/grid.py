"""The problems that a kernel's variant can serve, small and awkward, and what their inputs hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cute_fa.errors import UnsupportedError
from cute_fa.ops.descales import Descales
from cute_fa.problem import DTYPE_BYTES, AttentionProblem, KernelVariant
from cute_fa.quant import BLOCK_ROWS
from cute_fa.testing.cases import Case
from cute_fa.testing.inputs import (
    Inputs,
    extreme_inputs,
    index_coded_inputs,
    normal_inputs,
    one_hot_inputs,
    place,
    quantized_inputs,
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
# How q, k and v lie in memory where they are no tensors of their own: parts of one projection; each
# in its own order; slices of larger ones; K and V repeated by a stride of 0.
VIEWS = (
    ("packed", "packed", "packed"),
    ("heads_first", "sequence_first", "sliced"),
    ("sliced", "same_heads", "same_batch"),
)
OF_VIEWS = (2, 150, 290, 2, 2)
TINY = ((1, 33, 49, 1, 2),)
TINY_BLOCKS = ((1, 33, BLOCK_ROWS + 3, 1, 2),)
# Lengths of q and k of each packed sequence; an empty one, one without keys, one without queries.
PACKED_FULL = ((70, 0, 129, 5, 0, 300), (70, 0, 200, 0, 9, 257))
PACKED_TINY = ((20, 0, 13), (20, 5, 17))
PACKED_TINY_BLOCKS = ((20, 0, 13), (20, 5, BLOCK_ROWS + 3))
WINDOW = (37, 11)
SOFTCAP = 15.0
EXTREME = 2000.0


class GridInputs(NamedTuple):
    """q, k and v, of FP8 kernels their descales (None for 1), and the output where it is known."""

    q: Tensor
    k: Tensor
    v: Tensor
    descales: Descales
    expected: Tensor | None

    def to(self, device: str) -> GridInputs:
        """The same there, with the same strides; the expected output left where it is."""
        q, k, v = (_moved(x, device) for x in (self.q, self.k, self.v))
        descales = Descales(*(None if x is None else x.to(device) for x in self.descales))
        return GridInputs(q, k, v, descales, self.expected)


def _moved(x: Tensor, device: str) -> Tensor:
    """``x`` and what lies between its rows; ``Tensor.to`` would close the gaps."""
    if x.device.type == torch.device(device).type:
        return x
    storage = x.new_empty(0).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass(frozen=True)
class GridCase:
    """A problem and one kind of inputs.

    Attributes:
        kind: "normal", "one hot", "index" or "extreme"; of FP8 kernels also "quantized", which is
            normal values with descales of many sizes.
        by_block: whether there is a descale for every block of rows.
        exact: whether the right output is known to the last bit.
    """

    case: Case
    kind: str
    by_block: bool = False

    @property
    def exact(self) -> bool:
        return self.kind in ("index", "extreme")

    @property
    def has_views(self) -> bool:
        """Whether q, k and v do not lie densely in memory."""
        return self.case.layouts in VIEWS

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.kind}"

    def inputs(self) -> GridInputs:
        """On the CPU, the same every time."""
        if self.kind == "quantized":
            made = quantized_inputs(self.case.problem, seed=self.case.seed, by_block=self.by_block)
            return GridInputs(*self._placed(*made[:3]), Descales(*made[3:]), None)
        inputs = _KINDS[self.kind](self.case)
        descales = self._ones() if self.by_block else Descales()
        return GridInputs(*self._placed(*inputs[:3]), descales, inputs.expected)

    def _placed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The case's layouts, whose strides of 0 change values."""
        is_packed = isinstance(self.case.problem, VarlenProblem)
        q, k, v = (
            place(x[None], layout)[0] if is_packed else place(x, layout)
            for x, layout in zip((q, k, v), self.case.layouts, strict=True)
        )
        return q, k, v

    def _ones(self) -> Descales:
        """1 for every block of rows."""
        problem = self.case.problem
        p = problem.padded if isinstance(problem, VarlenProblem) else problem
        rows = (p.seqlen_q, p.seqlen_k, p.seqlen_k)
        return Descales(*(torch.ones(p.batch, p.heads_k, -(-n // BLOCK_ROWS)) for n in rows))


_KINDS: dict[str, Callable[[Case], Inputs]] = {
    "normal": lambda case: normal_inputs(case.problem, seed=case.seed),
    "one hot": lambda case: one_hot_inputs(case.problem, seed=case.seed),
    "index": lambda case: index_coded_inputs(case.problem, seed=case.seed),
    "extreme": lambda case: extreme_inputs(case.problem, magnitude=EXTREME),
}


def grid(variant: KernelVariant, *, tiny: bool = False) -> Iterator[GridCase]:
    """Every problem of the variant with normal inputs, and the first ones with structured inputs;
    last, a problem whose inputs are views.

    Args:
        tiny: one small problem, for the simulator.
    """
    is_fp8 = DTYPE_BYTES[variant.dtype] == 1
    usual = ("quantized",) if is_fp8 else ("normal",)
    structured = [kind for kind in _KINDS if kind not in usual]
    problems = list(_problems(variant, tiny))
    for number, (name, problem) in enumerate(problems):
        case = Case(name, problem, seed=100 + number)
        for kind in (*structured, *usual) if number < 2 else usual:
            candidate = GridCase(case, kind, variant.has_block_descales)
            if _is_possible(candidate):
                yield candidate
    if tiny:
        return
    name, problem = problems[-1] if variant.is_varlen else _dense(variant, OF_VIEWS)
    for layouts in VIEWS:
        case = Case(f"{name}, {', '.join(layouts)}", problem, seed=100, layouts=layouts)
        yield GridCase(case, usual[0], variant.has_block_descales)


def _is_possible(candidate: GridCase) -> bool:
    """Whether its inputs can be made, found on one query of one head: the list of all cases must
    cost next to nothing."""
    problem = candidate.case.problem
    p = problem.padded if isinstance(problem, VarlenProblem) else problem
    small = replace(p, batch=1, seqlen_q=1, heads_q=1, heads_k=1)
    try:
        _KINDS.get(candidate.kind, _KINDS["normal"])(Case("", small))
    except UnsupportedError:
        return False
    return True


def _problems(
    variant: KernelVariant, tiny: bool
) -> Iterator[tuple[str, AttentionProblem | VarlenProblem]]:
    if variant.is_varlen:
        lengths = PACKED_TINY_BLOCKS if variant.has_block_descales else PACKED_TINY
        lengths_q, lengths_k = lengths if tiny else PACKED_FULL
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
    few = TINY_BLOCKS if variant.has_block_descales else TINY
    for sizes in few if tiny else FULL:
        yield _dense(variant, sizes)


def _dense(
    variant: KernelVariant, sizes: tuple[int, int, int, int, int]
) -> tuple[str, AttentionProblem]:
    """A problem with its name, of ``sizes`` as ``FULL`` has them."""
    batch, seqlen_q, seqlen_k, heads_k, group = sizes
    if variant.packed_group > 1:
        group = variant.packed_group
    name = f"b{batch} s{seqlen_q}×{seqlen_k} h{heads_k * group}/{heads_k}"
    return name, dense_problem(variant, batch, seqlen_q, seqlen_k, heads_k, group)


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
