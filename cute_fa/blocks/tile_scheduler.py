"""Which CTA computes which row tile, and in which order.

All row tiles of a launch stand in one list, sequence after sequence. A CTA takes one of it
(single), every so many of it (static persistent), or one and then whichever nobody has begun yet
(launch control); where it takes several, what it prepares for its next tile overlaps the end of
this one.

    order     Under a causal mask or right window the last rows come first, of one head after the
              other: long tiles start early. The heads are cut into *sections* if their K and V do
              not fit into L2 together and there are too many to be read by two CTAs at a time each.
              Without either, tiles are equally long, and all of a head come before the next head.
    rounds    In round r, CTA c of P takes entry r·P + c, or r·P + P − 1 − c if r is odd: to and
              fro, so that nobody gets the longest tile of every round.
    P         As many as the device has SMs, where that balances: tiles of one length, one section,
              or packed sequences whose longest tile is short beside the rest. Several sections take
              a CTA for two tiles, a long one and a short one, other packed sequences one for each
              tile, and the hardware balances them.
    packed    Tile counts of packed sequences are on the device only. A warp finds its entry by a
              running sum over 32 sequences at a time, and goes on from there for the next.

``reference.schedule`` counts what this costs and saves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import cute

from cute_fa.blocks.host import multiprocessor_count
from cute_fa.blocks.launch_control import Answers
from cute_fa.blocks.plan import TmaForwardPlan
from cute_fa.blocks.seqlen import (
    DenseSequences,
    PackedSequences,
    Window,
    num_sequences,
    sequences,
)
from cute_fa.blocks.tiles import WARP_THREADS

L2_SECTION_BYTES = 32 << 20
"""What the K and V of one section may take: an H100 has 50 MB of L2, a B200 126 MB, and Q and O
pass through it as well."""


@dataclass(frozen=True)
class WorkTile:
    """One entry of the list.

    Attributes:
        m_block: row tile of the sequence.
        head: head of Q; of K/V where its whole group shares the tile.
        batch: sequence.
        is_valid: whether there is such an entry; None where there always is. The others mean
            nothing if not.
        index: place in the list.
        step: to the CTA's next entry.
        first_batch, tiles_before: of packed sequences, where the search for this entry ended: a
            sequence, and the tiles of those before it.
    """

    m_block: cutlass.Int32
    head: cutlass.Int32
    batch: cutlass.Int32
    is_valid: cutlass.Boolean | None
    index: cutlass.Int32
    step: cutlass.Int32
    first_batch: cutlass.Int32 | None = None
    tiles_before: cutlass.Int32 | None = None


@dataclass(frozen=True)
class TileSchedule:
    """The list of one launch; ``tile_schedule`` makes it on the host.

    Attributes:
        sequences: what has row tiles.
        batch: how many there are.
        heads: tiles side by side: heads of Q, or of K/V where groups share a tile.
        heads_per_kv: of these, how many read the same K and V.
        width: heads of a section, those of all sequences counted where they have one length.
        num_tiles: entries; for packed sequences the most that there can be.
        num_ctas: CTAs to launch.
        rows: queries of a tile.
        is_longest_first: whether the last rows see the most keys.
        is_persistent: whether CTAs take more than one tile, by their number.
        cluster: CTAs that work on a tile together, neighbours in the grid; "a CTA", here and above,
            is then as many.
        answers: of a CTA that asks for more tiles, one by one; in the kernel.
    """

    sequences: DenseSequences | PackedSequences
    batch: cutlass.Int32
    heads: cutlass.Int32
    heads_per_kv: cutlass.Int32
    width: cutlass.Int32
    num_tiles: cutlass.Int32
    num_ctas: cutlass.Int32
    rows: cutlass.Constexpr
    is_longest_first: cutlass.Constexpr
    is_persistent: cutlass.Constexpr
    cluster: cutlass.Constexpr = 1
    answers: Answers | None = None

    @property
    def grid(self) -> list:
        return [self.num_ctas * self.cluster, 1, 1]

    @property
    def is_packed(self) -> bool:
        return isinstance(self.sequences, PackedSequences)

    def first(self) -> WorkTile:
        """The CTA's first tile; by whole warps, like ``following``."""
        cta = cute.arch.block_idx()[0] // self.cluster
        step = 2 * (self._num_running() - 1 - cta) + 1
        zero = cutlass.Int32(0)
        work = WorkTile(zero, zero, zero, None, cta, step)
        if self.is_packed:
            return self._found(work, zero, zero)
        return self._placed(work)

    def following(self, work: WorkTile) -> WorkTile:
        """The CTA's next tile after ``work``, for persistent CTAs."""
        turned = 2 * self._num_running() - work.step
        following = replace(work, index=work.index + work.step, step=turned)
        if self.is_packed:
            return self._found(following, work.first_batch, work.tiles_before)
        return self._placed(following)

    def _num_running(self) -> cutlass.Int32:
        """``num_ctas``, as the grid says."""
        return cute.arch.grid_dim()[0] // self.cluster

    def granted(self, work: WorkTile, index: cutlass.Int32) -> WorkTile:
        """What blockIdx.x ``index`` would have begun with, for CTAs that ask for more; ``work`` is
        what the CTA had before."""
        granted, zero = replace(work, index=index // self.cluster), cutlass.Int32(0)
        # Nothing promises that a later answer is a later entry: every search begins in front.
        return self._found(granted, zero, zero) if self.is_packed else self._placed(granted)

    def _placed(self, work: WorkTile) -> WorkTile:
        """``work`` with what its index says, for sequences of one length."""
        m_blocks = cute.ceil_div(self.sequences.max_seqlen_q, self.rows)
        m_block, column = self._in_sections(work.index, m_blocks, self.heads * self.batch)
        batch = column // self.heads
        is_valid = work.index < self.num_tiles if self.is_persistent else None
        return replace(
            work, m_block=m_block, head=column - batch * self.heads, batch=batch, is_valid=is_valid
        )

    def _in_sections(self, index, m_blocks, columns):
        """(row tile, column) of entry ``index`` of ``m_blocks`` row tiles of ``columns`` heads."""
        if not self.is_longest_first:
            column = index // m_blocks
            return index - column * m_blocks, column
        first = index // (m_blocks * self.width) * self.width
        within = index - m_blocks * first
        # The last section may be narrower; an entry beyond the list has none.
        width = cutlass.max(cutlass.min(self.width, columns - first), 1)
        row = within // width
        return m_blocks - 1 - row, first + within - row * width

    def _tiles_of(self, batch: cutlass.Int32) -> cutlass.Int32:
        """Entries of one packed sequence; 0 for a number beyond the last."""
        last = self.batch - 1
        seqlen_q = self.sequences.of(cutlass.min(batch, last)).seqlen.seqlen_q
        tiles = cute.ceil_div(seqlen_q, self.rows) * self.heads
        return cutlass.select_(batch > last, cutlass.Int32(0), tiles)

    def _tiles_through(self, first_batch: cutlass.Int32) -> cutlass.Int32:
        """Entries of sequences ``first_batch`` … ``first_batch`` + lane, by a whole warp."""
        lane = cute.arch.lane_idx()
        total = self._tiles_of(first_batch + lane)
        for distance in (1, 2, 4, 8, 16):
            before = cute.arch.shuffle_sync_up(total, offset=distance, mask_and_clamp=0)
            total += cutlass.select_(lane >= distance, before, cutlass.Int32(0))
        return total

    @cute.jit
    def _found(
        self, work: WorkTile, first_batch: cutlass.Int32, tiles_before: cutlass.Int32
    ) -> WorkTile:
        """``work`` with what its index says, searched from a sequence on."""
        last_lane = WARP_THREADS - 1
        through = self._tiles_through(first_batch)
        total = cute.arch.shuffle_sync(through, last_lane)
        while (work.index >= tiles_before + total) & (first_batch + WARP_THREADS < self.batch):
            first_batch += WARP_THREADS
            tiles_before += total
            through = self._tiles_through(first_batch)
            total = cute.arch.shuffle_sync(through, last_lane)
        index = work.index - tiles_before
        passed = cute.arch.popc(cute.arch.vote_ballot_sync(through <= index))
        before = cute.arch.shuffle_sync(through, cutlass.max(passed - 1, 0))
        before = cutlass.select_(passed == 0, cutlass.Int32(0), before)
        batch = cutlass.min(first_batch + passed, self.batch - 1)
        seqlen_q = self.sequences.of(batch).seqlen.seqlen_q
        m_blocks = cutlass.max(cute.ceil_div(seqlen_q, self.rows), 1)
        m_block, head = self._in_sections(index - before, m_blocks, self.heads)
        return replace(
            work,
            m_block=m_block,
            head=head,
            batch=batch,
            is_valid=index < total,
            first_batch=first_batch,
            tiles_before=tiles_before,
        )


@cute.jit
def for_each_tile(
    schedule: TileSchedule,
    body: cutlass.Constexpr,
    ordinal: cutlass.Int32,
    is_ahead: cutlass.Constexpr = False,
):
    """``body(work, ordinal) → ordinal`` for each tile of this CTA; by whole warps.

    Args:
        is_ahead: of one warp, which begins a tile before all others: then the next is asked for.

    Returns the last ordinal.
    """
    work = schedule.first()
    if cutlass.const_expr(schedule.answers is not None):
        ordinal = _for_each_answer(schedule, work, body, ordinal, is_ahead)
    elif cutlass.const_expr(schedule.is_persistent):
        while work.is_valid:
            ordinal = body(work, ordinal)
            work = schedule.following(work)
    elif cutlass.const_expr(work.is_valid is not None):
        if work.is_valid:
            ordinal = body(work, ordinal)
    else:
        ordinal = body(work, ordinal)
    return ordinal


@cute.jit
def _for_each_answer(
    schedule: TileSchedule,
    work: WorkTile,
    body: cutlass.Constexpr,
    ordinal: cutlass.Int32,
    is_ahead: cutlass.Constexpr,
):
    """``for_each_tile`` for ``work`` and whatever is granted after it."""
    request = cutlass.Int32(0)
    is_granted = cutlass.Boolean(True)
    while is_granted:
        if cutlass.const_expr(is_ahead):
            schedule.answers.begin()
        if cutlass.const_expr(work.is_valid is None) or work.is_valid:
            ordinal = body(work, ordinal)
        is_granted, index = schedule.answers.answer(request)
        request += 1
        if is_granted:
            work = schedule.granted(work, index)
    return ordinal


def tile_schedule(
    plan: TmaForwardPlan, mQ: cute.Tensor, mK: cute.Tensor, window: Window, lengths: tuple
) -> TileSchedule:
    """The list of a launch; on the host.

    Args:
        mQ, mK: (B, S, H, D), or packed (T, H, D).
        lengths: of packed sequences, as of ``blocks.seqlen.sequences``.
    """
    launched, batch = sequences(mQ, mK, window, lengths), num_sequences(mQ, lengths)
    rows = plan.tile_queries
    heads = mQ.shape[-2] // plan.packed_group
    heads_per_kv = heads // mK.shape[-2]
    is_packed = isinstance(launched, PackedSequences)
    longest = cute.ceil_div(launched.max_seqlen_q, rows)
    if is_packed:
        # A sequence of n rows has at most ⌊n / rows⌋ + 1 tiles, and no more than the longest has.
        # The second bound is of rows that need not exist: it may not fit into 32 bits.
        bound = cutlass.Int64(longest) * cutlass.Int64(batch)
        most = cutlass.Int64(mQ.shape[0] // rows + batch)
        tiles = cutlass.Int32(cutlass.min(most, bound))
    else:
        tiles = longest * batch
    tiles = tiles * heads
    sms = cutlass.Int32(0)
    if plan.is_persistent:
        sms = cutlass.max(multiprocessor_count() // plan.num_ctas, 1)
    is_balanced = cutlass.Boolean(True)
    width = heads
    if is_packed:
        # Chance may give a CTA one tile more than its share: at most ``max_seqlen_q`` keys of a
        # query that sees as many. A start that overlaps is counted as one block.
        is_balanced = launched.max_seqlen_q // plan.tile_n * sms <= tiles
    elif plan.has_long_last_tiles:
        all_heads = heads * batch
        fitting = L2_SECTION_BYTES // plan.key_bytes // cutlass.max(mK.shape[1], 1)
        # Of few keys, more fit than there are, and maybe more than 32 bits count.
        fitting = cutlass.min(cutlass.max(fitting, 1), batch * mK.shape[-2]) * heads_per_kv
        is_balanced = (all_heads <= fitting) | (all_heads <= sms // 2)
        cut = cute.ceil_div(all_heads, cute.ceil_div(all_heads, fitting))
        width = cutlass.Int32(cutlass.select_(is_balanced, all_heads, cut))
    ctas = tiles
    if plan.is_persistent:
        one_each = cutlass.min(tiles, sms)
        pairs = cutlass.max(cute.ceil_div(tiles, 2), one_each)
        others = tiles if is_packed else pairs
        ctas = cutlass.Int32(cutlass.select_(is_balanced, one_each, others))
    return TileSchedule(
        sequences=launched,
        batch=batch,
        heads=heads,
        heads_per_kv=heads_per_kv,
        width=width,
        num_tiles=tiles,
        num_ctas=ctas,
        rows=rows,
        is_longest_first=plan.has_long_last_tiles,
        is_persistent=plan.is_persistent,
        cluster=plan.num_ctas,
    )
