"""Shared memory → ldmatrix → mma.sync, one k-step of loads ahead of the products."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute


@dataclass(frozen=True)
class Operand:
    """One matrix operand of a warp-level product that is read from shared memory.

    Attributes:
        copy: ldmatrix tiled to the mma's operand.
        smem: partitioned for the copy, (CPY, CPY_MN, CPY_K[, stage]).
        fragment: the registers as the mma wants them, (MMA, MMA_MN, MMA_K).
        fragment_copy: the same registers as the copy writes them.
    """

    copy: cute.TiledCopy
    smem: cute.Tensor
    fragment: cute.Tensor
    fragment_copy: cute.Tensor

    def at_stage(self, stage) -> Operand:
        """The operand in ring slot ``stage``."""
        return Operand(
            self.copy, self.smem[None, None, None, stage], self.fragment, self.fragment_copy
        )

    def load(self, k: int) -> None:
        """Issue the ldmatrix instructions of k-step ``k``."""
        cute.copy(self.copy, self.smem[None, None, k], self.fragment_copy[None, None, k])


def operand_a(
    tiled_mma: cute.TiledMma, atom: cute.CopyAtom, sA: cute.Tensor, tidx: cutlass.Int32
) -> Operand:
    """``sA`` (M, K) as the left operand."""
    copy = cute.make_tiled_copy_A(atom, tiled_mma)
    thr_copy, thr_mma = copy.get_slice(tidx), tiled_mma.get_slice(tidx)
    fragment = thr_mma.make_fragment_A(thr_mma.partition_A(sA))
    return Operand(copy, thr_copy.partition_S(sA), fragment, thr_copy.retile(fragment))


def operand_b(
    tiled_mma: cute.TiledMma, atom: cute.CopyAtom, sB: cute.Tensor, tidx: cutlass.Int32
) -> Operand:
    """``sB`` (N, K, stage) as the right operand; the fragment is that of one stage."""
    copy = cute.make_tiled_copy_B(atom, tiled_mma)
    thr_copy, thr_mma = copy.get_slice(tidx), tiled_mma.get_slice(tidx)
    fragment = thr_mma.make_fragment_B(thr_mma.partition_B(sB[None, None, 0]))
    return Operand(copy, thr_copy.partition_S(sB), fragment, thr_copy.retile(fragment))


@cute.jit
def gemm_smem_smem(tiled_mma: cute.TiledMma, acc: cute.Tensor, a: Operand, b: Operand):
    """acc += A Bᵀ, both operands in shared memory; the loads of step k + 1 precede the mma of k."""
    steps = cute.size(a.fragment, mode=[2])
    a.load(0)
    b.load(0)
    for k in cutlass.range_constexpr(steps):
        if cutlass.const_expr(k + 1 < steps):
            a.load(k + 1)
            b.load(k + 1)
        cute.gemm(tiled_mma, acc, a.fragment[None, None, k], b.fragment[None, None, k], acc)


@cute.jit
def gemm_reg_smem(tiled_mma: cute.TiledMma, acc: cute.Tensor, tCrA: cute.Tensor, b: Operand):
    """acc += A Bᵀ with A (MMA, MMA_M, MMA_K) already in registers."""
    steps = cute.size(tCrA, mode=[2])
    b.load(0)
    for k in cutlass.range_constexpr(steps):
        if cutlass.const_expr(k + 1 < steps):
            b.load(k + 1)
        cute.gemm(tiled_mma, acc, tCrA[None, None, k], b.fragment[None, None, k], acc)
