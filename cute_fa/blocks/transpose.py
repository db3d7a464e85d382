"""Transposition of byte matrices in shared memory: V for FP8 wgmma, which wants keys contiguous.

wgmma reads 8-bit operands K-major only (PTX ISA, wgmma.mma_async), and O += P V contracts over
keys, so V, which arrives with its head dim contiguous, has to be turned. ldmatrix and stmatrix move
16-bit elements; the bytes inside them are permuted in registers.

Keys do not come out in order, and need not: a sum over keys is the same in any, as long as P uses
the same. Position k of every 16 holds the key

    2t + {0, 1}      for k = 4t + {0, 1}
    8 + 2t + {0, 1}  for k = 4t + {2, 3},        t = 0 … 3

because thread t of a quad then holds, as columns 8j + 2t + {0, 1} of its S accumulator, just the
elements that it has to hold of P as an A operand (PTX ISA, register fragments of wgmma.m64nNk32).
(The idea of choosing the order so is FlashAttention-3's.)
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warp

from cute_fa.blocks.copies import swizzled_address
from cute_fa.blocks.tiles import CHUNK_BYTES, panel_columns

KEY_BLOCK = 32
DIM_BLOCK = 16
MATRIX_ROWS = 8
MATRIX_PAIRS = 8  # a row of ldmatrix and stmatrix: 8 elements of 16 bits
STEPS_IN_FLIGHT = 2
EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531  # selectors of prmt: of two registers, every other byte


def key_order(count: int) -> list[int]:
    """The key at each position, for ``count`` keys, a multiple of 16."""
    order = [2 * t + half * 8 + bit for t in range(4) for half in range(2) for bit in range(2)]
    return [first + key for first in range(0, count, len(order)) for key in order]


@cute.jit
def transpose_bytes(
    sV: cute.Tensor,  # (N, Dv / 2) pairs of bytes, swizzled
    sVt: cute.Tensor,  # (Dv, N / 2) pairs of bytes, swizzled
    part: cutlass.Int32,
    parts: cutlass.Constexpr,
):
    """sVt[d, k] ← sV[key_order[k], d], by warp ``part`` of ``parts``; Dv / 16 a multiple of parts.

    A step takes 32 keys × 16 dims: one ldmatrix.x4 transposes pairs, prmt parts the two bytes of
    each, one stmatrix.x4 writes rows of 16 keys. All rows of a lane are a multiple of the swizzle's
    period apart, so its addresses are the first one, XORed with a chunk's place in its panel and
    moved by a constant (as in ``blocks.gemm``).
    """
    lane = cute.arch.lane_idx()
    matrix, row = lane // MATRIX_ROWS, lane % MATRIX_ROWS
    # Rows 0, 2, … 14 of a 128-byte swizzle would share banks in pairs: half the quads write the odd
    # row where the others write the even one.
    is_upper = row >= MATRIX_ROWS // 2
    dim = 2 * row + ((matrix % 2) ^ cutlass.Int32(is_upper))
    selector = cutlass.Int32(EVEN_BYTES)
    other = cutlass.Int32(ODD_BYTES)
    if lane >= 16:
        selector = cutlass.Int32(ODD_BYTES)
        other = cutlass.Int32(EVEN_BYTES)
    load = cute.make_copy_atom(
        warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=4), sV.element_type
    )
    store = cute.make_copy_atom(
        warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), sV.element_type
    )
    num_keys, num_pairs = cute.size(sV, mode=[0]), cute.size(sV, mode=[1])
    source = _Chunks.of(sV, lane, part)
    target = _Chunks.of(sVt, DIM_BLOCK * part + dim, matrix // 2)
    steps = [
        (key_block, dim_block)
        for dim_block in range(0, 2 * num_pairs // DIM_BLOCK, parts)
        for key_block in range(num_keys // KEY_BLOCK)
    ]
    # Of four steps a second one's registers are more than the few that FA3 leaves here at D ≤ 32.
    in_flight = STEPS_IN_FLIGHT if len(steps) > 4 else 1
    for first in cutlass.range_constexpr(0, len(steps), in_flight):
        some = steps[first : first + in_flight]
        _take_steps(some, (load, source), (store, target), (selector, other))


def _take_steps(
    steps: list[tuple[int, int]],  # (block of keys, block of dims)
    load: tuple[cute.CopyAtom, _Chunks],
    store: tuple[cute.CopyAtom, _Chunks],
    selectors: tuple[cutlass.Int32, cutlass.Int32],
) -> None:
    """All loads, then all that follows: ptxas keeps the order of loads and stores that might be of
    one address, and a warp that issues in order would wait for each load by itself."""
    dtype = load[1].dtype
    matrices = [cute.make_rmem_tensor(MATRIX_PAIRS, dtype) for _ in steps]
    for (keys, dims), matrix in zip(steps, matrices, strict=True):
        cute.copy(load[0], load[1].moved(KEY_BLOCK * keys, dims), matrix)
    for (keys, dims), matrix in zip(steps, matrices, strict=True):
        words = cute.recast_tensor(matrix, cutlass.Int32)
        for half in range(2):
            pair = words[2 * half], words[2 * half + 1]
            for n, selector in enumerate(selectors):
                words[2 * half + n] = cutlass.Int32(cute.arch.prmt(*pair, selector))
        cute.copy(store[0], matrix, store[1].moved(DIM_BLOCK * dims, 2 * keys))


@dataclass(frozen=True)
class _Chunks:
    """Chunks of 16 bytes of a tile of pairs, as seen from one of them, this lane's.

    Attributes:
        address: of the lane's own chunk, swizzled.
        dtype: of pairs.
        rows, panel: of the tile, and chunks in a panel row.
    """

    address: cutlass.Int32
    dtype: cutlass.Constexpr
    rows: cutlass.Constexpr
    panel: cutlass.Constexpr

    @staticmethod
    def of(tile: cute.Tensor, row, chunk) -> _Chunks:
        """``chunk`` is less than the power of two by whose multiples the lane moves."""
        rows, columns = cute.size(tile, mode=[0]), cute.size(tile, mode=[1])
        panel = panel_columns(columns)
        pointer = tile.iterator + row * panel + chunk * MATRIX_PAIRS
        address = swizzled_address(pointer, columns)
        return _Chunks(address, tile.element_type, rows, panel // MATRIX_PAIRS)

    def moved(self, rows: int, chunks: int) -> cute.Tensor:
        """The chunk so many rows (of whole swizzle periods) and chunks away, (8,)."""
        panels, chunks = divmod(chunks, self.panel)
        offset = (panels * self.rows + rows) * self.panel * CHUNK_BYTES
        address = (self.address ^ (chunks * CHUNK_BYTES)) + offset
        pointer = cute.make_ptr(
            self.dtype, address, cute.AddressSpace.smem, assumed_align=CHUNK_BYTES
        )
        return cute.make_tensor(pointer, cute.make_layout(MATRIX_PAIRS))
