"""What forward kernels are specialised for and what their plans are checked for, without the DSL.

Each rung has a config of its own, a frozen dataclass on top of ``ForwardPlan`` or, with TMA, of
``TmaForwardPlan``: these say what the kernel computes, the rung's fields how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from cute_fa.blocks.tiles import PANEL_ELEMENT_BYTES, round_up, tile_bytes
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import (
    DTYPE_BYTES,
    MAX_HEAD_DIM,
    AttentionProblem,
    KernelVariant,
    head_dim_multiple,
    is_fp8,
    out_dtype,
)
from cute_fa.target import KIB, Target
from cute_fa.varlen import VarlenProblem

DESCALE_ROWS = 128
"""Rows of a block that has a descale of its own; ``quant.BLOCK_ROWS``."""

FP8_P_EXPONENT = 8.0
"""P of a row's largest score, in log2 units: e4m3 has no numbers below 2⁻⁹ (``blocks.fp8``)."""

MBARRIER_BYTES = 8
REGISTERS_PER_SM = 65536

ANSWER_BYTES = 16
"""What try_cancel writes (PTX ISA, clusterlaunchcontrol.try_cancel)."""

ANSWER_SLOTS = 2
"""A warp may read one answer while the next is on its way (``blocks.launch_control``)."""

ANSWERS_SMEM_BYTES = ANSWER_SLOTS * ANSWER_BYTES + MBARRIER_BYTES * (2 * ANSWER_SLOTS + 1)
"""Answers, an mbarrier each for full and empty, and one more."""


@dataclass(frozen=True)
class Workspace:
    """A global-memory buffer that a kernel needs beside its outputs; arrives uninitialised."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ForwardPlan:
    """What a forward kernel computes; a rung's config adds its tiles, warps and rings.

    Attributes:
        rung, dtypes: of the class: its name, and what its products take.
        dtype … has_seqused_k: as in ``KernelVariant``, whose ``causal`` is ``is_causal``. Head dims
            are padded in shared memory only.
        smem_limit_bytes: shared memory that a CTA of the target may use.
    """

    rung: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")

    dtype: str
    head_dim: int
    head_dim_v: int
    is_causal: bool = False
    has_window_left: bool = False
    has_window_right: bool = False
    has_softcap: bool = False
    is_varlen: bool = False
    has_seqused_q: bool = False
    has_seqused_k: bool = False
    smem_limit_bytes: int = 227 * KIB

    @classmethod
    def of(cls: type[Plan], variant: KernelVariant, target: Target, **own: Any) -> Plan:
        """The plan of a variant that ``check_served`` lets pass; ``own`` are the rung's fields."""
        features = asdict(variant)
        features["is_causal"] = features.pop("causal")
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in features.items() if name in known}
        return cls(**given, **own, smem_limit_bytes=target.smem_per_block_bytes)

    @classmethod
    def check_served(cls, variant: KernelVariant) -> None:
        """Refuse a variant that the rung's kernel has no code for.

        Raises:
            UnsupportedError: says which feature it is.
        """
        if variant.dtype not in cls.dtypes:
            raise UnsupportedError(
                f"{cls.rung} multiplies 16-bit inputs only",
                got=variant.dtype,
                expected=" or ".join(cls.dtypes),
                fix="convert the inputs",
            )
        if variant.has_block_descales and not is_fp8(variant.dtype):
            raise UnsupportedError(
                "16-bit inputs have no descales",
                got=f"block_descales=True with {variant.dtype}",
                expected="float8_e4m3fn",
                fix="block_descales=False",
            )
        if variant.packed_group != 1 and not issubclass(cls, TmaForwardPlan):
            raise UnsupportedError(
                f"{cls.rung} gives each query head row tiles of its own",
                got=f"{variant.packed_group} query heads per K/V head to share them",
                expected="1; FA3 on sm_90a and FA4 on sm_100a and sm_103a pack more",
                fix="use pack_gqa=None or False",
            )

    def require(
        self, ok: bool, what: str, got: object, expected: str, fix: str | None = None
    ) -> None:
        """Raise InvalidArgumentError, with the rung's name, unless ``ok``."""
        if not ok:
            raise InvalidArgumentError(
                f"{self.rung} config: {what}", got=got, expected=expected, fix=fix
            )

    def __post_init__(self) -> None:
        """The rules about what a kernel computes; each rung adds those about its tiles."""
        self.require(self.dtype in self.dtypes, "dtype", self.dtype, " or ".join(self.dtypes))
        multiple = head_dim_multiple(self.dtype)
        for name in ("head_dim", "head_dim_v"):
            value = getattr(self, name)
            self.require(
                0 < value <= MAX_HEAD_DIM and value % multiple == 0,
                name,
                value,
                f"a multiple of {multiple} up to {MAX_HEAD_DIM}",
            )
        self.require(
            not (self.is_causal and self.has_window_right),
            "two right bounds",
            "is_causal and has_window_right",
            "one of them: causal is a right window of 0",
        )
        self.require(
            self.is_varlen or not (self.has_seqused_q or self.has_seqused_k),
            "seqused without varlen",
            "has_seqused_q or has_seqused_k, and not is_varlen",
            "is_varlen: dense calls have no lengths of their own",
        )

    def require_smem(self, needed: int, arithmetic: str, fix: str) -> None:
        """That a CTA may have ``needed`` bytes, which come about by ``arithmetic``."""
        self.require(
            needed <= self.smem_limit_bytes,
            "shared memory",
            f"{arithmetic} = {needed} bytes",
            f"at most {self.smem_limit_bytes} bytes",
            fix=fix,
        )

    @property
    def element_bytes(self) -> int:
        """Of Q, K, V and P."""
        return DTYPE_BYTES[self.dtype]

    @property
    def out_dtype(self) -> str:
        """Of O."""
        return out_dtype(self.dtype)

    @property
    def out_bytes(self) -> int:
        """Of an element of O."""
        return DTYPE_BYTES[self.out_dtype]

    @property
    def pad_columns(self) -> int:
        """What head dims are padded to a multiple of: whole panels, of bytes too (``tiles``)."""
        return 32

    @property
    def padded_d(self) -> int:
        """Columns of the Q and K tiles."""
        return round_up(self.head_dim, self.pad_columns)

    @property
    def padded_dv(self) -> int:
        """Columns of the V and O tiles."""
        return round_up(self.head_dim_v, self.pad_columns)

    def workspace(self, batch: int, seqlen_q: int, heads_q: int) -> tuple[Workspace, ...]:
        """Global scratch tensors that a launch needs: none, if O and its statistics stay on chip.

        Of packed sequences, ``seqlen_q`` is Tq and the tensors have no batch dimension.
        """
        return ()


Plan = TypeVar("Plan", bound=ForwardPlan)


@dataclass(frozen=True)
class TmaForwardPlan(ForwardPlan):
    """What a forward kernel computes whose tiles come by TMA, and how it goes through them.

    Zeros that TMA writes for columns outside the tensor pad the head dims.

    Attributes:
        box_rows: of the class: rows of one TMA box of Q.
        packed_group, has_block_descales: as in ``KernelVariant``; see ``blocks.pack_gqa`` and
            ``blocks.fp8``.
        tile_n: key columns of a tile.
        is_persistent: CTAs take one row tile after another (``blocks.tile_scheduler``).
        has_own_o: O has shared memory of its own, so that Q of the next tile can land while O is
            finished and leaves; else it leaves from Q's.
    """

    dtypes: ClassVar[tuple[str, ...]] = ("float16", "bfloat16", "float8_e4m3fn")
    box_rows: ClassVar[int]

    packed_group: int = 1
    has_block_descales: bool = False
    tile_n: int = 128
    is_persistent: bool = False
    has_own_o: bool = False

    @classmethod
    def check_served(cls, variant: KernelVariant) -> None:
        super().check_served(variant)
        if cls.box_rows % variant.packed_group:
            raise UnsupportedError(
                f"{cls.rung} cannot pack this many query heads into a tile",
                got=f"{variant.packed_group} query heads per K/V head",
                expected=f"a divisor of {cls.box_rows}, the rows of one TMA box of Q",
                fix="use pack_gqa=None or False",
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.packed_group > 0 and self.box_rows % self.packed_group == 0,
            "packed_group",
            self.packed_group,
            f"a divisor of {self.box_rows}, the rows of one TMA box of Q",
            fix="use packed_group=1: every query head gets row tiles of its own",
        )

    def require_whole_descales(self) -> None:
        """That a key tile has one descale, if blocks of rows have descales."""
        self.require(
            not self.has_block_descales or (self.is_fp8 and DESCALE_ROWS % self.tile_n == 0),
            "tile_n does not divide the keys of a descale",
            self.tile_n,
            f"a divisor of {DESCALE_ROWS}, and fp8 inputs",
        )

    @property
    def tile_m(self) -> int:
        """Rows of a CTA's tile, or of the tile that a cluster shares."""
        raise NotImplementedError

    @property
    def num_ctas(self) -> int:
        """CTAs that share a tile: a cluster of as many."""
        return 1

    @property
    def has_multicast(self) -> bool:
        """Whether each of them holds all of a tile of K and V, and loads a part of it for all."""
        return False

    @property
    def k_rows(self) -> int:
        """Keys of a tile of K that one of them holds."""
        return self.tile_n // self.num_ctas

    @property
    def v_columns(self) -> int:
        """Columns of a tile of V that one of them holds."""
        return self.padded_dv // self.num_ctas

    @property
    def tile_queries(self) -> int:
        """Queries of a tile: packed, each is ``packed_group`` rows."""
        return self.tile_m // self.packed_group

    @property
    def is_fp8(self) -> bool:
        """Whether tiles hold bytes, and there are descales."""
        return is_fp8(self.dtype)

    @property
    def p_exponent(self) -> float:
        """P of a row's largest score so far is 2 to this power."""
        return FP8_P_EXPONENT if self.is_fp8 else 0.0

    @property
    def panel_d(self) -> int:
        """``padded_d`` in elements of 16 bits."""
        return self.padded_d * self.element_bytes // PANEL_ELEMENT_BYTES

    @property
    def panel_dv(self) -> int:
        """``v_columns`` in elements of 16 bits."""
        return self.v_columns * self.element_bytes // PANEL_ELEMENT_BYTES

    @property
    def smem_q_bytes(self) -> int:
        """One box of Q: what its mbarrier waits for."""
        return tile_bytes(self.box_rows, self.padded_d, self.element_bytes)

    @property
    def smem_o_bytes(self) -> int:
        """One box of O."""
        return tile_bytes(self.box_rows, self.padded_dv, self.out_bytes)

    @property
    def smem_q_place_bytes(self) -> int:
        """From one box of Q to the next; each place holds that box's O at the end, unless O has
        places of its own."""
        if self.has_own_o:
            return self.smem_q_bytes
        return max(self.smem_q_bytes, self.smem_o_bytes)

    @property
    def smem_q_and_o_bytes(self) -> int:
        """A box of Q and that of its O."""
        return self.smem_q_place_bytes + (self.smem_o_bytes if self.has_own_o else 0)

    @property
    def q_and_o_columns(self) -> str:
        """The same of one row, in elements of Q, as messages write it."""
        q, o = self.padded_d, self.padded_dv * self.out_bytes // self.element_bytes
        return f"({q} + {o})" if self.has_own_o else f"{max(q, o)}"

    @property
    def smem_k_bytes(self) -> int:
        """One tile of K, or what each CTA of a cluster holds of it."""
        return tile_bytes(self.k_rows, self.padded_d, self.element_bytes)

    @property
    def smem_v_bytes(self) -> int:
        """One tile of V, or what each CTA of a cluster holds of it."""
        return tile_bytes(self.tile_n, self.v_columns, self.element_bytes)

    @property
    def key_bytes(self) -> int:
        """What K and V of one key take in global memory."""
        return (self.head_dim + self.head_dim_v) * self.element_bytes

    @property
    def has_long_last_tiles(self) -> bool:
        """Whether later rows see more keys."""
        return self.is_causal or self.has_window_right


def launch_registers(num_threads: int) -> int:
    """Registers that each thread of a CTA that has an SM alone can be launched with."""
    return REGISTERS_PER_SM // num_threads // 8 * 8


def changed_if_legal(plan: Plan, **changes: Any) -> Plan:
    """``plan`` with some fields changed, or as it is where that makes no legal plan."""
    try:
        return replace(plan, **changes)
    except InvalidArgumentError:
        return plan


@dataclass(frozen=True)
class TileRow:
    """A row of a tile table, for D and Dv up to ``max_dim`` and ``max_dim_v``."""

    max_dim: int
    max_dim_v: int


Row = TypeVar("Row", bound=TileRow)


def first_row_for(rung: str, table: Iterable[Row], variant: KernelVariant) -> Row:
    """The first row of a tile table that serves the two head dims.

    Raises:
        UnsupportedError: none does.
    """
    for row in table:
        if variant.head_dim <= row.max_dim and variant.head_dim_v <= row.max_dim_v:
            return row
    raise UnsupportedError(
        f"{rung} has no tile for these head dims",
        got=f"head dims {variant.head_dim} and {variant.head_dim_v}",
        expected=f"head dims up to {MAX_HEAD_DIM}",
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
