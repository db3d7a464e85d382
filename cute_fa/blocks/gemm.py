"""Shared memory → ldmatrix → mma.sync, one k-step of loads ahead of the products."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cutlass
from cutlass import cute
from cutlass.cute.nvgpu import warp

from cute_fa.blocks.copies import swizzled_address, transposed_view
from cute_fa.blocks.tiles import CHUNK_BYTES, MMA_K, panel_columns


@dataclass(frozen=True)
class Operand:
    """One matrix operand of a warp-level product, read from shared memory by ldmatrix.x4.

    A lane's address for any 16×16 block of the tile is its address for block (0, 0), XORed with
    the block's place in its panel (0, 32, 64 or 96 bytes) and moved by a constant. So a tile costs
    at most four address registers, whatever its size; the rest are immediates.
    DSL(4.8.1): left to ``cute.copy`` on the swizzled tensor, every k-step repeats the swizzle
    arithmetic and keeps an address of its own, which makes the kernel spill at D = 128.

    Attributes:
        atom: ldmatrix.x4, transposing or not.
        lane_address: swizzled shared address of this lane's row of block (0, 0).
        offsets: static layout of unswizzled offsets in elements, (CPY, CPY_MN, CPY_K).
        fragment: the registers as the mma wants them, (MMA, MMA_MN, MMA_K).
        fragment_copy: the same registers as ldmatrix writes them, (CPY, CPY_MN, CPY_K).
        panel_bytes: length of a panel row.
        xor_steps: consecutive MN blocks whose XOR differs: those of a panel row if rows run along
            K, else 1.
        stage_bytes: distance between ring slots.
    """

    atom: cute.CopyAtom
    lane_address: cutlass.Int32
    offsets: cute.Layout
    fragment: cute.Tensor
    fragment_copy: cute.Tensor
    panel_bytes: cutlass.Constexpr
    xor_steps: cutlass.Constexpr
    stage_bytes: cutlass.Constexpr

    def at_stage(self, stage) -> Operand:
        """The operand in ring slot ``stage``."""
        return replace(self, lane_address=self.lane_address + stage * self.stage_bytes)

    def load(self, k: int) -> None:
        """Issue the ldmatrix instructions of k-step ``k``, 16 columns of K."""
        dtype = self.fragment.element_type
        blocks = cute.slice_(self.offsets, (None, None, 0))  # (CPY, CPY_MN)
        blocks = cute.logical_divide(blocks, (None, self.xor_steps))
        fragment = self.fragment_copy[None, None, k]
        fragment = cute.logical_divide(fragment, (None, self.xor_steps))
        for step in range(self.xor_steps):
            offset = cute.crd2idx((0, step, k), self.offsets) * dtype.width // 8
            in_panel = offset % self.panel_bytes
            address = (self.lane_address ^ in_panel) + (offset - in_panel)
            pointer = cute.make_ptr(
                dtype, address, cute.AddressSpace.smem, assumed_align=CHUNK_BYTES
            )
            src = cute.make_tensor(pointer, cute.slice_(blocks, (None, (0, None))))
            cute.copy(self.atom, src, fragment[None, (step, None)])


def operand_a(tiled_mma: cute.TiledMma, sA: cute.Tensor, tidx: cutlass.Int32) -> Operand:
    """``sA`` (M, K, stage) as the left operand."""
    atom = _ldmatrix_atom(sA.element_type, transpose=False)
    thr_copy = cute.make_tiled_copy_A(atom, tiled_mma).get_slice(tidx)
    thr_mma = tiled_mma.get_slice(tidx)
    fragment = thr_mma.make_fragment_A(thr_mma.partition_A(sA[None, None, 0]))
    return _operand(atom, thr_copy, sA, fragment, is_transposed=False)


def operand_b(
    tiled_mma: cute.TiledMma, sB: cute.Tensor, tidx: cutlass.Int32, *, transpose: bool = False
) -> Operand:
    """``sB`` (N, K, stage) as the right operand; ``transpose``: it is stored (K, N, stage)."""
    atom = _ldmatrix_atom(sB.element_type, transpose=transpose)
    thr_copy = cute.make_tiled_copy_B(atom, tiled_mma).get_slice(tidx)
    thr_mma = tiled_mma.get_slice(tidx)
    view = transposed_view(sB) if transpose else sB
    fragment = thr_mma.make_fragment_B(thr_mma.partition_B(view[None, None, 0]))
    return _operand(atom, thr_copy, view, fragment, is_transposed=transpose)


def _ldmatrix_atom(dtype: type, *, transpose: bool) -> cute.CopyAtom:
    """ldmatrix.x4: four 8×8 matrices of 16-bit elements a time."""
    return cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4), dtype)


def _operand(
    atom: cute.CopyAtom, thr_copy, sX: cute.Tensor, fragment: cute.Tensor, *, is_transposed: bool
) -> Operand:
    """``sX`` (MN, K, stage); memory rows run along K, or along MN if ``is_transposed``."""
    tXsX = thr_copy.partition_S(sX)  # (CPY, CPY_MN, CPY_K, stage)
    element_bytes = sX.element_type.width // 8
    rows_columns = [cute.size(sX, mode=[0]), cute.size(sX, mode=[1])]
    columns = rows_columns[0 if is_transposed else 1]
    panel = panel_columns(columns)
    return Operand(
        atom=atom,
        lane_address=swizzled_address(tXsX.iterator, columns),
        offsets=cute.select(tXsX.layout, mode=[0, 1, 2]),
        fragment=fragment,
        fragment_copy=thr_copy.retile(fragment),
        panel_bytes=panel * element_bytes,
        xor_steps=panel // MMA_K if is_transposed else 1,
        stage_bytes=math.prod(rows_columns) * element_bytes,
    )


def gemm_smem_smem(tiled_mma: cute.TiledMma, acc: cute.Tensor, a: Operand, b: Operand) -> None:
    """acc += A Bᵀ, both operands in shared memory; the loads of step k + 1 precede the mma of k."""
    steps = cute.size(a.fragment, mode=[2])
    a.load(0)
    b.load(0)
    for k in range(steps):
        if k + 1 < steps:
            a.load(k + 1)
            b.load(k + 1)
        cute.gemm(tiled_mma, acc, a.fragment[None, None, k], b.fragment[None, None, k], acc)


def gemm_reg_smem(
    tiled_mma: cute.TiledMma, acc: cute.Tensor, tCrA: cute.Tensor, b: Operand
) -> None:
    """acc += A Bᵀ with A (MMA, MMA_M, MMA_K) already in registers; B as in ``gemm_smem_smem``."""
    steps = cute.size(tCrA, mode=[2])
    b.load(0)
    for k in range(steps):
        if k + 1 < steps:
            b.load(k + 1)
        cute.gemm(tiled_mma, acc, tCrA[None, None, k], b.fragment[None, None, k], acc)
