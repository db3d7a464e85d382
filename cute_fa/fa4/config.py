"""The plan of a FlashAttention-4 forward kernel: tiles, warp roles, registers, tensor memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar

from cute_fa.blocks.plan import (
    ANSWERS_SMEM_BYTES,
    MBARRIER_BYTES,
    TileRow,
    TmaForwardPlan,
    changed_if_legal,
    first_row_for,
    group_that_saves_tiles,
    launch_registers,
)
from cute_fa.blocks.tiles import WARP_THREADS, WARPGROUP_WARPS, round_up
from cute_fa.errors import UnsupportedError
from cute_fa.exp2 import CHUNK_COLUMNS, polynomial_pairs
from cute_fa.fa4.tmem_map import S_BUFFERS, TMEM_COLUMNS, TmemMap
from cute_fa.problem import AttentionProblem, KernelVariant, is_fp8
from cute_fa.target import Target
from cute_fa.varlen import VarlenProblem

STAT_BYTES = 4
TILE_M = 128
"""Rows of a Q tile: the M of every product, the lanes of tensor memory, the threads of a role."""

MAX_MMA_N = 256
MMA_K_BYTES = 32
MAX_STAGES = 8

# Registers per thread after setmaxnreg, (softmax, correction, others), by the number of Q tiles.
# They come out of what the CTA was launched with, 65536 by its threads, rounded down to a multiple
# of 8: 2·192 + 80 + 48 = 4·128 for 512 threads, 240 + 168 + 96 = 3·168 for 384.
REGISTERS = {2: (192, 80, 48), 1: (240, 168, 96)}

# P, not more than 2 to this power, by the bytes of an element: fp16 ends at 2¹⁶, e4m3 at 448.
MAX_P_EXPONENT = {2: 15.0, 1: 8.0}

RESCALE_THRESHOLD = 8.0
"""Of 16-bit inputs. P of e4m3 begins at 2⁸, which leaves none: O follows every new maximum."""

# Pairs of the 16 in a chunk of 32 scores whose exponentials the FMA pipe computes. The special
# function unit of sm_103a is twice as fast, so that nothing is left to share there.
POLYNOMIAL_PAIRS = {"sm_100a": 6, "sm_103a": 0}


class Fa4FwdBarrier(IntEnum):
    """Named barriers; 0 is sync_threads.

    SYNC_THREADS      all threads, once, after mbarriers and tensor memory are ready
    RESCALE + 4s + w  warp w of the softmax that owns S buffer s arrives (32), the correction warp
                      of the same rows waits (32): the rows' factors are in shared memory; in a pair
                      of CTAs both wait
    CORRECTION        the correction warps, before tensor memory is given back
    """

    SYNC_THREADS = 0
    RESCALE = 1
    CORRECTION = 9


@dataclass(frozen=True, kw_only=True)
class Fa4FwdConfig(TmaForwardPlan):
    """Everything that a FlashAttention-4 forward kernel is specialised for.

    Attributes:
        dtype … has_own_o: as in ``TmaForwardPlan``.
        num_q_tiles: Q tiles of 128 rows in flight in a CTA. With two, each has a softmax warpgroup
            and an S buffer; with one, the softmax warpgroup takes the two S buffers in turn.
        is_paired: two CTAs, a cluster, share every product (cta_group::2): each has a Q tile of its
            own, half of a block's keys for S = QKᵀ, and half of V's columns for O += PV.
        stages: depth of the ring that K and V blocks share.
        polynomial_pairs: of the 16 pairs in a chunk of 32 scores, those whose 2^x is a polynomial
            on the FMA pipe; half as many in the first and the last chunk of a block.
        rescale_threshold: O is rescaled when a row's maximum has grown by more than this, in log2
            units; P is at most 2 to the power of ``p_exponent`` and this.
        has_launch_control: CTAs ask for one row tile after another (``blocks.launch_control``).
    """

    rung: ClassVar[str] = "FA4"
    box_rows: ClassVar[int] = TILE_M

    num_q_tiles: int = 2
    is_paired: bool = False
    stages: int = 3
    polynomial_pairs: int = 6
    rescale_threshold: float = RESCALE_THRESHOLD
    has_launch_control: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require = self.require
        require(
            self.num_q_tiles in REGISTERS,
            "num_q_tiles",
            self.num_q_tiles,
            " or ".join(map(str, sorted(REGISTERS))),
        )
        require(
            2 * CHUNK_COLUMNS <= self.tile_n <= MAX_MMA_N and self.tile_n % CHUNK_COLUMNS == 0,
            "tile_n is not two chunks of scores or more, or too wide for one product",
            self.tile_n,
            f"a multiple of {CHUNK_COLUMNS} from {2 * CHUNK_COLUMNS} to {MAX_MMA_N}",
        )
        require(
            self.stages >= 3,
            "stages",
            self.stages,
            "at least 3: a block's K, the V before it, and one on its way",
        )
        require(
            not self.is_paired or self.num_q_tiles == 1,
            "is_paired and num_q_tiles",
            self.num_q_tiles,
            "1: each CTA of a pair has one Q tile",
        )
        pairs = CHUNK_COLUMNS // 2
        require(
            0 <= self.polynomial_pairs <= pairs,
            "polynomial_pairs",
            self.polynomial_pairs,
            f"0 to {pairs}, the pairs of a chunk",
        )
        largest = MAX_P_EXPONENT[self.element_bytes] - self.p_exponent
        require(
            0.0 <= self.rescale_threshold <= largest,
            "rescale_threshold",
            self.rescale_threshold,
            f"0 to {largest:g}: P of up to 2^{largest + self.p_exponent:g} is what its dtype holds",
        )
        self.require_whole_descales()
        require(
            not (self.is_persistent and self.has_launch_control),
            "two ways to more tiles",
            "is_persistent and has_launch_control",
            "one: further tiles are taken by number, or asked for",
        )
        require(
            self.tmem_map.columns_used <= TMEM_COLUMNS,
            "tensor memory",
            f"{self.tmem_map.arithmetic} = {self.tmem_map.columns_used} columns",
            f"at most {TMEM_COLUMNS} columns",
            fix="use a smaller tile_n, or one Q tile",
        )
        self.require_smem(
            self.smem_bytes,
            self._smem_arithmetic(),
            fix="use fewer stages, a smaller tile_n, or one Q tile",
        )

    # -- shapes

    @property
    def tile_m(self) -> int:
        """Rows of a tile: of a CTA, or of a pair."""
        return TILE_M * self.num_q_tiles * self.num_ctas

    @property
    def num_ctas(self) -> int:
        return 2 if self.is_paired else 1

    @property
    def padded_dv(self) -> int:
        """Columns of the V and O tiles; those of a pair's V are cut in two."""
        return round_up(self.head_dim_v, self.pad_columns * self.num_ctas)

    @property
    def has_o_gone(self) -> bool:
        """Whether CORRECTION has to be told that the last tile's O has left. In a CTA of its own, Q
        says so that has landed in the same place."""
        return self.is_resident and (self.has_own_o or self.is_paired)

    @property
    def has_q_landed(self) -> bool:
        """Whether CORRECTION, before it writes O over Q, has to be told that Q has landed: the
        mbarrier that knows is the leading CTA's."""
        return self.is_paired and not self.has_own_o

    @property
    def is_resident(self) -> bool:
        """Whether a CTA may take more than one row tile."""
        return self.is_persistent or self.has_launch_control

    @property
    def first_part_columns(self) -> int:
        """Columns of P that are handed over first: three quarters of the chunks.

        The product with them runs beside the exponentials of the rest.
        """
        chunks = self.tile_n // CHUNK_COLUMNS
        return 3 * chunks // 4 * CHUNK_COLUMNS

    def polynomial_pairs_of(self, chunk: int) -> tuple[int, ...]:
        """The pairs of chunk ``chunk`` of a row that the FMA pipe computes."""
        return polynomial_pairs(chunk, self.tile_n // CHUNK_COLUMNS, self.polynomial_pairs)

    # -- warp roles

    @property
    def num_softmax_warps(self) -> int:
        return WARPGROUP_WARPS * self.num_q_tiles

    @property
    def correction_warp(self) -> int:
        """First warp of CORRECTION; the softmax warpgroups come before it, from warp 0."""
        return self.num_softmax_warps

    @property
    def mma_warp(self) -> int:
        """The MMA warp; LOAD, EPILOGUE and SCHEDULER follow in the same warpgroup."""
        return self.correction_warp + WARPGROUP_WARPS

    @property
    def load_warp(self) -> int:
        return self.mma_warp + 1

    @property
    def epilogue_warp(self) -> int:
        return self.mma_warp + 2

    @property
    def scheduler_warp(self) -> int:
        """The last warp: SCHEDULER, or idle."""
        return self.mma_warp + 3

    @property
    def num_threads(self) -> int:
        return WARP_THREADS * (self.scheduler_warp + 1)

    @property
    def roles(self) -> dict[str, range]:
        """Warps of a CTA by role, in warp order."""
        last = "scheduler" if self.has_launch_control else "idle"
        softmax = {
            f"softmax{i}": range(WARPGROUP_WARPS * i, WARPGROUP_WARPS * (i + 1))
            for i in range(self.num_q_tiles)
        }
        return {
            **softmax,
            "correction": range(self.correction_warp, self.mma_warp),
            "mma": range(self.mma_warp, self.load_warp),
            "load": range(self.load_warp, self.epilogue_warp),
            "epilogue": range(self.epilogue_warp, self.scheduler_warp),
            last: range(self.scheduler_warp, self.scheduler_warp + 1),
        }

    # -- registers

    @property
    def launch_registers(self) -> int:
        """Per thread, before setmaxnreg; ptxas may use no more either."""
        return launch_registers(self.num_threads)

    @property
    def softmax_registers(self) -> int:
        """Per thread, after setmaxnreg.inc."""
        return REGISTERS[self.num_q_tiles][0]

    @property
    def correction_registers(self) -> int:
        """Per thread, after setmaxnreg.dec."""
        return REGISTERS[self.num_q_tiles][1]

    @property
    def other_registers(self) -> int:
        """Per thread of MMA, LOAD and EPILOGUE, after setmaxnreg.dec."""
        return REGISTERS[self.num_q_tiles][2]

    # -- tensor memory

    @property
    def tmem_map(self) -> TmemMap:
        return TmemMap(self.tile_n, self.padded_dv, self.num_q_tiles, self.element_bytes)

    # -- elements

    @property
    def mma_k(self) -> int:
        """k of one product's instruction."""
        return MMA_K_BYTES // self.element_bytes

    # -- shared memory

    @property
    def smem_stage_bytes(self) -> int:
        """One slot of the ring, which holds a block of K or of V, or a CTA's half."""
        return max(self.smem_k_bytes, self.smem_v_bytes)

    @property
    def num_mbarriers(self) -> int:
        """Per Q tile: its bytes, its O, its sums, its O in shared memory; of resident CTAs, also
        that its place is free, its sums are taken and (``has_o_gone``) its O is gone; of pairs
        whose O leaves from Q's place, that Q has landed.

        Per S buffer: S, and the two parts of P. Per stage: full and empty.
        """
        per_q_tile = 4
        if self.is_resident:
            per_q_tile += 2 + self.has_o_gone
        per_q_tile += self.has_q_landed
        return per_q_tile * self.num_q_tiles + 3 * S_BUFFERS + 2 * self.stages

    @property
    def smem_small_bytes(self) -> int:
        """Factors and sums of the rows, mbarriers, the address of tensor memory, answers."""
        stats = (S_BUFFERS + self.num_q_tiles) * TILE_M * STAT_BYTES
        stats += ANSWERS_SMEM_BYTES if self.has_launch_control else 0
        return stats + MBARRIER_BYTES * (self.num_mbarriers + 1)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        tiles = self.num_q_tiles * self.smem_q_and_o_bytes + self.stages * self.smem_stage_bytes
        return tiles + self.smem_small_bytes

    def _smem_arithmetic(self) -> str:
        columns = max(self.padded_d, self.padded_dv)
        half = " / 2" if self.is_paired else ""
        rows = self.tile_m // self.num_ctas
        return (
            f"{self.element_bytes}·({rows}·{self.q_and_o_columns} for Q and O + "
            f"{self.stages} stages · {self.tile_n}·{columns}{half} for K or V) + "
            f"{self.smem_small_bytes} for statistics and mbarriers"
        )


@dataclass(frozen=True)
class TileChoice(TileRow):
    """One row of the tile table."""

    num_q_tiles: int
    tile_n: int
    is_paired: bool = False

    @property
    def tile_m(self) -> int:
        return TILE_M * self.num_q_tiles * (2 if self.is_paired else 1)


# Two O tiles beside two S buffers of 128 columns leave 128 columns each. Q of 192 columns leaves
# shared memory for two blocks of 128 × 192 only: narrower ones make three slots. A wider O leaves
# tensor memory for one Q tile. For 128 rows alone, K and V would come from L2 at 64 bytes a cycle,
# and at 256 columns the tensor core would wait for shared memory: two CTAs share them.
_TILES = (
    TileChoice(128, 128, 2, 128),
    TileChoice(192, 128, 2, 96),
    TileChoice(256, 256, 1, 128, is_paired=True),
)

# Half the bytes: tensor memory alone decides. Where one Q tile is left, exponentials take longest.
_FP8_TILES = (
    TileChoice(256, 128, 2, 128),
    TileChoice(256, 256, 1, 128),
)


def tile_choice(variant: KernelVariant) -> TileChoice:
    """The row of the tile table for the two head dims."""
    tiles = _FP8_TILES if is_fp8(variant.dtype) else _TILES
    return first_row_for("FA4", tiles, variant)


def preferred_group(problem: AttentionProblem | VarlenProblem) -> int:
    """How many query heads of a K/V head had better share row tiles."""
    tile = tile_choice(problem.variant)
    return group_that_saves_tiles(problem, box_rows=TILE_M, tile_m=tile.tile_m)


def _with_most_stages(config: Fa4FwdConfig) -> Fa4FwdConfig:
    """``config`` with the deepest ring that fits, up to ``MAX_STAGES``."""
    stage = config.smem_stage_bytes + 2 * MBARRIER_BYTES
    more = (config.smem_limit_bytes - config.smem_bytes) // stage
    return replace(config, stages=min(config.stages + more, MAX_STAGES))


def pick_fwd(variant: KernelVariant, target: Target) -> Fa4FwdConfig:
    """The plan for ``variant`` on ``target``.

    CTAs are persistent where all tiles are equally long; else each takes one tile, the longest
    first, and the hardware gives the next to whoever is done.

    Raises:
        UnsupportedError: an architecture without tcgen05, no tile for the head dims, or heads that
            do not pack.
    """
    if not target.has_tcgen05:
        raise UnsupportedError(
            "FA4 needs tcgen05 and tensor memory",
            got=target.arch,
            expected="sm_100a or sm_103a",
            alternatives=("fa2", "fa1"),
        )
    Fa4FwdConfig.check_served(variant)
    tile = tile_choice(variant)
    config = Fa4FwdConfig.of(
        variant,
        target,
        num_q_tiles=tile.num_q_tiles,
        is_paired=tile.is_paired,
        tile_n=tile.tile_n,
        polynomial_pairs=POLYNOMIAL_PAIRS[target.arch],
        rescale_threshold=0.0 if is_fp8(variant.dtype) else RESCALE_THRESHOLD,
        is_persistent=not (variant.is_masked or variant.is_varlen),
    )
    if config.is_persistent:
        config = changed_if_legal(config, has_own_o=True)
    return _with_most_stages(config)
