"""The end of one step: m, l and O in HBM are brought up to date with one K/V block."""

from __future__ import annotations

import cutlass
from cutlass import Float32, cute

from cute_fa.blocks.block_range import key_blocks
from cute_fa.blocks.gemm import gemm_reg_smem, operand_b
from cute_fa.blocks.math import LN_2, NEG_INF, exp2
from cute_fa.blocks.mma import tiled_mma_rows
from cute_fa.blocks.softmax import finite_anchor
from cute_fa.fa1.fwd_context import Fa1Context, Visit

VECTOR = 4  # fp32 elements of O that a thread updates at once: 16 bytes


@cute.jit
def update_statistics(ctx: Fa1Context, visit: Visit):
    """m, l ← those of the old keys and this block's; the two scales of O into shared memory.

    Thread r < M owns row r. Equations of Algorithm 1, lines 11 and 12, with m̃, l̃ of this block:
        m' = max(m, m̃)      l' = e^(m − m') l + e^(m̃ − m') l̃
        scale_old = l e^(m − m') / l'      scale_new = e^(m̃ − m') / l'
    """
    cfg, smem, gmem = ctx.config, ctx.smem, ctx.gmem
    cute.arch.sync_threads()
    if ctx.tidx < cfg.tile_m:
        row = visit.m_block * cfg.tile_m + ctx.tidx
        is_row = row < ctx.band.seqlen.seqlen_q
        tile_max = smem.sWarpMax[0, ctx.tidx]
        tile_sum = smem.sWarpSum[0, ctx.tidx]
        for w in cutlass.range_constexpr(1, cfg.num_warps):
            tile_max = cute.arch.fmax(tile_max, smem.sWarpMax[w, ctx.tidx])
            tile_sum = tile_sum + smem.sWarpSum[w, ctx.tidx]
        old_max, old_sum = Float32(NEG_INF), Float32(0.0)
        if is_row and not visit.is_first:
            old_max, old_sum = gmem.gRowMax[row], gmem.gRowSum[row]
        new_max = cute.arch.fmax(old_max, tile_max)
        # A row that has seen nothing yet: both exponentials below are of −inf, both sums are 0.
        anchor = finite_anchor(new_max)
        old_sum = old_sum * exp2(old_max - anchor)
        tile_scale = exp2(tile_max - anchor)
        new_sum = old_sum + tile_sum * tile_scale
        has_seen = new_sum != 0.0
        inverse = cutlass.select_(has_seen, 1.0 / new_sum, Float32(0.0))
        smem.sScaleOld[ctx.tidx] = old_sum * inverse
        smem.sScaleNew[ctx.tidx] = tile_scale * inverse
        if is_row:
            if visit.is_last:
                lse = (new_max + cute.math.log2(new_sum, fastmath=True)) * LN_2
                gmem.gLSE[row] = cutlass.select_(has_seen, lse, Float32(NEG_INF))
            else:
                gmem.gRowMax[row] = new_max
                gmem.gRowSum[row] = new_sum


@cute.jit
def update_output(ctx: Fa1Context, visit: Visit, tOrP: cute.Tensor):
    """O ← scale_old · O + scale_new · Σ_w P_w V_jw, tile_dv columns at a time.

    Each warp has only its slice of the keys, so the whole tile crosses shared memory in fp32 once
    per warp: what FA2's split over rows does away with.
    """
    cfg = ctx.config
    for chunk in cutlass.range(cfg.padded_dv // cfg.tile_dv, unroll=1):
        acc_O = _partial_output(ctx, tOrP, chunk)
        if chunk > 0:
            cute.arch.sync_threads()  # the columns before have been read by everyone
        _store_partial(ctx, acc_O)
        cute.arch.sync_threads()
        _combine(ctx, visit, chunk)


@cute.jit
def _partial_output(ctx: Fa1Context, tOrP: cute.Tensor, chunk: cutlass.Int32) -> cute.Tensor:
    """This warp's (M, tile_dv) of P V: over its slice of the keys only."""
    cfg = ctx.config
    dtype = ctx.smem.sV.element_type
    tiled_mma = tiled_mma_rows(dtype, 1)
    slice_shape = (cfg.slice_n, cfg.tile_dv, 1)
    sV_w = cute.local_tile(ctx.smem.sV, slice_shape, (ctx.warp_idx, 0, chunk))
    shape_O = tiled_mma.get_slice(ctx.lane).partition_shape_C((cfg.tile_m, cfg.tile_dv))
    acc_O = cute.make_rmem_tensor(shape_O, Float32)  # ((2, 2), MMA_M, MMA_DV)
    acc_O.fill(0.0)
    # O_w = P_w @ V_jw   (M, tile_dv) = (M, slice_n) @ (slice_n, tile_dv)
    gemm_reg_smem(tiled_mma, acc_O, tOrP, operand_b(tiled_mma, sV_w, ctx.lane, transpose=True))
    return acc_O


@cute.jit
def _store_partial(ctx: Fa1Context, acc_O: cute.Tensor):
    thr_mma = tiled_mma_rows(ctx.smem.sV.element_type, 1).get_slice(ctx.lane)
    tOsO = thr_mma.partition_C(ctx.smem.sPartialO[ctx.warp_idx, None, None])
    cute.autovec_copy(acc_O, tOsO)


@cute.jit
def _combine(ctx: Fa1Context, visit: Visit, chunk: cutlass.Int32):
    """Sum the warps' partial O of these columns and rescale; the last visit rounds to the dtype."""
    cfg, gmem, smem = ctx.config, ctx.gmem, ctx.smem
    row_threads = cfg.tile_dv // VECTOR
    column = chunk * cfg.tile_dv + ctx.tidx % row_threads * VECTOR
    for i in cutlass.range_constexpr(cfg.tile_m // cfg.update_rows):
        tile_row = i * cfg.update_rows + ctx.tidx // row_threads
        row = visit.m_block * cfg.tile_m + tile_row
        if row < ctx.band.seqlen.seqlen_q and column < cfg.head_dim_v:
            total = _vector(smem.sPartialO[0, tile_row, None], ctx.tidx % row_threads).load()
            for w in cutlass.range_constexpr(1, cfg.num_warps):
                part = _vector(smem.sPartialO[w, tile_row, None], ctx.tidx % row_threads)
                total = total + part.load()
            rO = cute.make_rmem_tensor(VECTOR, Float32)
            rO.store(total * smem.sScaleNew[tile_row])
            gOaccum = _vector(gmem.gOaccum[row, None], column // VECTOR)
            if not visit.is_first:
                rOld = cute.make_rmem_tensor(VECTOR, Float32)
                cute.autovec_copy(gOaccum, rOld)
                rO.store(rO.load() + rOld.load() * smem.sScaleOld[tile_row])
            if visit.is_last:
                rOut = cute.make_rmem_tensor(VECTOR, gmem.gO.element_type)
                rOut.store(rO.load().to(gmem.gO.element_type))
                cute.autovec_copy(rOut, _vector(gmem.gO[row, None], column // VECTOR))
            else:
                cute.autovec_copy(rO, gOaccum)


@cute.jit
def write_unseen_rows(ctx: Fa1Context):
    """O = 0 and LSE = −inf for the Q blocks that no K/V block will visit."""
    cfg, gmem = ctx.config, ctx.gmem
    seqlen_q = ctx.band.seqlen.seqlen_q
    for m_block in cutlass.range(cute.ceil_div(seqlen_q, cfg.tile_m), unroll=1):
        if key_blocks(ctx.band, m_block, cfg.tile_m, cfg.tile_n).count == 0:
            row = m_block * cfg.tile_m + ctx.tidx
            if ctx.tidx < cfg.tile_m and row < seqlen_q:
                gmem.gLSE[row] = Float32(NEG_INF)
                rZero = cute.make_rmem_tensor(VECTOR, gmem.gO.element_type)
                rZero.fill(0.0)
                for j in cutlass.range(cfg.head_dim_v // VECTOR, unroll=1):
                    cute.autovec_copy(rZero, _vector(gmem.gO[row, None], j))


def _vector(row: cute.Tensor, index: cutlass.Int32) -> cute.Tensor:
    """The index-th aligned group of VECTOR elements of a row."""
    return cute.local_tile(row, (VECTOR,), (index,))
