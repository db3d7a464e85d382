"""The plan of a FlashAttention-3 forward kernel: tiles, warpgroups, registers, rings, barriers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from cute_fa.blocks.plan import (
    MBARRIER_BYTES,
    TileRow,
    TmaForwardPlan,
    changed_if_legal,
    first_row_for,
    group_that_saves_tiles,
)
from cute_fa.blocks.tiles import WARPGROUP_THREADS, WARPGROUP_WARPS, panel_columns
from cute_fa.errors import UnsupportedError
from cute_fa.problem import AttentionProblem, KernelVariant, is_fp8
from cute_fa.target import Target
from cute_fa.varlen import VarlenProblem

STRIP_ROWS = 64
"""Query rows of one consumer warpgroup: the M of every wgmma (PTX ISA, wgmma.mma_async)."""

WGMMA_K_BYTES = 32
MAX_WGMMA_N = 256
TRANSPOSE_WARPS = 2

# Registers per thread after setmaxnreg, (producer, consumer), by the number of consumers. They come
# out of what the CTA was launched with, 65536 by its threads, rounded down to a multiple of 8:
# 24 + 2·240 = 3·168 for 384 threads, 32 + 3·160 = 4·128 for 512.
REGISTERS = {2: (24, 240), 3: (32, 160)}
# Transposing V takes more than 24: 40 + 2·232 = 3·168.
FP8_REGISTERS = {2: (40, 232), 3: (32, 160)}


class Fa3FwdBarrier(IntEnum):
    """Named barriers; 0 is sync_threads. Each of the last two has one barrier per warpgroup.

    SYNC_THREADS    all threads, once, after the mbarriers are initialised
    TURN + w        consumer w waits (128), the consumer before it in the cycle arrives (128)
    STRIP + w       the threads of consumer w, around generic writes to its strips of Q and O
    """

    SYNC_THREADS = 0
    TURN = 1
    STRIP = 4


@dataclass(frozen=True, kw_only=True)
class Fa3FwdConfig(TmaForwardPlan):
    """Everything that a FlashAttention-3 forward kernel is specialised for.

    Attributes:
        dtype … has_own_o: as in ``TmaForwardPlan``.
        num_consumers: consumer warpgroups, 64 query rows each.
        stages: depth of the K ring and of the V ring.
        has_turns: consumers take turns at issuing GEMMs, so that one's softmax runs beside
            another's products (paper, section 3.1).
        is_paired: two CTAs, a cluster, take half of a row tile each and share its K and V: each
            loads half the columns of every block for both (multicast).
    """

    rung: ClassVar[str] = "FA3"
    box_rows: ClassVar[int] = STRIP_ROWS

    num_consumers: int = 2
    stages: int = 2
    has_turns: bool = True
    is_paired: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require = self.require
        require(
            self.num_consumers in REGISTERS,
            "num_consumers",
            self.num_consumers,
            f"one of {', '.join(map(str, REGISTERS))} warpgroups",
        )
        require(
            0 < self.tile_n <= MAX_WGMMA_N and self.tile_n % self.wgmma_k == 0,
            "tile_n is not one wgmma's N and whole k-steps of O += PV",
            self.tile_n,
            f"a multiple of {self.wgmma_k} up to {MAX_WGMMA_N}",
        )
        self.require_whole_descales()
        require(
            self.stages >= 2,
            "stages",
            self.stages,
            "at least 2: a block's V is awaited while the product with the V before it runs",
        )
        require(
            self.fragment_registers <= self.consumer_registers,
            "registers of a consumer thread",
            f"{self._register_arithmetic()} = {self.fragment_registers}",
            f"at most {self.consumer_registers}",
            fix="use a smaller tile_n, or fewer consumers",
        )
        panels = [columns // panel_columns(columns) for columns in (self.panel_d, self.panel_dv)]
        require(
            not self.is_paired or all(count % self.num_ctas == 0 for count in panels),
            "panels of K and of V, which a pair of CTAs shares",
            f"{panels[0]} and {panels[1]}",
            "even numbers, half for each CTA to load",
            fix="use is_paired=False",
        )
        self.require_smem(
            self.smem_bytes, self._smem_arithmetic(), fix="use fewer stages, or smaller tiles"
        )

    # -- shapes

    @property
    def wgmma_k(self) -> int:
        """Keys of one k-step of O += PV."""
        return WGMMA_K_BYTES // self.element_bytes

    @property
    def cta_rows(self) -> int:
        """Query rows of a CTA: a strip of 64 per consumer."""
        return STRIP_ROWS * self.num_consumers

    @property
    def tile_m(self) -> int:
        """Query rows of a tile: of a CTA, or of a pair."""
        return self.cta_rows * self.num_ctas

    @property
    def num_ctas(self) -> int:
        return 2 if self.is_paired else 1

    @property
    def has_multicast(self) -> bool:
        return self.is_paired

    @property
    def k_rows(self) -> int:
        return self.tile_n

    @property
    def v_columns(self) -> int:
        return self.padded_dv

    @property
    def num_threads(self) -> int:
        """One producer warpgroup, of which one warp works, and the consumers."""
        return WARPGROUP_THREADS * (1 + self.num_consumers)

    @property
    def num_consumer_warps(self) -> int:
        return WARPGROUP_WARPS * self.num_consumers

    @property
    def roles(self) -> dict[str, range]:
        """Warps of a CTA by role, in warp order."""
        consumers = {
            f"consumer{w}": range(WARPGROUP_WARPS * (w + 1), WARPGROUP_WARPS * (w + 2))
            for w in range(self.num_consumers)
        }
        others = {"idle": range(1, WARPGROUP_WARPS)}
        if self.is_fp8:
            others = {
                "transpose": range(1, 1 + TRANSPOSE_WARPS),
                "idle": range(1 + TRANSPOSE_WARPS, WARPGROUP_WARPS),
            }
        return {"load": range(1), **others, **consumers}

    # -- registers

    @property
    def producer_registers(self) -> int:
        """Per thread, after setmaxnreg.dec."""
        return self._registers[0]

    @property
    def consumer_registers(self) -> int:
        """Per thread, after setmaxnreg.inc."""
        return self._registers[1]

    @property
    def _registers(self) -> tuple[int, int]:
        return (FP8_REGISTERS if self.is_fp8 else REGISTERS)[self.num_consumers]

    @property
    def fragment_registers(self) -> int:
        """What S (fp32), P (as Q) and O (fp32) take of a thread at the height of the overlap."""
        per_row = STRIP_ROWS / WARPGROUP_THREADS
        columns = self.tile_n + self.tile_n * self.element_bytes // 4 + self.padded_dv
        return int(per_row * columns)

    def _register_arithmetic(self) -> str:
        p = 8 // self.element_bytes
        return f"S {self.tile_n}/2 + P {self.tile_n}/{p} + O {self.padded_dv}/2"

    # -- shared memory

    @property
    def v_copies(self) -> int:
        """Rings that hold V: as it came, and transposed."""
        return 2 if self.is_fp8 else 1

    @property
    def num_mbarriers(self) -> int:
        """A full one per strip of Q and per stage of K, of V and of Vᵀ; an empty one for what is
        used again, as Q's strips are by persistent CTAs."""
        rings = 3 if self.is_fp8 else 2
        return (2 if self.is_persistent else 1) * self.num_consumers + 2 * rings * self.stages

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA: the tiles, then the mbarriers."""
        tiles = self.num_consumers * self.smem_q_and_o_bytes
        tiles += self.stages * (self.smem_k_bytes + self.v_copies * self.smem_v_bytes)
        return tiles + MBARRIER_BYTES * self.num_mbarriers

    def _smem_arithmetic(self) -> str:
        values = f"{self.v_copies}·{self.padded_dv}" if self.is_fp8 else f"{self.padded_dv}"
        return (
            f"{self.element_bytes}·({self.cta_rows}·{self.q_and_o_columns} for Q and O + "
            f"{self.stages} stages · "
            f"{self.tile_n}·({self.padded_d} + {values}) for K and V) + "
            f"{MBARRIER_BYTES}·{self.num_mbarriers} for mbarriers"
        )


@dataclass(frozen=True)
class TileChoice(TileRow):
    """One row of the tile table.

    ``tile_n`` serves problems without a mask; the columns that a mask cuts off a tile are computed
    for nothing, so causal and windowed ones take ``tile_n_masked``.
    """

    num_consumers: int
    tile_n: int
    tile_n_masked: int

    @property
    def tile_m(self) -> int:
        return STRIP_ROWS * self.num_consumers


# Two consumers of 240 registers hold S, P and O up to Dv = 256; up to 64 columns of O, three of 160
# do, and share each K/V block among more rows. tile_n is as wide as registers (first two rows) or
# two stages of K and V beside Q (the others) allow; masked tiles are no wider than tall.
_TILES = (
    TileChoice(64, 64, 3, 128, 128),
    TileChoice(96, 96, 2, 160, 128),
    TileChoice(128, 128, 2, 176, 128),
    TileChoice(192, 128, 2, 128, 128),
    TileChoice(192, 192, 2, 112, 112),
    TileChoice(256, 256, 2, 80, 80),
)

# Half the bytes, but a third ring, for V transposed; P in half the registers, so that tiles may be
# wider. Masked tiles also serve descales of blocks, whose 128 rows they divide.
_FP8_TILES = (
    TileChoice(64, 64, 3, 160, 128),
    TileChoice(128, 128, 2, 192, 128),
    TileChoice(192, 192, 2, 128, 128),
    TileChoice(256, 256, 2, 96, 64),
)

# The tanh of a softcap keeps more values alive than 160 registers have room for.
_SOFTCAP_64 = TileChoice(64, 64, 2, 128, 128)


def tile_choice(variant: KernelVariant) -> TileChoice:
    """The row of the tile table for the two head dims."""
    tiles = _FP8_TILES if is_fp8(variant.dtype) else _TILES
    if variant.has_softcap:
        tiles = (_SOFTCAP_64, *tiles)
    return first_row_for("FA3", tiles, variant)


def pick_fwd(variant: KernelVariant, target: Target) -> Fa3FwdConfig:
    """The plan for ``variant`` on ``target``.

    CTAs are persistent: their next tile's loads overlap the end of this one's. See the README's
    section on schedules.

    Raises:
        UnsupportedError: an architecture without wgmma, no tile for the head dims, or heads that do
            not pack.
    """
    if not target.has_wgmma:
        raise UnsupportedError(
            "FA3 needs wgmma",
            got=target.arch,
            expected="sm_90a",
            alternatives=("fa2", "fa1"),
        )
    Fa3FwdConfig.check_served(variant)
    tile = tile_choice(variant)
    is_narrow = variant.is_masked or variant.has_block_descales
    config = Fa3FwdConfig.of(
        variant,
        target,
        num_consumers=tile.num_consumers,
        tile_n=tile.tile_n_masked if is_narrow else tile.tile_n,
        is_persistent=True,
    )
    return changed_if_legal(config, has_own_o=True)


def preferred_group(problem: AttentionProblem | VarlenProblem) -> int:
    """How many query heads of a K/V head had better share row tiles."""
    tile = tile_choice(problem.variant)
    return group_that_saves_tiles(problem, box_rows=STRIP_ROWS, tile_m=tile.tile_m)
