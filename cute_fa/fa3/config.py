"""The plan of a FlashAttention-3 forward kernel: tiles, warpgroups, registers, rings, barriers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from cute_fa.blocks.plan import (
    check_plan,
    check_served,
    group_that_saves_tiles,
    requirements,
)
from cute_fa.blocks.tiles import WARP_THREADS, round_up, tile_bytes
from cute_fa.errors import UnsupportedError
from cute_fa.problem import DTYPE_BYTES, MAX_HEAD_DIM, AttentionProblem, KernelVariant, out_dtype
from cute_fa.target import KIB, Target
from cute_fa.varlen import VarlenProblem

DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_THREADS
STRIP_ROWS = 64
"""Query rows of one consumer warpgroup: the M of every wgmma (PTX ISA, wgmma.mma_async)."""

WGMMA_K_BYTES = 32
MAX_WGMMA_N = 256
PAD_COLUMNS = 32
PANEL_ELEMENT_BYTES = 2
"""What swizzled panels are made of (``blocks.tiles``): 16-bit numbers, or pairs of e4m3 numbers."""

TRANSPOSE_WARPS = 2
DESCALE_ROWS = 128
MBARRIER_BYTES = 8
SMEM_ALIGN_BYTES = 1024
"""Where a 128-byte swizzle pattern repeats; every tile starts on it."""

# Registers per thread after setmaxnreg, (producer, consumer), by the number of consumers. They come
# out of what the CTA was launched with, 65536 by its threads, rounded down to a multiple of 8:
# 24 + 2·240 = 3·168 for 384 threads, 32 + 3·160 = 4·128 for 512.
REGISTERS = {2: (24, 240), 3: (32, 160)}
# Transposing V takes more than 24: 40 + 2·232 = 3·168.
FP8_REGISTERS = {2: (40, 232), 3: (32, 160)}
REGISTERS_PER_SM = 65536


class Fa3FwdBarrier(IntEnum):
    """Named barriers; 0 is sync_threads. Each of the last two has one barrier per warpgroup.

    SYNC_THREADS    all threads, once, after the mbarriers are initialised
    TURN + w        consumer w waits (128), the consumer before it in the cycle arrives (128)
    STRIP + w       the threads of consumer w, around generic writes to its strips of Q and O
    """

    SYNC_THREADS = 0
    TURN = 1
    STRIP = 4


@dataclass(frozen=True)
class Fa3FwdConfig:
    """Everything that a FlashAttention-3 forward kernel is specialised for.

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
        num_consumers: consumer warpgroups, 64 query rows each.
        tile_n: key columns of a tile.
        stages: depth of the K ring and of the V ring.
        has_turns: consumers take turns at issuing GEMMs, so that one's softmax runs beside
            another's products (paper, section 3.1).
        is_persistent: CTAs take one row tile after another (``blocks.tile_scheduler``).
        has_own_o: O has strips of its own, so that Q of the next tile can land while O is finished
            and leaves; else it leaves from Q's.
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
    num_consumers: int = 2
    tile_n: int = 128
    stages: int = 2
    has_turns: bool = True
    is_persistent: bool = False
    has_own_o: bool = False
    smem_limit_bytes: int = 227 * KIB

    def __post_init__(self) -> None:
        require = requirements("FA3")
        check_plan(self, require, DTYPES)
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
        require(
            not self.has_block_descales or (self.is_fp8 and DESCALE_ROWS % self.tile_n == 0),
            "tile_n does not divide the keys of a descale",
            self.tile_n,
            f"a divisor of {DESCALE_ROWS}, and fp8 inputs",
        )
        require(
            self.stages >= 2,
            "stages",
            self.stages,
            "at least 2: a block's V is awaited while the product with the V before it runs",
        )
        require(
            self.packed_group > 0 and STRIP_ROWS % self.packed_group == 0,
            "packed_group",
            self.packed_group,
            f"a divisor of {STRIP_ROWS}, the rows of one TMA box of Q",
            fix="use packed_group=1: every query head gets row tiles of its own",
        )
        require(
            self.fragment_registers <= self.consumer_registers,
            "registers of a consumer thread",
            f"{self._register_arithmetic()} = {self.fragment_registers}",
            f"at most {self.consumer_registers}",
            fix="use a smaller tile_n, or fewer consumers",
        )
        require(
            self.smem_bytes <= self.smem_limit_bytes,
            "shared memory",
            f"{self._smem_arithmetic()} = {self.smem_bytes} bytes",
            f"at most {self.smem_limit_bytes} bytes",
            fix="use fewer stages, or smaller tiles",
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
    def wgmma_k(self) -> int:
        """Keys of one k-step of O += PV."""
        return WGMMA_K_BYTES // self.element_bytes

    @property
    def tile_m(self) -> int:
        """Query rows of a CTA: a strip of 64 per consumer."""
        return STRIP_ROWS * self.num_consumers

    @property
    def tile_queries(self) -> int:
        """Queries of a CTA's tile: packed, each is ``packed_group`` rows."""
        return self.tile_m // self.packed_group

    @property
    def has_long_last_tiles(self) -> bool:
        """Whether later rows see more keys."""
        return self.is_causal or self.has_window_right

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
    def element_bytes(self) -> int:
        """Of Q, K, V and P."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_fp8(self) -> bool:
        """Whether V is transposed on its way: wgmma takes bytes with keys contiguous only."""
        return self.element_bytes == 1

    @property
    def out_dtype(self) -> str:
        """Of O."""
        return out_dtype(self.dtype)

    @property
    def smem_q_bytes(self) -> int:
        """One consumer's strip of Q: what its mbarrier waits for."""
        return tile_bytes(STRIP_ROWS, self.padded_d, self.element_bytes)

    @property
    def smem_o_bytes(self) -> int:
        """One consumer's strip of O."""
        return tile_bytes(STRIP_ROWS, self.padded_dv, DTYPE_BYTES[self.out_dtype])

    @property
    def smem_strip_bytes(self) -> int:
        """From one strip of Q to the next; each holds that consumer's O at the end, unless O has
        strips of its own."""
        if self.has_own_o:
            return self.smem_q_bytes
        return max(self.smem_q_bytes, self.smem_o_bytes)

    @property
    def smem_k_bytes(self) -> int:
        """One stage of K."""
        return tile_bytes(self.tile_n, self.padded_d, self.element_bytes)

    @property
    def smem_v_bytes(self) -> int:
        """One stage of V."""
        return tile_bytes(self.tile_n, self.padded_dv, self.element_bytes)

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
        strip = self.smem_strip_bytes + (self.smem_o_bytes if self.has_own_o else 0)
        tiles = self.num_consumers * strip
        tiles += self.stages * (self.smem_k_bytes + self.v_copies * self.smem_v_bytes)
        return tiles + MBARRIER_BYTES * self.num_mbarriers

    def _smem_arithmetic(self) -> str:
        q, o, dv = self.padded_d, self.padded_dv, self.padded_dv
        # O in elements of Q's size.
        o = o * DTYPE_BYTES[self.out_dtype] // self.element_bytes
        columns = f"({q} + {o})" if self.has_own_o else f"{max(q, o)}"
        values = f"{self.v_copies}·{dv}" if self.is_fp8 else f"{dv}"
        return (
            f"{self.element_bytes}·({self.tile_m}·{columns} for Q and O + "
            f"{self.stages} stages · "
            f"{self.tile_n}·({q} + {values}) for K and V) + "
            f"{MBARRIER_BYTES}·{self.num_mbarriers} for mbarriers"
        )

    def workspace(self, batch: int, seqlen_q: int, heads_q: int) -> tuple:
        """Global scratch tensors that a launch needs: none, O and its statistics stay on chip."""
        return ()


@dataclass(frozen=True)
class TileChoice:
    """One row of the tile table: the plan for D and Dv up to ``max_dim`` and ``max_dim_v``.

    ``tile_n`` serves problems without a mask; the columns that a mask cuts off a tile are computed
    for nothing, so causal and windowed ones take ``tile_n_masked``.
    """

    max_dim: int
    max_dim_v: int
    num_consumers: int
    tile_n: int
    tile_n_masked: int


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
    tiles = _FP8_TILES if DTYPE_BYTES[variant.dtype] == 1 else _TILES
    for choice in (_SOFTCAP_64, *tiles) if variant.has_softcap else tiles:
        if variant.head_dim <= choice.max_dim and variant.head_dim_v <= choice.max_dim_v:
            return choice
    raise UnsupportedError(
        "FA3 has no tile for these head dims",
        got=f"head dims {variant.head_dim} and {variant.head_dim_v}",
        expected=f"head dims up to {MAX_HEAD_DIM}",
    )


def pick_fwd(variant: KernelVariant, target: Target) -> Fa3FwdConfig:
    """The plan for ``variant`` on ``target``.

    CTAs are persistent where tiles are short or of different lengths, so that their beginnings and
    ends weigh: under masks and for packed sequences. See the README's section on schedules.

    Raises:
        UnsupportedError: an architecture without wgmma, no tile for the head dims, heads that do
            not pack, or packed sequences in fp8.
    """
    if not target.has_wgmma:
        raise UnsupportedError(
            "FA3 needs wgmma",
            got=target.arch,
            expected="sm_90a",
            alternatives=("fa2", "fa1"),
        )
    check_served("FA3", variant, dtypes=DTYPES, has_varlen=True, has_packed_groups=True)
    if variant.is_varlen and DTYPE_BYTES[variant.dtype] == 1:
        raise UnsupportedError(
            "FA3 does not take packed sequences in fp8 in this version",
            got=f"a varlen call in {variant.dtype}",
            expected="dense tensors (B, S, H, D), or 16-bit inputs",
        )
    if variant.packed_group > STRIP_ROWS or STRIP_ROWS % variant.packed_group:
        raise UnsupportedError(
            "FA3 cannot pack this many query heads into a tile",
            got=f"{variant.packed_group} query heads per K/V head",
            expected=f"a divisor of {STRIP_ROWS}, the rows of one TMA box of Q",
            fix="use pack_gqa=None or False",
        )
    tile = tile_choice(variant)
    is_masked = variant.causal or variant.has_window_left or variant.has_window_right
    is_narrow = is_masked or variant.has_block_descales
    config = Fa3FwdConfig(
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
        num_consumers=tile.num_consumers,
        tile_n=tile.tile_n_masked if is_narrow else tile.tile_n,
        is_persistent=is_masked or variant.is_varlen,
        smem_limit_bytes=target.smem_per_block_bytes,
    )
    return with_own_o(config) if config.is_persistent else config


def preferred_group(problem: AttentionProblem | VarlenProblem) -> int:
    """How many query heads of a K/V head had better share row tiles."""
    padded = problem.padded if isinstance(problem, VarlenProblem) else problem
    tile_m = STRIP_ROWS * tile_choice(padded.variant).num_consumers
    return group_that_saves_tiles(problem, box_rows=STRIP_ROWS, tile_m=tile_m)


def with_own_o(config: Fa3FwdConfig) -> Fa3FwdConfig:
    """``config`` with strips of O beside those of Q, if there is room for them."""
    room = config.smem_limit_bytes - config.smem_bytes
    apart = config.smem_q_bytes + config.smem_o_bytes - config.smem_strip_bytes
    if config.num_consumers * apart > room:
        return config
    return replace(config, has_own_o=True)
