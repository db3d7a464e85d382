"""What the plans of all rungs check alike, as plain Python without the DSL."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import MAX_HEAD_DIM, AttentionProblem, KernelVariant, head_dim_multiple
from cute_fa.varlen import VarlenProblem

Require = Callable[..., None]

ANSWER_BYTES = 16
"""What try_cancel writes (PTX ISA, clusterlaunchcontrol.try_cancel)."""

ANSWER_SLOTS = 2
"""A warp may read one answer while the next is on its way (``blocks.launch_control``)."""

ANSWERS_SMEM_BYTES = ANSWER_SLOTS * ANSWER_BYTES + 8 * (2 * ANSWER_SLOTS + 1)
"""Answers, an mbarrier each for full and empty, and one more."""


class ForwardPlan(Protocol):
    """The fields that every forward config has."""

    @property
    def dtype(self) -> str: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def head_dim_v(self) -> int: ...

    @property
    def is_causal(self) -> bool: ...

    @property
    def has_window_right(self) -> bool: ...

    @property
    def is_varlen(self) -> bool: ...

    @property
    def has_seqused_q(self) -> bool: ...

    @property
    def has_seqused_k(self) -> bool: ...


def requirements(rung: str) -> Require:
    """``require(ok, what, got, expected, fix=None)`` for a rung's config: raises if not ok."""

    def require(ok: bool, what: str, got: object, expected: str, fix: str | None = None) -> None:
        if not ok:
            raise InvalidArgumentError(
                f"{rung} config: {what}", got=got, expected=expected, fix=fix
            )

    return require


def check_plan(plan: ForwardPlan, require: Require, dtypes: Collection[str]) -> None:
    """The rules about what a kernel serves; each rung adds those about its tiles.

    Raises:
        InvalidArgumentError: a dtype that is not in ``dtypes``, head dims that no kernel serves, or
            features that contradict each other.
    """
    require(plan.dtype in dtypes, "dtype", plan.dtype, " or ".join(dtypes))
    multiple = head_dim_multiple(plan.dtype)
    for name in ("head_dim", "head_dim_v"):
        value = getattr(plan, name)
        require(
            0 < value <= MAX_HEAD_DIM and value % multiple == 0,
            name,
            value,
            f"a multiple of {multiple} up to {MAX_HEAD_DIM}",
        )
    require(
        not (plan.is_causal and plan.has_window_right),
        "two right bounds",
        "is_causal and has_window_right",
        "one of them: causal is a right window of 0",
    )
    require(
        plan.is_varlen or not (plan.has_seqused_q or plan.has_seqused_k),
        "seqused without varlen",
        "has_seqused_q or has_seqused_k, and not is_varlen",
        "is_varlen: dense calls have no lengths of their own",
    )


def check_served(
    rung: str,
    variant: KernelVariant,
    *,
    dtypes: Collection[str],
    has_varlen: bool = False,
    has_packed_groups: bool = False,
) -> None:
    """Refuse a variant that a rung's kernel has no code for.

    Args:
        dtypes: what the rung multiplies.
        has_varlen: whether it takes packed sequences.
        has_packed_groups: whether query heads of a K/V head can share its row tiles.

    Raises:
        UnsupportedError: says which feature it is.
    """
    if variant.dtype not in dtypes:
        raise UnsupportedError(
            f"{rung} multiplies 16-bit inputs only",
            got=variant.dtype,
            expected=" or ".join(dtypes),
            fix="convert the inputs",
        )
    if variant.is_varlen and not has_varlen:
        raise UnsupportedError(
            f"{rung} does not take packed sequences in this version",
            got="a varlen call",
            expected="dense tensors (B, S, H, D)",
        )
    if variant.has_block_descales and variant.dtype != "float8_e4m3fn":
        raise UnsupportedError(
            "16-bit inputs have no descales", got="block_descales", expected="float8_e4m3fn"
        )
    if variant.packed_group != 1 and not has_packed_groups:
        raise UnsupportedError(
            f"{rung} gives each query head row tiles of its own",
            got=f"packed_group {variant.packed_group}",
            expected="packed_group 1",
        )


def group_that_saves_tiles(
    problem: AttentionProblem | VarlenProblem, *, box_rows: int, tile_m: int
) -> int:
    """How many query heads of a K/V head had better share row tiles: all G, or 1.

    All if that makes fewer tiles: ⌈Sq·G / M⌉ for a K/V head, against G·⌈Sq / M⌉, each of which
    passes over the same K and V. Packed sequences are counted as if all had the mean length.

    Args:
        box_rows: rows of one TMA box of Q, which G has to divide.
        tile_m: M, rows of a tile.
    """
    if isinstance(problem, VarlenProblem):
        padded = problem.padded
        queries = -(-problem.total_q // max(padded.batch, 1))
    else:
        padded, queries = problem, problem.seqlen_q
    group = padded.heads_q // padded.heads_k
    if box_rows % group:
        return 1
    saves = -(-queries * group // tile_m) < group * -(-queries // tile_m)
    return group if saves else 1
