"""What the roles of the FlashAttention-4 forward kernel share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.fp8 import Descales, HeadDescales
from cute_fa.blocks.pipelines import TmaPipe
from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.scores import ScoreScale
from cute_fa.blocks.signals import Signal, commit
from cute_fa.blocks.tile_scheduler import TileSchedule, WorkTile
from cute_fa.blocks.transfers import Transfers
from cute_fa.fa4.tmem_map import S_BUFFERS


@dataclass(frozen=True)
class Signals:
    """What the roles tell each other; the class docstring of ``Fa4Fwd`` has the table."""

    s: Signal  # MMA → SOFTMAX, per S buffer
    p: Signal  # SOFTMAX (first part of P) and CORRECTION (O rescaled) → MMA, per S buffer
    p_rest: Signal  # SOFTMAX → MMA, per S buffer
    o: Signal  # MMA → CORRECTION, per Q tile
    sums: Signal  # SOFTMAX → CORRECTION, per Q tile
    o_out: Signal  # CORRECTION → EPILOGUE, per Q tile
    sums_taken: Signal | None  # CORRECTION → SOFTMAX, per Q tile
    o_gone: Signal | None  # EPILOGUE → CORRECTION, per Q tile
    q_landed: Signal | None  # MMA → CORRECTION, per Q tile

    def initialise(self) -> None:
        """Set the arrive counts; by one thread, before any other touches them."""
        signals = (self.s, self.p, self.p_rest, self.o, self.sums, self.o_out)
        for signal in (*signals, self.sums_taken, self.o_gone, self.q_landed):
            if signal is not None:
                signal.initialise()


@dataclass(frozen=True)
class Cta:
    """What a CTA has for all its tiles; of fp8 inputs sQ, sK and sV count pairs of columns."""

    config: cutlass.Constexpr
    schedule: TileSchedule
    transfers: Transfers
    sQ: cute.Tensor  # (128, D, Q tile)
    sO: cute.Tensor  # (128, Dv, Q tile), in Q's place unless config.has_own_o
    sK: cute.Tensor  # (N, D, stage), in the slots of the ring; of a pair, half of the N keys
    sV: cute.Tensor  # (N, Dv, stage), in the same slots; of a pair, half of the Dv columns
    sFactor: cute.Tensor  # (128, S buffer) fp32: what each row of O has to be multiplied by
    sSum: cute.Tensor  # (128, Q tile) fp32: each row's sum of exponentials
    tmem_address: cute.Pointer  # in shared memory: where the allocation begins
    pipe_q: TmaPipe
    pipe_kv: TmaPipe
    signals: Signals
    scores: ScoreScale
    descales: Descales
    rank: cutlass.Int32 | None  # which CTA of a pair this is; None: there is no pair
    tmem: cute.Pointer | None = None  # column 0 of the allocation, in roles that use it

    def with_tmem(self) -> Cta:
        """For a role to call first: no register is taken from the others."""
        return replace(self, tmem=tmem.allocated(self.tmem_address))

    def tile(self, work: WorkTile, uses: Uses) -> RowTile:
        return RowTile.of(self.config, self.schedule, work, uses)

    def descales_of(self, tile: RowTile) -> HeadDescales:
        """Those of the tile's K/V head."""
        return self.descales.at(tile.sequence.batch, tile.head_kv)

    def q_tile(self, tile: RowTile, i):
        """Which run of 128 rows of its sequence (and group) Q tile ``i`` of a tile is."""
        return self._of_pair(tile.m_block) * self.config.num_q_tiles + i

    def k_block(self, block):
        """Which run of ``config.k_rows`` keys this CTA loads of a block of K."""
        return self._of_pair(block)

    def v_column(self):
        """The first column of a block of V that this CTA loads, as TMA counts them."""
        return 0 if self.rank is None else self.rank * self.config.panel_dv

    def _of_pair(self, whole):
        """The number of this CTA's part of ``whole``, of which each CTA of a pair has a half."""
        return whole if self.rank is None else 2 * whole + self.rank

    def commit(self, mbarrier: cute.Pointer) -> None:
        """MMA: tell whoever loads, of a pair in both CTAs, that the products are complete."""
        commit(mbarrier, self.config.is_paired)

    def q_use(self, tile: RowTile, i):
        """The use of pipe_q that holds Q tile ``i``: each is a slot of its own."""
        return tile.uses.tiles * self.config.num_q_tiles + i

    # Block j of a tile is counted from the right. A step is one block of one Q tile, in MMA order;
    # steps take the two S buffers in turn, whatever the number of Q tiles.

    def step(self, tile: RowTile, i, j):
        """The number of block ``j`` of Q tile ``i`` among all steps of the CTA."""
        return (tile.uses.blocks + j) * self.config.num_q_tiles + i

    def s_buffer(self, tile: RowTile, i, j):
        """The S buffer of a step."""
        return i if self.config.num_q_tiles == S_BUFFERS else self.step(tile, i, j) % S_BUFFERS

    def s_use(self, tile: RowTile, i, j):
        """Which use of its S buffer a step is."""
        is_own = self.config.num_q_tiles == S_BUFFERS
        return tile.uses.blocks + j if is_own else self.step(tile, i, j) // S_BUFFERS

    def o_use(self, tile: RowTile, j):
        """Which use of its O the product with block ``j`` is."""
        return tile.uses.blocks + j

    def k_use(self, tile: RowTile, j):
        """The use of the ring that holds block ``j`` of K.

        MMA is one round of S buffers ahead with S = QKᵀ: one block with two Q tiles, whose order of
        need is K0 V0 K1 V1 …; two blocks with one: K0 K1 V0 K2 V1 ….
        """
        if self.config.num_q_tiles == 2:
            return 2 * (tile.uses.blocks + j)
        return 2 * tile.uses.blocks + cutlass.max(2 * j - 1, cutlass.Int32(0))

    def v_use(self, tile: RowTile, j):
        """The use of the ring that holds block ``j`` of V."""
        if self.config.num_q_tiles == 2:
            return 2 * (tile.uses.blocks + j) + 1
        return 2 * tile.uses.blocks + cutlass.min(2 * j + 2, 2 * tile.blocks.count - 1)

    def tmem_s(self, buffer) -> cute.Pointer:
        return self.tmem + buffer * self.config.tile_n

    def tmem_p(self, buffer) -> cute.Pointer:
        return self.tmem_s(buffer) + self.config.tmem_map.p[0]

    def tmem_o(self, i) -> cute.Pointer:
        return self.tmem + self.config.tmem_map.o[0] + i * self.config.padded_dv


def unhoisted_zero(use: cutlass.Int32) -> cutlass.Int32:
    """0, for a use ≥ 0 of a pipe, of which the compiler is not to know.

    PERF(SASS): added to what does not change in a loop, it keeps what follows from that, such as an
    address for each k-step, out of registers, of which there are too few; an addition makes it.
    """
    return cute.arch.inline_ptx(
        "shr.s32 {$w0}, {$r0}, 31;",
        write_only_types=[cutlass.Int32],
        read_only_args=[use],
    )
