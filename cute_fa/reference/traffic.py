"""HBM traffic of the FA1 and FA2 forward loops, counted exactly, and the theory behind the counts.

With N rows each of Q and K/V, head dim d, and on-chip memory for M elements:

- Standard attention writes S and P and reads them back: Θ(Nd + N²) (paper, Theorem 2).
- FA1 passes over Q, O, m and l once per K/V block. With ⌈N / Bc⌉ = ⌈4dN / M⌉ blocks that is
  Θ(Nd · N / Bc) = Θ(N²d² / M): bytes fall in proportion as tiles grow with M.
- FA2 passes over K and V once per Q block, Θ(Nd · N / Br) by the same argument, but reads only:
  O leaves the chip once and m, l never do. Per pass and element of head dim in 16-bit inputs, FA1
  moves 2 bytes of Q and 8 of fp32 O, FA2 2 bytes each of K and V.

Counts are bytes that the threads ask for; what caches keep from HBM is not their business. A block
is moved only where a mask leaves some of it visible, and only as far as the tensor goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cute_fa.problem import DTYPE_BYTES, AttentionProblem

F32_BYTES = 4
STATISTICS_BYTES = 2 * F32_BYTES  # m and l of one row


class Tiles(Protocol):
    """What a kernel config says of its loop."""

    @property
    def tile_m(self) -> int: ...

    @property
    def tile_n(self) -> int: ...


@dataclass(frozen=True)
class Traffic:
    """Bytes from and to global memory."""

    read: int
    written: int

    @property
    def total(self) -> int:
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
    result_row = problem.head_dim_v * size + F32_BYTES
    seen: set[int] = set()
    read = written = 0
    for m_block in range(-(-problem.seqlen_q // tiles.tile_m)):
        rows = _rows(m_block, tiles.tile_m, problem.seqlen_q)
        n_blocks = key_block_range(problem, tiles, m_block)
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
    result_row = problem.head_dim_v * size + F32_BYTES
    read = written = 0
    for m_block in range(-(-problem.seqlen_q // tiles.tile_m)):
        rows = _rows(m_block, tiles.tile_m, problem.seqlen_q)
        n_blocks = key_block_range(problem, tiles, m_block)
        if len(n_blocks):
            read += rows * q_row
        read += sum(_rows(n, tiles.tile_n, problem.seqlen_k) for n in n_blocks) * kv_row
        written += rows * result_row
    heads = problem.batch * problem.heads_q
    return Traffic(heads * read, heads * written)


def key_block_range(problem: AttentionProblem, tiles: Tiles, m_block: int) -> range:
    """The K/V blocks of which the rows of Q block ``m_block`` see some column."""
    first = m_block * tiles.tile_m
    last = min(first + tiles.tile_m, problem.seqlen_q) - 1
    left, right = problem.window
    shift = problem.seqlen_k - problem.seqlen_q
    lo = 0 if left is None else max(first + shift - left, 0)
    hi = problem.seqlen_k if right is None else min(last + shift + right + 1, problem.seqlen_k)
    if lo >= hi:
        return range(0)
    return range(lo // tiles.tile_n, -(-hi // tiles.tile_n))


def _rows(block: int, tile: int, seqlen: int) -> int:
    return min(tile, seqlen - block * tile)
