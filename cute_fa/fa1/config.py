"""Tile sizes and legality of the FA1 forward kernel; plain Python, no DSL.

The paper (FlashAttention, Algorithm 1) sets Bc = ⌈M / 4d⌉ and Br = min(⌈M / 4d⌉, d) for an
on-chip memory of M elements: a quarter of it each for Q, K, V and O. `pick_fwd` starts from these
and says where the machine bends them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cute_fa.blocks.plan import ForwardPlan, Workspace
from cute_fa.blocks.tiles import (
    MMA_K,
    MMA_M,
    WARP_THREADS,
    panel_columns,
    round_up,
    rows_per_copy,
    tile_bytes,
)
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.problem import KernelVariant
from cute_fa.target import KIB, Target

ELEMENT_BYTES = 2
F32_BYTES = 4
PAD_COLUMNS = 32  # a panel of 32 columns is copied 32 rows at a time by 128 threads

# A thread holds tile_m · (tile_n / warps) / 32 fp32 scores, half of that again as packed P, and
# tile_m · tile_dv / 32 fp32 of its warp's partial O: these caps leave both at 64 registers.
MAX_SCORES_PER_THREAD = 64
MAX_PARTIAL_O_PER_THREAD = 64

MAX_TILE_N = 256


@dataclass(frozen=True, kw_only=True)
class Fa1FwdConfig(ForwardPlan):
    """One FA1 forward kernel.

    Attributes:
        dtype … smem_limit_bytes: as in ``ForwardPlan``.
        tile_m, tile_n: rows of Q (the paper's Br) and of K/V (Bc) per step.
        tile_dv: columns of O that the warps combine at a time; a multiple of 32.
        num_warps: each takes tile_n / num_warps columns of S and rows of V (sliced K).
    """

    rung: ClassVar[str] = "FA1"

    tile_m: int
    tile_n: int
    tile_dv: int
    num_warps: int = 4
    smem_limit_bytes: int = 163 * KIB

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tiles()
        self.require_smem(
            self.smem_bytes, self._smem_arithmetic(), fix="use a smaller tile_m or tile_n"
        )

    def _check_tiles(self) -> None:
        multiples = (
            # Q, K and V are copied in whole rounds of 16 bytes per thread.
            ("tile_m", self.tile_m, rows_per_copy(self.num_threads, self.padded_d)),
            ("tile_n", self.tile_n, rows_per_copy(self.num_threads, self.padded_d)),
            ("tile_n", self.tile_n, rows_per_copy(self.num_threads, self.padded_dv)),
            # A warp's slice of the keys is the n extent of S and the k extent of P V.
            ("tile_m", self.tile_m, MMA_M),
            ("tile_n", self.tile_n, self.num_warps * MMA_K),
            ("tile_dv", self.tile_dv, panel_columns(PAD_COLUMNS)),
            ("the padded head_dim_v", self.padded_dv, self.tile_dv),
            ("fp32 of O per update, four per thread,", self.num_threads * 4, self.tile_dv),
            ("tile_m", self.tile_m, self.update_rows),
        )
        for name, value, step in multiples:
            self.require(
                value >= step and value % step == 0,
                f"{name} does not tile",
                value,
                f"a positive multiple of {step}",
            )
        self.require(
            self.tile_m <= self.num_threads,
            "tile_m has more rows than threads that own their statistics",
            self.tile_m,
            f"at most {self.num_threads}",
        )
        scores = self.tile_m * self.slice_n // WARP_THREADS
        self.require(
            scores <= MAX_SCORES_PER_THREAD,
            "a warp's score slice does not fit into registers",
            f"tile_m {self.tile_m} × slice_n {self.slice_n} / 32 = {scores} per thread",
            f"at most {MAX_SCORES_PER_THREAD}",
            fix="use a smaller tile_m or tile_n",
        )
        partial = self.tile_m * self.tile_dv // WARP_THREADS
        self.require(
            partial <= MAX_PARTIAL_O_PER_THREAD,
            "a warp's partial O does not fit into registers",
            f"tile_m {self.tile_m} × tile_dv {self.tile_dv} / 32 = {partial} per thread",
            f"at most {MAX_PARTIAL_O_PER_THREAD}",
            fix="use a smaller tile_m or tile_dv",
        )

    # -- derived sizes

    @property
    def num_threads(self) -> int:
        return self.num_warps * WARP_THREADS

    @property
    def slice_n(self) -> int:
        """Columns of S, rows of V, that one warp takes."""
        return self.tile_n // self.num_warps

    @property
    def pad_columns(self) -> int:
        return PAD_COLUMNS

    @property
    def update_rows(self) -> int:
        """Rows of O that all threads update at once, four fp32 each."""
        return self.num_threads * 4 // self.tile_dv

    @property
    def partial_o_stride(self) -> int:
        """fp32 elements between rows of a warp's partial O in shared memory; the 8 of padding
        put the rows that one store touches into different banks."""
        return self.tile_dv + 8

    @property
    def _partial_o_elements(self) -> int:
        """(num_warps, tile_m, tile_dv) with that row stride; the last row needs no padding."""
        rows = self.num_warps * self.tile_m
        return (rows - 1) * self.partial_o_stride + self.tile_dv

    @property
    def smem_parts(self) -> dict[str, int]:
        """Bytes of each shared-memory array, in the order of the kernel's storage."""
        return {
            "Q": tile_bytes(self.tile_m, self.padded_d),
            "K": tile_bytes(self.tile_n, self.padded_d),
            "V": tile_bytes(self.tile_n, self.padded_dv),
            "partial O": self._partial_o_elements * F32_BYTES,
            "warp row max": self.num_warps * self.tile_m * F32_BYTES,
            "warp row sum": self.num_warps * self.tile_m * F32_BYTES,
            "scale of old O": self.tile_m * F32_BYTES,
            "scale of new O": self.tile_m * F32_BYTES,
        }

    @property
    def smem_bytes(self) -> int:
        return sum(self.smem_parts.values())

    def _smem_arithmetic(self) -> str:
        return " + ".join(f"{name} {size}" for name, size in self.smem_parts.items())

    def workspace(self, batch: int, seqlen_q: int, heads_q: int) -> tuple[Workspace, ...]:
        """O unrounded but normalised, m in log2 units and l, as the outer loop leaves them."""
        outer = () if self.is_varlen else (batch,)
        stats = (*outer, heads_q, seqlen_q)
        return (
            Workspace("o_accum", (*outer, seqlen_q, heads_q, self.head_dim_v), "float32"),
            Workspace("row_max", stats, "float32"),
            Workspace("row_sum", stats, "float32"),
        )


def paper_tiles(head_dim: int, smem_bytes: int) -> tuple[int, int]:
    """(Br, Bc) of Algorithm 1, line 1, for 2-byte elements."""
    elements = smem_bytes // ELEMENT_BYTES
    bc = -(-elements // (4 * head_dim))
    return min(bc, head_dim), bc


def pick_fwd(variant: KernelVariant, target: Target) -> Fa1FwdConfig:
    """The FA1 kernel for a variant on a target.

    From the paper's (Br, Bc) with d the larger padded head dim:
    tile_n is Bc rounded down to a multiple of 64 (16 columns for each of 4 warps), from 64 to 256;
    tile_m is Br rounded down so that scores and partial O stay in registers. Where Q, K, V and the
    warps' fp32 partial O (four times the paper's O) exceed shared memory, tile_m gives way first:
    it decides nothing about HBM traffic, tile_n does.

    Raises:
        UnsupportedError: dtype or head dims that FA1 does not serve.
    """
    Fa1FwdConfig.check_served(variant)
    dim = round_up(max(variant.head_dim, variant.head_dim_v), PAD_COLUMNS)
    br, bc = paper_tiles(dim, target.smem_per_block_bytes)
    largest_n = min(max(64, bc // 64 * 64), MAX_TILE_N)
    candidates = (
        (tile_m, tile_n, tile_dv)
        for tile_n in range(largest_n, 0, -64)
        for tile_m in (64, 32, 16)
        for tile_dv in (64, 32)
        if tile_m <= max(br, 32)
    )
    for tile_m, tile_n, tile_dv in candidates:
        tiles = {"tile_m": tile_m, "tile_n": tile_n, "tile_dv": tile_dv}
        try:
            return Fa1FwdConfig.of(variant, target, **tiles)
        except InvalidArgumentError:
            continue
    raise UnsupportedError(
        "no FA1 tile fits this target",
        got=f"head_dim {variant.head_dim}, head_dim_v {variant.head_dim_v} on {target.arch}",
        expected=f"tiles within {target.smem_per_block_bytes} bytes of shared memory",
    )
