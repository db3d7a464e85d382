"""The plan of a FlashAttention-4 forward kernel: tiles, warp roles, registers, tensor memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from cute_fa.blocks.plan import (
    ANSWERS_SMEM_BYTES,
    check_plan,
    check_served,
    group_that_saves_tiles,
    requirements,
)
from cute_fa.blocks.tiles import WARP_THREADS, round_up, tile_bytes
from cute_fa.errors import InvalidArgumentError, UnsupportedError
from cute_fa.exp2 import CHUNK_COLUMNS, polynomial_pairs
from cute_fa.problem import DTYPE_BYTES, MAX_HEAD_DIM, AttentionProblem, KernelVariant, out_dtype
from cute_fa.target import KIB, Target
from cute_fa.varlen import VarlenProblem

DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
STAT_BYTES = 4
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_THREADS
TILE_M = 128
"""Rows of a Q tile: the M of every product, the lanes of tensor memory, the threads of a role."""

MAX_MMA_N = 256
MMA_K_BYTES = 32
PAD_COLUMNS = 32
PANEL_ELEMENT_BYTES = 2
"""What swizzled panels are made of (``blocks.tiles``): 16-bit numbers, or pairs of e4m3 numbers."""

DESCALE_ROWS = 128
TMEM_COLUMNS = 512
"""Columns of tensor memory, 32 bits wide in each of 128 lanes (PTX ISA, "Tensor Memory")."""

MIN_TMEM_COLUMNS = 32
COLUMN_BYTES = 4
S_BUFFERS = 2
MBARRIER_BYTES = 8
SMEM_ALIGN_BYTES = 1024
"""Where a 128-byte swizzle pattern repeats; every tile starts on it."""

REGISTERS_PER_SM = 65536
MAX_STAGES = 8

# Registers per thread after setmaxnreg, (softmax, correction, others), by the number of Q tiles.
# They come out of what the CTA was launched with, 65536 by its threads, rounded down to a multiple
# of 8: 2·192 + 80 + 48 = 4·128 for 512 threads, 240 + 168 + 96 = 3·168 for 384.
REGISTERS = {2: (192, 80, 48), 1: (240, 168, 96)}

# P, not more than 2 to this power, by the bytes of an element: fp16 ends at 2¹⁶, e4m3 at 448.
MAX_P_EXPONENT = {2: 15.0, 1: 8.0}

RESCALE_THRESHOLD = 8.0
"""Of 16-bit inputs. P of e4m3 begins at 2⁸, which leaves none: O follows every new maximum."""

FP8_P_EXPONENT = 8.0
"""P of a row's largest score, in log2 units: e4m3 has no numbers below 2⁻⁹ (``blocks.fp8``)."""

# Pairs of the 16 in a chunk of 32 scores whose exponentials the FMA pipe computes. The special
# function unit of sm_103a is twice as fast, so that nothing is left to share there.
POLYNOMIAL_PAIRS = {"sm_100a": 4, "sm_103a": 0}


class Fa4FwdBarrier(IntEnum):
    """Named barriers; 0 is sync_threads.

    SYNC_THREADS      all threads, once, after mbarriers and tensor memory are ready
    RESCALE + 4s + w  warp w of the softmax that owns S buffer s arrives (32), the correction warp
                      of the same rows waits (32): the rows' factors are in shared memory
    CORRECTION        the correction warps, before tensor memory is given back
    """

    SYNC_THREADS = 0
    RESCALE = 1
    CORRECTION = 9


@dataclass(frozen=True)
class Fa4FwdConfig:
    """Everything that a FlashAttention-4 forward kernel is specialised for.

    Attributes:
        dtype: of Q, K and V: "float16", "bfloat16", or "float8_e4m3fn" with O in bfloat16.
        head_dim, head_dim_v: D and Dv, multiples of 8, in fp8 of 16, up to 256; padded in shared
            memory only, with zeros that TMA writes for columns outside the tensor.
        is_causal: bottom-right aligned causal mask.
        has_window_left, has_window_right: run-time window bounds.
        has_softcap: scores pass through softcap·tanh(·/softcap).
        is_varlen, has_seqused_q, has_seqused_k: packed sequences, and whether only the first rows
            of each count.
        packed_group: query heads of a K/V head that share a row tile (``blocks.pack_gqa``).
        has_block_descales: every 128 rows of fp8 inputs have a descale of their own.
        num_q_tiles: Q tiles of 128 rows in flight. With two, each has a softmax warpgroup and an S
            buffer; with one, the softmax warpgroup takes the two S buffers in turn.
        tile_n: key columns of a block.
        stages: depth of the ring that K and V blocks share.
        polynomial_pairs: of the 16 pairs in a chunk of 32 scores, those whose 2^x is a polynomial
            on the FMA pipe; the last chunk of a block has none, for nothing hides its latency.
        rescale_threshold: O is rescaled when a row's maximum has grown by more than this, in log2
            units; P is at most 2 to this power.
        is_persistent: CTAs take one row tile after another (``blocks.tile_scheduler``).
        has_launch_control: CTAs ask for one row tile after another (``blocks.launch_control``).
        has_own_o: O has a place of its own in shared memory, so that Q of the next tile can land
            while O is finished and leaves; else it leaves from Q's.
        smem_limit_bytes: what a CTA of the target may use.
    """

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
    packed_group: int = 1
    has_block_descales: bool = False
    num_q_tiles: int = 2
    tile_n: int = 128
    stages: int = 3
    polynomial_pairs: int = 4
    rescale_threshold: float = RESCALE_THRESHOLD
    is_persistent: bool = False
    has_launch_control: bool = False
    has_own_o: bool = False
    smem_limit_bytes: int = 227 * KIB

    def __post_init__(self) -> None:
        require = requirements("FA4")
        check_plan(self, require, DTYPES)
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
        require(
            not self.has_block_descales or (self.is_fp8 and DESCALE_ROWS % self.tile_n == 0),
            "tile_n does not divide the keys of a descale",
            self.tile_n,
            f"a divisor of {DESCALE_ROWS}, and fp8 inputs",
        )
        require(
            not (self.is_persistent and self.has_launch_control),
            "two ways to more tiles",
            "is_persistent and has_launch_control",
            "one: further tiles are taken by number, or asked for",
        )
        require(
            self.packed_group > 0 and TILE_M % self.packed_group == 0,
            "packed_group",
            self.packed_group,
            f"a divisor of {TILE_M}, the rows of one TMA box of Q",
            fix="use packed_group=1: every query head gets row tiles of its own",
        )
        require(
            self.tmem_columns_used <= TMEM_COLUMNS,
            "tensor memory",
            f"{self._tmem_arithmetic()} = {self.tmem_columns_used} columns",
            f"at most {TMEM_COLUMNS} columns",
            fix="use a smaller tile_n, or one Q tile",
        )
        require(
            self.smem_bytes <= self.smem_limit_bytes,
            "shared memory",
            f"{self._smem_arithmetic()} = {self.smem_bytes} bytes",
            f"at most {self.smem_limit_bytes} bytes",
            fix="use fewer stages, a smaller tile_n, or one Q tile",
        )

    # -- shapes

    @property
    def padded_d(self) -> int:
        """Columns of the Q and K tiles."""
        return round_up(self.head_dim, PAD_COLUMNS)

    @property
    def padded_dv(self) -> int:
        """Columns of the V and O tiles."""
        return round_up(self.head_dim_v, PAD_COLUMNS)

    @property
    def panel_d(self) -> int:
        """``padded_d`` in elements of 16 bits."""
        return self.padded_d * self.element_bytes // PANEL_ELEMENT_BYTES

    @property
    def panel_dv(self) -> int:
        """``padded_dv`` of the V tiles in elements of 16 bits."""
        return self.padded_dv * self.element_bytes // PANEL_ELEMENT_BYTES

    @property
    def tile_m(self) -> int:
        """Rows of a CTA's tile."""
        return TILE_M * self.num_q_tiles

    @property
    def tile_queries(self) -> int:
        """Queries of a CTA's tile: packed, each is ``packed_group`` rows."""
        return self.tile_m // self.packed_group

    @property
    def has_long_last_tiles(self) -> bool:
        """Whether later rows see more keys."""
        return self.is_causal or self.has_window_right

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
        return REGISTERS_PER_SM // self.num_threads // 8 * 8

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

    # -- tensor memory, in columns

    @property
    def tmem_s(self) -> tuple[int, int]:
        """First column of each S buffer (fp32, tile_n columns)."""
        return (0, self.tile_n)

    @property
    def tmem_p_columns(self) -> int:
        """Columns of P: two of its elements share one, in fp8 four."""
        return self.tile_n * self.element_bytes // COLUMN_BYTES

    @property
    def tmem_p(self) -> tuple[int, int]:
        """First column of P, at the end of its S buffer.

        A thread has its whole row of S in registers before it writes the first of P over it.
        """
        first = self.tile_n - self.tmem_p_columns
        return (first, self.tile_n + first)

    @property
    def tmem_o(self) -> tuple[int, ...]:
        """First column of each Q tile's O (fp32, padded_dv columns)."""
        return tuple(S_BUFFERS * self.tile_n + i * self.padded_dv for i in range(self.num_q_tiles))

    @property
    def tmem_columns_used(self) -> int:
        return S_BUFFERS * self.tile_n + self.num_q_tiles * self.padded_dv

    @property
    def tmem_columns(self) -> int:
        """Columns to allocate: a power of two (PTX ISA, tcgen05.alloc)."""
        return max(1 << (self.tmem_columns_used - 1).bit_length(), MIN_TMEM_COLUMNS)

    def _tmem_arithmetic(self) -> str:
        return (
            f"{S_BUFFERS} S buffers · {self.tile_n} + {self.num_q_tiles} Q tiles · "
            f"{self.padded_dv} for O"
        )

    # -- elements

    @property
    def element_bytes(self) -> int:
        """Of Q, K, V and P."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_fp8(self) -> bool:
        """Whether tiles hold bytes, and there are descales."""
        return self.element_bytes == 1

    @property
    def out_dtype(self) -> str:
        """Of O."""
        return out_dtype(self.dtype)

    @property
    def out_bytes(self) -> int:
        """Of an element of O."""
        return DTYPE_BYTES[self.out_dtype]

    @property
    def mma_k(self) -> int:
        """k of one product's instruction."""
        return MMA_K_BYTES // self.element_bytes

    @property
    def p_exponent(self) -> float:
        """P of a row's largest score is 2 to this power, and up to rescale_threshold more."""
        return FP8_P_EXPONENT if self.is_fp8 else 0.0

    # -- shared memory

    @property
    def smem_q_bytes(self) -> int:
        """One Q tile: what its mbarrier waits for."""
        return tile_bytes(TILE_M, self.padded_d, self.element_bytes)

    @property
    def smem_o_bytes(self) -> int:
        """One O tile."""
        return tile_bytes(TILE_M, self.padded_dv, self.out_bytes)

    @property
    def smem_q_place_bytes(self) -> int:
        """From one Q tile to the next; each place holds that tile's O at the end, unless O has
        places of its own."""
        if self.has_own_o:
            return self.smem_q_bytes
        return max(self.smem_q_bytes, self.smem_o_bytes)

    @property
    def smem_k_bytes(self) -> int:
        """One block of K."""
        return tile_bytes(self.tile_n, self.padded_d, self.element_bytes)

    @property
    def smem_v_bytes(self) -> int:
        """One block of V."""
        return tile_bytes(self.tile_n, self.padded_dv, self.element_bytes)

    @property
    def smem_stage_bytes(self) -> int:
        """One slot of the ring, which holds a block of K or of V."""
        return max(self.smem_k_bytes, self.smem_v_bytes)

    @property
    def num_mbarriers(self) -> int:
        """Per Q tile: its bytes, its O, its sums, its O in shared memory; of resident CTAs, also
        that its place is free, its sums are taken and, from a place of its own, its O is gone.

        Per S buffer: S, and the two parts of P. Per stage: full and empty.
        """
        per_q_tile = 4
        if self.is_resident:
            per_q_tile += 3 if self.has_own_o else 2
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
        place = self.smem_q_place_bytes + (self.smem_o_bytes if self.has_own_o else 0)
        tiles = self.num_q_tiles * place + self.stages * self.smem_stage_bytes
        return tiles + self.smem_small_bytes

    def _smem_arithmetic(self) -> str:
        columns = max(self.padded_d, self.padded_dv)
        # O in elements of Q's size.
        o = self.padded_dv * self.out_bytes // self.element_bytes
        places = f"({self.padded_d} + {o})" if self.has_own_o else max(self.padded_d, o)
        return (
            f"{self.element_bytes}·({self.tile_m}·{places} for Q and O + {self.stages} stages · "
            f"{self.tile_n}·{columns} for K or V) + {self.smem_small_bytes} for statistics and "
            f"mbarriers"
        )

    def workspace(self, batch: int, seqlen_q: int, heads_q: int) -> tuple:
        """Global scratch tensors that a launch needs: none, O and its statistics stay on chip."""
        return ()


@dataclass(frozen=True)
class TileChoice:
    """One row of the tile table: the plan for D and Dv up to ``max_dim`` and ``max_dim_v``."""

    max_dim: int
    max_dim_v: int
    num_q_tiles: int
    tile_n: int


# Two O tiles beside two S buffers of 128 columns leave 128 columns each. Q of 192 columns leaves
# shared memory for two blocks of 128 × 192 only: narrower ones make three slots. A wider O leaves
# tensor memory for one Q tile.
_TILES = (
    TileChoice(128, 128, 2, 128),
    TileChoice(192, 128, 2, 96),
    TileChoice(192, 192, 1, 128),
    TileChoice(256, 256, 1, 64),
)

# Half the bytes: tensor memory alone decides.
_FP8_TILES = (
    TileChoice(256, 128, 2, 128),
    TileChoice(256, 256, 1, 128),
)


def tile_choice(variant: KernelVariant) -> TileChoice:
    """The row of the tile table for the two head dims."""
    for choice in _FP8_TILES if DTYPE_BYTES[variant.dtype] == 1 else _TILES:
        if variant.head_dim <= choice.max_dim and variant.head_dim_v <= choice.max_dim_v:
            return choice
    raise UnsupportedError(
        "FA4 has no tile for these head dims",
        got=f"head dims {variant.head_dim} and {variant.head_dim_v}",
        expected=f"head dims up to {MAX_HEAD_DIM}",
    )


def preferred_group(problem: AttentionProblem | VarlenProblem) -> int:
    """How many query heads of a K/V head had better share row tiles."""
    padded = problem.padded if isinstance(problem, VarlenProblem) else problem
    tile_m = TILE_M * tile_choice(padded.variant).num_q_tiles
    return group_that_saves_tiles(problem, box_rows=TILE_M, tile_m=tile_m)


def _with_most_stages(config: Fa4FwdConfig) -> Fa4FwdConfig:
    """``config`` with the deepest ring that fits, up to ``MAX_STAGES``."""
    stage = config.smem_stage_bytes + 2 * MBARRIER_BYTES
    more = (config.smem_limit_bytes - config.smem_bytes) // stage
    return replace(config, stages=min(config.stages + more, MAX_STAGES))


def _with_own_o(config: Fa4FwdConfig) -> Fa4FwdConfig:
    """``config`` with places of O beside those of Q, if there is room for them."""
    try:
        return replace(config, has_own_o=True)
    except InvalidArgumentError:
        return config


def pick_fwd(variant: KernelVariant, target: Target) -> Fa4FwdConfig:
    """The plan for ``variant`` on ``target``.

    CTAs are persistent where all tiles are equally long; else each takes one tile, the longest
    first, and the hardware gives the next to whoever is done.

    Raises:
        UnsupportedError: an architecture without tcgen05, no tile for the head dims, heads that do
            not pack, or packed sequences in fp8.
    """
    if not target.has_tcgen05:
        raise UnsupportedError(
            "FA4 needs tcgen05 and tensor memory",
            got=target.arch,
            expected="sm_100a or sm_103a",
            alternatives=("fa2", "fa1"),
        )
    check_served("FA4", variant, dtypes=DTYPES, has_varlen=True, has_packed_groups=True)
    is_fp8 = DTYPE_BYTES[variant.dtype] == 1
    if variant.is_varlen and is_fp8:
        raise UnsupportedError(
            "FA4 does not take packed sequences in fp8 in this version",
            got=f"a varlen call in {variant.dtype}",
            expected="dense tensors (B, S, H, D), or 16-bit inputs",
        )
    if TILE_M % variant.packed_group:
        raise UnsupportedError(
            "FA4 cannot pack this many query heads into a tile",
            got=f"{variant.packed_group} query heads per K/V head",
            expected=f"a divisor of {TILE_M}, the rows of one TMA box of Q",
            fix="use pack_gqa=None or False",
        )
    tile = tile_choice(variant)
    is_masked = variant.causal or variant.has_window_left or variant.has_window_right
    config = Fa4FwdConfig(
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        head_dim_v=variant.head_dim_v,
        is_causal=variant.causal,
        has_window_left=variant.has_window_left,
        has_window_right=variant.has_window_right,
        has_softcap=variant.has_softcap,
        is_varlen=variant.is_varlen,
        has_seqused_q=variant.has_seqused_q,
        has_seqused_k=variant.has_seqused_k,
        packed_group=variant.packed_group,
        has_block_descales=variant.has_block_descales,
        num_q_tiles=tile.num_q_tiles,
        tile_n=tile.tile_n,
        polynomial_pairs=POLYNOMIAL_PAIRS[target.arch],
        rescale_threshold=0.0 if is_fp8 else RESCALE_THRESHOLD,
        is_persistent=not (is_masked or variant.is_varlen),
        smem_limit_bytes=target.smem_per_block_bytes,
    )
    return _with_most_stages(_with_own_o(config) if config.is_persistent else config)
