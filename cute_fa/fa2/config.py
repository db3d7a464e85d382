"""The plan of a FlashAttention-2 forward kernel: tiles, threads, ring depth, and their legality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.blocks.plan import ForwardPlan
from cute_fa.blocks.tiles import (
    MMA_K,
    MMA_M,
    WARP_THREADS,
    panel_columns,
    rows_per_copy,
    tile_bytes,
)
from cute_fa.errors import UnsupportedError
from cute_fa.problem import MAX_HEAD_DIM, KernelVariant
from cute_fa.target import KIB, Target


@dataclass(frozen=True, kw_only=True)
class Fa2FwdConfig(ForwardPlan):
    """Everything that a FlashAttention-2 forward kernel is specialised for.

    Attributes:
        dtype … smem_limit_bytes: as in ``ForwardPlan``.
        tile_m, tile_n: query rows and key columns of a tile.
        num_threads: a warp per 16·k query rows.
        stages: depth of the K ring and of the V ring.
    """

    rung: ClassVar[str] = "FA2"

    tile_m: int = 128
    tile_n: int = 64
    num_threads: int = 128
    stages: int = 1
    smem_limit_bytes: int = 99 * KIB

    def __post_init__(self) -> None:
        super().__post_init__()
        require = self.require
        warps = self.num_threads // WARP_THREADS
        require(
            self.num_threads % WARP_THREADS == 0 and 1 <= warps <= 8,
            "num_threads",
            self.num_threads,
            "1 to 8 whole warps",
        )
        require(
            self.tile_m > 0 and self.tile_m % (MMA_M * warps) == 0,
            "tile_m is not split evenly over the warps",
            f"tile_m {self.tile_m} with {warps} warps",
            f"a multiple of {MMA_M} rows · {warps} warps = {MMA_M * warps}",
        )
        require(
            self.tile_n > 0 and self.tile_n % MMA_K == 0,
            "tile_n is not a whole number of k-steps of O += PV",
            self.tile_n,
            f"a multiple of {MMA_K}",
        )
        require(self.stages >= 1, "stages", self.stages, "at least 1")
        for name, columns in (("D", self.padded_d), ("Dv", self.padded_dv)):
            rows = rows_per_copy(self.num_threads, columns)
            for tile, value in (("tile_m", self.tile_m), ("tile_n", self.tile_n)):
                require(
                    value % rows == 0,
                    f"{tile} is not a whole number of copies",
                    f"{tile} {value}; {name} padded to {columns} goes in panels of "
                    f"{panel_columns(columns)} columns, so {self.num_threads} threads copy "
                    f"{rows} rows at a time",
                    f"a multiple of {rows}",
                )
        self.require_smem(
            self.smem_bytes, self._smem_arithmetic(), fix="use fewer stages, or smaller tiles"
        )

    @property
    def pad_columns(self) -> int:
        """What the head dims are padded to a multiple of: the mma's k of 16, or 32 above 64.

        Wider tiles have fewer rows, or are loaded by more threads, than a 16-column panel can be
        split over evenly.
        """
        return MMA_K if max(self.head_dim, self.head_dim_v) <= 64 else 2 * MMA_K

    @property
    def num_warps(self) -> int:
        return self.num_threads // WARP_THREADS

    @property
    def rows_per_thread(self) -> int:
        """Query rows whose statistics a thread holds: two per 16-row block of its warp."""
        return 2 * self.tile_m // (MMA_M * self.num_warps)

    @property
    def smem_q_bytes(self) -> int:
        """The Q tile, which O reuses on its way out."""
        columns = max(self.padded_d, self.padded_dv)
        return tile_bytes(self.tile_m, columns, self.element_bytes)

    @property
    def smem_k_bytes(self) -> int:
        """One stage of K."""
        return tile_bytes(self.tile_n, self.padded_d, self.element_bytes)

    @property
    def smem_v_bytes(self) -> int:
        """One stage of V."""
        return tile_bytes(self.tile_n, self.padded_dv, self.element_bytes)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.smem_q_bytes + self.stages * (self.smem_k_bytes + self.smem_v_bytes)

    @property
    def warp_row_span(self) -> int:
        """Rows from a warp's first to one past its last; other warps' rows lie between."""
        return self.tile_m - MMA_M * (self.num_warps - 1)

    def _smem_arithmetic(self) -> str:
        q_columns = max(self.padded_d, self.padded_dv)
        return (
            f"{self.element_bytes}·({self.tile_m}·{q_columns} for Q and O + {self.stages} stages · "
            f"{self.tile_n}·({self.padded_d} + {self.padded_dv}) for K and V)"
        )


@dataclass(frozen=True)
class TileChoice:
    """One row of the tile table: the plan for head dims up to ``max_dim``."""

    max_dim: int
    tile_m: int
    tile_n: int
    num_warps: int
    stages: int


# Up to 64 columns, and to 128 where registers allow, four warps take 32 rows each: every ldmatrix
# of K or V then feeds four mma, and two CTAs share an SM. Else a warp takes 16 rows. tile_n is what
# the 255 registers of a thread leave for S beside O without a spill under any mask; the rings are
# as deep as two CTAs per SM allow (one CTA of eight warps).
_TILES: dict[str, tuple[TileChoice, ...]] = {
    "99 KiB": (
        TileChoice(64, 128, 64, 4, 2),
        TileChoice(128, 64, 64, 4, 1),
        TileChoice(192, 128, 64, 8, 1),
        TileChoice(256, 64, 64, 4, 1),
    ),
    "163 KiB": (
        TileChoice(64, 128, 64, 4, 2),
        TileChoice(96, 128, 64, 4, 2),
        TileChoice(128, 128, 32, 4, 2),
        TileChoice(192, 128, 64, 8, 2),
        TileChoice(256, 128, 64, 8, 1),
    ),
    "227 KiB": (
        TileChoice(64, 128, 64, 4, 2),
        TileChoice(128, 128, 64, 8, 2),
        TileChoice(192, 128, 64, 8, 2),
        TileChoice(256, 128, 64, 8, 2),
    ),
}

# A softcap's tanh and a window's two edges keep more values alive than a thread with four rows has
# registers for beside more than 64 columns of O.
_SIXTEEN_ROW_TILE = TileChoice(128, 128, 64, 8, 2)
_SIXTEEN_ROW_MIN_DIM = 65


def tile_choice(variant: KernelVariant, target: Target) -> TileChoice:
    """The row of the tile table for the larger of the two head dims on ``target``."""
    widest = max(variant.head_dim, variant.head_dim_v)
    fitting = [name for name in _TILES if int(name.split()[0]) * KIB <= target.smem_per_block_bytes]
    if not fitting or widest > MAX_HEAD_DIM:
        raise UnsupportedError(
            "FA2 has no tile for this head dim and architecture",
            got=f"head dims {variant.head_dim} and {variant.head_dim_v} on {target.arch} with "
            f"{target.smem_per_block_bytes} bytes of shared memory per block",
            expected=f"head dims up to {MAX_HEAD_DIM}, and at least 99 KiB",
            alternatives=("sm_80",),
        )
    is_heavy = variant.has_softcap or variant.has_window_left or variant.has_window_right
    if is_heavy and _SIXTEEN_ROW_MIN_DIM <= widest <= _SIXTEEN_ROW_TILE.max_dim:
        return _SIXTEEN_ROW_TILE
    return next(choice for choice in _TILES[fitting[-1]] if widest <= choice.max_dim)


def pick_fwd(variant: KernelVariant, target: Target) -> Fa2FwdConfig:
    """The plan for ``variant`` on ``target``.

    Raises:
        UnsupportedError: a dtype other than fp16 and bf16, or no tile for the head dims.
    """
    Fa2FwdConfig.check_served(variant)
    tile = tile_choice(variant, target)
    return Fa2FwdConfig.of(
        variant,
        target,
        tile_m=tile.tile_m,
        tile_n=tile.tile_n,
        num_threads=tile.num_warps * WARP_THREADS,
        stages=tile.stages,
    )
