"""What ``blocks.tile_scheduler`` does, on the host: who computes which tile, and how long it takes.

Time is counted in K/V blocks, of which every tile has as many as its mask leaves. Beside them a
tile has a beginning and an end that overlap nothing: a CTA starts, Q and the first K arrive, O
leaves. ``starts`` counts those; a persistent CTA has one, and loads the next tile meanwhile.

So one schedule is better than another if what it loses in balance is less than the starts that it
saves, and a start in blocks is all that has to be known of the machine (``break_even``).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cute_fa.problem import DTYPE_BYTES, AttentionProblem
from cute_fa.reference.traffic import PackedTiles, key_block_range

L2_SECTION_BYTES = 32 << 20


class Plan(PackedTiles, Protocol):
    """What a kernel config says of its tiles."""

    @property
    def has_long_last_tiles(self) -> bool:
        """Whether later rows see more keys."""
        ...


@dataclass(frozen=True)
class Tile:
    """One entry of the list, with its K/V blocks."""

    batch: int
    head: int
    m_block: int
    blocks: int


@dataclass(frozen=True)
class Schedule:
    """The list of a launch, and how many CTAs share it.

    Attributes:
        tiles: in the order of the list.
        num_ctas: CTAs launched.
        sms: of the device, each of which runs one CTA at a time.
    """

    tiles: tuple[Tile, ...]
    num_ctas: int
    sms: int

    def of_cta(self, cta: int) -> list[Tile]:
        """What one CTA computes: its entry of each round, to and fro."""
        return list(self._entries(cta))

    def _entries(self, cta: int) -> Iterator[Tile]:
        for first in range(0, len(self.tiles), 2 * self.num_ctas):
            for entry in (first + cta, first + 2 * self.num_ctas - 1 - cta):
                if entry < len(self.tiles):
                    yield self.tiles[entry]

    def makespan(self, start: float = 0.0) -> float:
        """Blocks until the last SM is done, ``start`` for each start of a CTA.

        The hardware gives the next CTA in order to the SM that is free first.
        """
        free = [0.0] * self.sms
        for cta in range(self.num_ctas):
            load = sum(tile.blocks for tile in self._entries(cta))
            heapq.heappush(free, heapq.heappop(free) + load + start)
        return max(free)

    @property
    def ideal(self) -> float:
        """Blocks per SM if they could be divided at will, and starts cost nothing."""
        return sum(tile.blocks for tile in self.tiles) / self.sms


def single(schedule: Schedule) -> Schedule:
    """The same list with a CTA for each tile."""
    return Schedule(schedule.tiles, len(schedule.tiles), schedule.sms)


def break_even(schedule: Schedule) -> float:
    """How many blocks a start must cost for ``schedule`` to be no slower than ``single``.

    Found by halving, to a hundredth of a block; infinite if 64 blocks are not enough.
    """
    other = single(schedule)

    def is_as_good(start: float) -> bool:
        return schedule.makespan(start) <= other.makespan(start)

    low, high = 0.0, 64.0
    if is_as_good(low):
        return 0.0
    if not is_as_good(high):
        return float("inf")
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if is_as_good(middle) else (middle, high)
    return high


def dense_schedule(problem: AttentionProblem, plan: Plan, sms: int) -> Schedule:
    """What a persistent kernel does with sequences of one length."""
    heads, heads_per_kv, tiles = _sequence_tiles(problem, plan)
    columns = heads * problem.batch
    total = columns * len(tiles)
    width, num_ctas = columns, min(total, sms)
    if plan.has_long_last_tiles:
        size = DTYPE_BYTES[problem.dtype] * (problem.head_dim + problem.head_dim_v)
        fitting = max(L2_SECTION_BYTES // size // max(problem.seqlen_k, 1), 1) * heads_per_kv
        if columns > fitting and columns > sms // 2:
            width = -(-columns // -(-columns // fitting))
            num_ctas = max(-(-total // 2), num_ctas)
    order = _in_order(tiles, columns, width, plan.has_long_last_tiles)
    listed = tuple(
        Tile(column // heads, column % heads, m_block, tiles[m_block]) for column, m_block in order
    )
    return Schedule(listed, num_ctas, sms)


def packed_schedule(
    sequences: Sequence[AttentionProblem], total_q: int, max_seqlen_q: int, plan: Plan, sms: int
) -> Schedule:
    """What a persistent kernel does with packed sequences, each given as a problem by itself."""
    listed: list[Tile] = []
    heads = 1
    for batch, problem in enumerate(sequences):
        heads, _, tiles = _sequence_tiles(problem, plan)
        for head, m_block in _in_order(tiles, heads, heads, plan.has_long_last_tiles):
            listed.append(Tile(batch, head, m_block, tiles[m_block]))
    queries = plan.tile_m // plan.packed_group
    most = min(total_q // queries + len(sequences), -(-max_seqlen_q // queries) * len(sequences))
    most *= heads
    is_balanced = max_seqlen_q // plan.tile_n * sms <= most
    num_ctas = min(most, sms) if is_balanced else most
    return Schedule(tuple(listed), num_ctas, sms)


def _sequence_tiles(problem: AttentionProblem, plan: Plan) -> tuple[int, int, list[int]]:
    """(tiles side by side, of these how many read the same K and V, blocks of each row tile)."""
    heads = problem.heads_q // plan.packed_group
    queries = plan.tile_m // plan.packed_group
    count = -(-problem.seqlen_q // queries)
    blocks = [len(key_block_range(problem, queries, plan.tile_n, m)) for m in range(count)]
    return heads, heads // problem.heads_k, blocks


def _in_order(
    tiles: Sequence[int], columns: int, width: int, is_longest_first: bool
) -> Iterator[tuple[int, int]]:
    """(head, row tile) of each entry."""
    if not is_longest_first:
        for column in range(columns):
            for m_block in range(len(tiles)):
                yield column, m_block
        return
    for first in range(0, columns, width):
        for m_block in reversed(range(len(tiles))):
            for column in range(first, min(first + width, columns)):
                yield column, m_block
