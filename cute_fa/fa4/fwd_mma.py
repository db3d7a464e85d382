"""MMA: one warp that issues every product, one thread of it each."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks import fp8
from cute_fa.blocks.copies import transposed_view
from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.umma import (
    accumulator,
    gemm,
    mma_smem_smem,
    mma_tmem_smem,
    operand_a,
    operand_a_in_tmem,
    operand_b,
)
from cute_fa.fa4.fwd_context import Cta, unhoisted_zero
from cute_fa.fa4.tmem_map import S_BUFFERS


@dataclass(frozen=True)
class Products:
    """The two products of a CTA and their operands in shared memory."""

    cta: Cta
    mma_qk: cutlass.Constexpr
    mma_pv: cutlass.Constexpr
    tSrQ: cute.Tensor  # descriptors, (MMA, MMA_M, MMA_D, Q tile)
    tSrK: cute.Tensor  # descriptors, (MMA, MMA_N, MMA_D, stage)
    tOrVt: cute.Tensor  # descriptors, (MMA, MMA_Dv, MMA_N, stage)


@cute.jit
def multiply(cta: Cta):
    """Issue S = QKᵀ and O += PV of all tiles.

    Waits: full slots of pipe_q, pipe_kv; signals p, p_rest.
    Signals: s, o, q_landed; empty slots of pipe_q, pipe_kv.
    Registers: cfg.other_registers.
    """
    products = _products(cta.with_tmem())

    def multiply_tile(work: WorkTile, uses: Uses) -> Uses:
        return _multiply_tile(products, cta.tile(work, uses))

    for_each_tile(cta.schedule, multiply_tile, Uses.none())


def _products(cta: Cta) -> Products:
    cfg = cta.config
    dtype = DTYPES[cfg.dtype]
    mma_qk = mma_smem_smem(dtype, cfg.tile_n, cfg.is_paired)
    mma_pv = mma_tmem_smem(dtype, cfg.padded_dv, cfg.is_paired)
    sQ, sK, sV = cta.sQ, cta.sK, cta.sV
    if cfg.is_fp8:
        sQ, sK, sV = map(fp8.bytes_of, (sQ, sK, sV))
    return Products(
        cta=cta,
        mma_qk=mma_qk,
        mma_pv=mma_pv,
        tSrQ=operand_a(mma_qk, sQ),
        tSrK=operand_b(mma_qk, sK),
        tOrVt=operand_b(mma_pv, transposed_view(sV)),
    )


@cute.jit
def _multiply_tile(products: Products, tile: RowTile) -> Uses:
    """All blocks of a tile, S one round of S buffers ahead of O.

    With two Q tiles: S0(0) S1(0) | O0(0) S0(1) O1(0) S1(1) | O0(1) S0(2) … While SOFTMAX works on
    one tile's S, the tensor core works for the other. With one Q tile its blocks alternate instead.
    """
    cta = products.cta
    count, num_q_tiles = tile.blocks.count, cta.config.num_q_tiles
    ahead = S_BUFFERS // num_q_tiles
    for j in cutlass.range(count + ahead, unroll=1):
        # PERF(SASS): each Q tile has code of its own, in which its buffers are constants: on the
        # way from P to the next S there is nothing to compute.
        for i in cutlass.range_constexpr(num_q_tiles):
            if j >= ahead:
                _multiply_pv(products, tile, i, j - ahead)
            if j < count:
                _multiply_qk(products, tile, i, j)
    if count == 0:
        for i in cutlass.range_constexpr(num_q_tiles):
            _await_q(cta, tile, i)
            _release_q(cta, tile, i)
    return tile.uses_after


@cute.jit
def _multiply_qk(products: Products, tile: RowTile, i: cutlass.Constexpr, j: cutlass.Int32):
    """S = Q Kᵀ of block ``j`` and Q tile ``i``.

    Its S buffer is free: MMA has waited for the P that SOFTMAX made of the S before, and issued the
    product that reads that P.
    """
    cta = products.cta
    cfg = cta.config
    n, buffer = cta.k_use(tile, j), cta.s_buffer(tile, i, j)
    if j == 0:
        _await_q(cta, tile, i)
    if cutlass.const_expr(i == 0):
        cta.pipe_kv.wait(n)
    # S = Q Kᵀ   (128, N) = (128, D) @ (D, N)
    gemm(
        products.mma_qk,
        accumulator(products.mma_qk, cfg.tile_n, cta.tmem_s(buffer)),
        products.tSrQ[None, None, None, i + unhoisted_zero(n)],
        products.tSrK[None, None, None, cta.pipe_kv.slot(n)],
        k_steps=range(cfg.padded_d // cfg.mma_k),
        accumulate=False,
        negate_a=None if cfg.has_softcap else cta.scores.scale < 0.0,
    )
    cta.signals.s.commit(buffer)
    if cutlass.const_expr(i == cfg.num_q_tiles - 1):
        cta.commit(cta.pipe_kv.empty(n))
    if j == tile.blocks.count - 1:
        _release_q(cta, tile, i)


@cute.jit
def _await_q(cta: Cta, tile: RowTile, i: cutlass.Constexpr):
    """Q has landed; of a pair, both are told, and either may write O in its place later."""
    cta.pipe_q.wait(cta.q_use(tile, i))
    if cutlass.const_expr(cta.config.has_q_landed):
        cta.signals.q_landed.commit(i)


@cute.jit
def _release_q(cta: Cta, tile: RowTile, i: cutlass.Constexpr):
    """The next tile's Q may land, unless this tile's O is to leave from its place."""
    if cutlass.const_expr(cta.config.is_resident and cta.config.has_own_o):
        cta.commit(cta.pipe_q.empty(cta.q_use(tile, i)))


@cute.jit
def _multiply_pv(products: Products, tile: RowTile, i: cutlass.Constexpr, j: cutlass.Int32):
    """O += P V of block ``j`` and Q tile ``i``, in the two parts in which P arrives."""
    cta = products.cta
    cfg = cta.config
    n, buffer, use = cta.v_use(tile, j), cta.s_buffer(tile, i, j), cta.s_use(tile, i, j)
    steps = cfg.tile_n // cfg.mma_k
    first_steps = cfg.first_part_columns // cfg.mma_k
    acc_O = accumulator(products.mma_pv, cfg.padded_dv, cta.tmem_o(i))
    tOrP = operand_a_in_tmem(
        products.mma_pv, DTYPES[cfg.dtype], cfg.tile_n, cta.tmem_p(buffer + unhoisted_zero(n))
    )
    tOrVt = products.tOrVt[None, None, None, cta.pipe_kv.slot(n)]
    if cutlass.const_expr(i == 0):
        cta.pipe_kv.wait(n)
    cta.signals.p.wait(buffer, use)
    # O += P V   (128, Dv) = (128, N) @ (N, Dv)
    gemm(products.mma_pv, acc_O, tOrP, tOrVt, k_steps=range(first_steps), accumulate=j > 0)
    cta.signals.p_rest.wait(buffer, use)
    gemm(products.mma_pv, acc_O, tOrP, tOrVt, k_steps=range(first_steps, steps), accumulate=True)
    cta.signals.o.commit(i)
    if cutlass.const_expr(i == cfg.num_q_tiles - 1):
        cta.commit(cta.pipe_kv.empty(n))
