"""Scores and exponentials of one step: sliced K, each warp its own columns of the K/V block."""

from __future__ import annotations

import cutlass
from cutlass import Float32, cute

from cute_fa.blocks.gemm import gemm_smem_smem, operand_a, operand_b
from cute_fa.blocks.mask import mask_scores
from cute_fa.blocks.math import exp2, quad_max, quad_sum, tanh_from_exp2
from cute_fa.blocks.mma import as_operand_a, rows_by_columns, tiled_mma_rows
from cute_fa.blocks.softmax import finite_anchor, row_max, row_sum
from cute_fa.fa1.fwd_context import Fa1Context, Visit


@cute.jit
def scores(ctx: Fa1Context, visit: Visit) -> cute.Tensor:
    """This warp's (M, slice_n) of the scores in log2 units, hidden ones −inf.

    Scaled before it is masked, so that a softmax_scale of any sign, or 0, keeps −inf what it is.
    """
    cfg = ctx.config
    dtype = ctx.smem.sQ.element_type
    # One warp's own product: the warps share no tile of it, lane stands for the thread.
    tiled_mma = tiled_mma_rows(dtype, 1)
    thr_mma = tiled_mma.get_slice(ctx.lane)
    slice_shape = (cfg.slice_n, cfg.padded_d, 1)
    sK_w = cute.local_tile(ctx.smem.sK, slice_shape, (ctx.warp_idx, 0, 0))
    shape_S = thr_mma.partition_shape_C((cfg.tile_m, cfg.slice_n))
    acc_S = cute.make_rmem_tensor(shape_S, Float32)  # ((2, 2), MMA_M, MMA_N)
    acc_S.fill(0.0)
    # S_w = Q_i @ K_jwᵀ   (M, slice_n) = (M, D) @ (D, slice_n)
    q = operand_a(tiled_mma, ctx.smem.sQ, ctx.lane)
    gemm_smem_smem(tiled_mma, acc_S, q, operand_b(tiled_mma, sK_w, ctx.lane))
    acc_S.store(acc_S.load() * ctx.score_scale)
    if cutlass.const_expr(cfg.has_softcap):
        for i in cutlass.range_constexpr(cute.size(acc_S)):
            acc_S[i] = ctx.softcap_log2 * tanh_from_exp2(acc_S[i])
    if visit.is_masked:
        row = visit.m_block * cfg.tile_m + _row_of(ctx, 0)
        column = visit.n_block * cfg.tile_n + ctx.warp_idx * cfg.slice_n + ctx.lane % 4 * 2
        mask_scores(acc_S, ctx.band, row, column, num_warps=1)
    return acc_S


@cute.jit
def exponentials(ctx: Fa1Context, acc_S: cute.Tensor) -> cute.Tensor:
    """P_w = exp2(S_w − m̃), m̃ the row maximum over all warps' slices, as the A operand of P V.

    Leaves every warp's row maxima and row sums in sWarpMax and sWarpSum, the latter without a
    barrier behind it.
    """
    cfg = ctx.config
    S = rows_by_columns(acc_S)  # (2 · MMA_M, 2 · MMA_N): this thread's rows × columns
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        _store_once_per_quad(ctx, ctx.smem.sWarpMax, r, quad_max(row_max(S, r)))
    cute.arch.sync_threads()
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        tile_max = ctx.smem.sWarpMax[0, _row_of(ctx, r)]
        for w in cutlass.range_constexpr(1, cfg.num_warps):
            tile_max = cute.arch.fmax(tile_max, ctx.smem.sWarpMax[w, _row_of(ctx, r)])
        S[r, None].store(exp2(S[r, None].load() - finite_anchor(tile_max)))
        _store_once_per_quad(ctx, ctx.smem.sWarpSum, r, quad_sum(row_sum(S, r)))
    rP = cute.make_rmem_tensor_like(acc_S, ctx.smem.sV.element_type)
    rP.store(acc_S.load().to(ctx.smem.sV.element_type))
    return as_operand_a(rP)


def _row_of(ctx: Fa1Context, r: int):
    """Row in the tile of this thread's r-th accumulator row: lane / 4, then 8 further, then the
    next 16 (PTX ISA, matrix fragments for mma.m16n8k16)."""
    return ctx.lane // 4 + 8 * r


@cute.jit
def _store_once_per_quad(ctx: Fa1Context, sX: cute.Tensor, r: cutlass.Constexpr, value: Float32):
    if ctx.lane % 4 == 0:
        sX[ctx.warp_idx, _row_of(ctx, r)] = value
