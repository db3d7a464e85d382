"""Where FA4's S, P and O lie in tensor memory; plain Python, no DSL."""

from __future__ import annotations

from dataclasses import dataclass

TMEM_COLUMNS = 512
"""Columns of tensor memory, 32 bits wide in each of 128 lanes (PTX ISA, "Tensor Memory")."""

MIN_TMEM_COLUMNS = 32
COLUMN_BYTES = 4
S_BUFFERS = 2


@dataclass(frozen=True)
class TmemMap:
    """Columns of a CTA's tensor memory: the S buffers, then the O of each Q tile.

    Attributes:
        tile_n: key columns of a block, a column of S (fp32) each.
        padded_dv: columns of O (fp32).
        num_q_tiles: how many Os there are.
        element_bytes: of P.
    """

    tile_n: int
    padded_dv: int
    num_q_tiles: int
    element_bytes: int

    @property
    def s(self) -> tuple[int, ...]:
        """First column of each S buffer."""
        return tuple(i * self.tile_n for i in range(S_BUFFERS))

    @property
    def p_columns(self) -> int:
        """Columns of P: two of its elements share one, in fp8 four."""
        return self.tile_n * self.element_bytes // COLUMN_BYTES

    @property
    def p(self) -> tuple[int, ...]:
        """First column of P: its S buffer's.

        A thread has its row of S in registers before it writes P over it, but for the last chunks,
        which lie where the first part of P does not reach.
        """
        return self.s

    @property
    def o(self) -> tuple[int, ...]:
        """First column of each Q tile's O."""
        first = S_BUFFERS * self.tile_n
        return tuple(first + i * self.padded_dv for i in range(self.num_q_tiles))

    @property
    def columns_used(self) -> int:
        return S_BUFFERS * self.tile_n + self.num_q_tiles * self.padded_dv

    @property
    def columns(self) -> int:
        """Columns to allocate: a power of two (PTX ISA, tcgen05.alloc)."""
        return max(1 << (self.columns_used - 1).bit_length(), MIN_TMEM_COLUMNS)

    @property
    def arithmetic(self) -> str:
        """How ``columns_used`` comes about, for messages."""
        return (
            f"{S_BUFFERS} S buffers · {self.tile_n} + {self.num_q_tiles} Q tiles · "
            f"{self.padded_dv} for O"
        )
