"""HBM traffic of the forward loops, counted exactly, and the theory behind the counts.

With N rows each of Q and K/V, head dim d, and on-chip memory for M elements:

- Standard attention writes S and P and reads them back: Θ(Nd + N²) (paper, Theorem 2).
- FA1 passes over Q, O, m and l once per K/V block. With ⌈N / Bc⌉ = ⌈4dN / M⌉ blocks that is
  Θ(Nd · N / Bc) = Θ(N²d² / M): bytes fall in proportion as tiles grow with M.
- FA2 passes over K and V once per Q block, Θ(Nd · N / Br) by the same argument, but reads only:
  O leaves the chip once and m, l never do. Per pass and element of head dim in 16-bit inputs, FA1
  moves 2 bytes of Q and 8 of fp32 O, FA2 2 bytes each of K and V.

- FA3 does as FA2 with taller tiles, and where query heads are packed one pass over K and V serves
  all of a group.

Counts are bytes that threads and copies ask for; what caches keep from HBM is not their business.
A block is moved only where a mask leaves some of it visible, and only as far as the tensor goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cute_fa.problem import DTYPE_BYTES, AttentionProblem, out_dtype

F32_BYTES = 4
STATISTICS_BYTES = 2 * F32_BYTES  # m and l of one row


class Tiles(Protocol):
    """What a kernel config says of its loop."""

    @property
    def tile_m(self) -> int:
        """Query rows of a tile."""
        ...

    @property
    def tile_n(self) -> int:
        """Key columns of a tile."""
        ...


class PackedTiles(Tiles, Protocol):
    """The same of a kernel that can pack query heads."""

    @property
    def packed_group(self) -> int:
        """Query heads that share a tile."""
        ...


@dataclass(frozen=True)
class Traffic:
    """Bytes from and to global memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def fa1_hbm_traffic(problem: AttentionProblem, tiles: Tiles) -> Traffic:
    """FA1: K/V blocks outside, Q blocks inside, one CTA per batch and query head.

    K and V blocks that some row sees are read once. Each visit of a Q block reads Q; all visits but
    its first read its fp32 O, m and l; all but its last write them, the last writes O in the dtype
    and the LSE. Q blocks without a visit write O and the LSE only.
    """
    size = DTYPE_BYTES[problem.dtype]
    q_row = problem.head_dim * size
    kv_row = (problem.head_dim + problem.head_dim_v) * size
    carried_row = problem.head_dim_v * F32_BYTES + STATISTICS_BYTES
    result_row = _result_row_bytes(problem)
    seen: set[int] = set()
    read = written = 0
    for m_block in range(-(-problem.seqlen_q // tiles.tile_m)):
        rows = _rows(m_block, tiles.tile_m, problem.seqlen_q)
        n_blocks = key_block_range(problem, tiles.tile_m, tiles.tile_n, m_block)
        seen.update(n_blocks)
        read += rows * (q_row * len(n_blocks) + carried_row * max(len(n_blocks) - 1, 0))
        written += rows * (carried_row * max(len(n_blocks) - 1, 0) + result_row)
    read += sum(_rows(n, tiles.tile_n, problem.seqlen_k) for n in seen) * kv_row
    heads = problem.batch * problem.heads_q
    return Traffic(heads * read, heads * written)


def fa2_hbm_traffic(problem: AttentionProblem, tiles: Tiles) -> Traffic:
    """FA2: one CTA per Q block, batch and query head; K/V blocks inside.

    Each Q block reads Q once and the K and V blocks that it sees once, and writes O and the LSE
    once. A Q block that sees nothing reads nothing.
    """
    size = DTYPE_BYTES[problem.dtype]
    q_row = problem.head_dim * size
    kv_row = (problem.head_dim + problem.head_dim_v) * size
    result_row = _result_row_bytes(problem)
    read = written = 0
    for m_block in range(-(-problem.seqlen_q // tiles.tile_m)):
        rows = _rows(m_block, tiles.tile_m, problem.seqlen_q)
        n_blocks = key_block_range(problem, tiles.tile_m, tiles.tile_n, m_block)
        if len(n_blocks):
            read += rows * q_row
        read += sum(_rows(n, tiles.tile_n, problem.seqlen_k) for n in n_blocks) * kv_row
        written += rows * result_row
    heads = problem.batch * problem.heads_q
    return Traffic(heads * read, heads * written)


def fa3_hbm_traffic(problem: AttentionProblem, tiles: PackedTiles) -> Traffic:
    """FA3: as FA2, with the query heads of a group in one tile if they are packed.

    Boxes of TMA are counted as far as they lie in the tensor: what it fills with zeros it does not
    read, and what it leaves out it does not write. A Q block that sees nothing still reads Q. The
    schedule moves tiles between CTAs and changes no count. Descales of FP8 inputs, a few numbers a
    tile, are left out.
    """
    size = DTYPE_BYTES[problem.dtype]
    kv_row = (problem.head_dim + problem.head_dim_v) * size
    group = tiles.packed_group
    queries = tiles.tile_m // group
    key_rows = sum(
        _rows(n, tiles.tile_n, problem.seqlen_k)
        for m_block in range(-(-problem.seqlen_q // queries))
        for n in key_block_range(problem, queries, tiles.tile_n, m_block)
    )
    rows = problem.batch * problem.heads_q * problem.seqlen_q
    passes = problem.batch * problem.heads_q // group
    return Traffic(
        rows * problem.head_dim * size + passes * key_rows * kv_row,
        rows * _result_row_bytes(problem),
    )


def key_block_range(problem: AttentionProblem, tile_m: int, tile_n: int, m_block: int) -> range:
    """The K/V blocks of ``tile_n`` of which some column is seen by queries
    m_block · tile_m … + tile_m − 1."""
    first = m_block * tile_m
    last = min(first + tile_m, problem.seqlen_q) - 1
    left, right = problem.window
    shift = problem.seqlen_k - problem.seqlen_q
    lo = 0 if left is None else max(first + shift - left, 0)
    hi = problem.seqlen_k if right is None else min(last + shift + right + 1, problem.seqlen_k)
    if lo >= hi:
        return range(0)
    return range(lo // tile_n, -(-hi // tile_n))


def _result_row_bytes(problem: AttentionProblem) -> int:
    """O and the LSE of one row of one head."""
    return problem.head_dim_v * DTYPE_BYTES[out_dtype(problem.dtype)] + F32_BYTES


def _rows(block: int, tile: int, seqlen: int) -> int:
    return min(tile, seqlen - block * tile)
