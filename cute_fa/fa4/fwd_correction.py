"""CORRECTION: one warpgroup that rescales O in tensor memory where it must, and finishes it."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.packed_math import both, mul2
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tiles import CHUNK_BYTES, WARP_THREADS
from cute_fa.fa4.config import (
    ELEMENT_BYTES,
    WARPGROUP_THREADS,
    WARPGROUP_WARPS,
    Fa4FwdBarrier,
)
from cute_fa.fa4.fwd_context import CtaTile

O_COLUMNS = 32
"""Columns of O in registers at a time."""


@cute.jit
def correct(cta: CtaTile, thread: cutlass.Int32):
    """Rescale the O tiles before each product that is added to them; hand out O / l at the end.

    Waits: barrier RESCALE; signals o, sums.   Signals: p, o_out.
    Registers: cfg.correction_registers.
    """
    cfg = cta.config
    warp = cute.arch.make_warp_uniform(thread // WARP_THREADS)
    count = cta.blocks.count
    if count > 0:
        for i in cutlass.range_constexpr(cfg.num_q_tiles):
            # The first product overwrites O: nothing to rescale.
            cta.signals.p.arrive(cta.buffer(i, 0))
        for j in cutlass.range(1, count, unroll=1):
            for i in cutlass.range_constexpr(cfg.num_q_tiles):
                _rescale(cta, i, j, thread, warp)
    for i in cutlass.range_constexpr(cfg.num_q_tiles):
        _finish(cta, i, thread)
    cute.arch.barrier(barrier_id=int(Fa4FwdBarrier.CORRECTION), number_of_threads=WARPGROUP_THREADS)
    if warp == 0:
        tmem.release(cta.tmem, cfg.tmem_columns)


@cute.jit
def _rescale(
    cta: CtaTile,
    q_tile: cutlass.Constexpr,
    j: cutlass.Int32,
    thread: cutlass.Int32,
    warp: cutlass.Int32,
):
    """O ← O · factor of block ``j``, unless the factors of all 32 rows of the warp are 1."""
    cfg = cta.config
    buffer = cta.buffer(q_tile, j)
    cute.arch.barrier(
        barrier_id=int(Fa4FwdBarrier.RESCALE) + WARPGROUP_WARPS * buffer + warp,
        number_of_threads=2 * WARP_THREADS,
    )
    factor = cta.sFactor[thread, buffer]
    cta.signals.o.wait(q_tile, j - 1)
    if cute.arch.vote_any_sync(factor != 1.0):
        tO = tmem.TmemRow(cta.tmem_o(q_tile), cfg.padded_dv, O_COLUMNS, thread)
        rO = cute.make_rmem_tensor(O_COLUMNS, cutlass.Float32)
        for chunk in cutlass.range_constexpr(tO.num_chunks):
            tO.load(chunk, rO)
            tmem.finish_loads()
            _scale_row(rO, factor)
            tO.store(chunk, rO)
        tmem.finish_stores()
    cta.signals.p.arrive(buffer)


@cute.jit
def _finish(cta: CtaTile, q_tile: cutlass.Constexpr, thread: cutlass.Int32):
    """O / l to 16 bits in shared memory, in Q's place."""
    cfg = cta.config
    count = cta.blocks.count
    total = cutlass.Float32(0.0)
    if count > 0:
        cta.signals.sums.wait(q_tile, 0)
        total = cta.sSum[thread, q_tile]
        # All products of the tile are done, those that read Q as well.
        cta.signals.o.wait(q_tile, count - 1)
    inverse = cute.arch.rcp_approx(cutlass.select_(total == 0.0, cutlass.Float32(1.0), total))
    tO = tmem.TmemRow(cta.tmem_o(q_tile), cfg.padded_dv, O_COLUMNS, thread)
    rO = cute.make_rmem_tensor(O_COLUMNS, cutlass.Float32)
    rO_16 = cute.make_rmem_tensor(O_COLUMNS, DTYPES[cfg.dtype])
    for chunk in cutlass.range_constexpr(tO.num_chunks):
        rO.fill(0.0)
        if count > 0:
            tO.load(chunk, rO)
        _scale_row(rO, inverse)
        rO_16.store(rO.load().to(rO_16.element_type))
        _store_row(cta.sO[None, None, q_tile], thread, chunk, rO_16)
    tmem.finish_loads()
    # TMA reads O through the async proxy.
    cute.arch.fence_view_async_shared()
    cta.signals.o_out.arrive(q_tile)


def _scale_row(rO: cute.Tensor, factor: cutlass.Float32) -> None:
    """rO ← rO · factor, two at a time."""
    for c in range(0, cute.size(rO), 2):
        rO[c], rO[c + 1] = mul2((rO[c], rO[c + 1]), both(factor))


def _store_row(sO: cute.Tensor, row: cutlass.Int32, chunk: int, rO: cute.Tensor) -> None:
    """Chunk ``chunk`` of one row of O, 16 bytes at a time.

    Eight neighbouring rows' 16 bytes lie in different banks: the swizzle of the tile.
    """
    width = CHUNK_BYTES // ELEMENT_BYTES
    atom = cute.make_copy_atom(
        cute.nvgpu.CopyUniversalOp(), rO.element_type, num_bits_per_copy=8 * CHUNK_BYTES
    )
    rows = cute.make_layout((WARPGROUP_THREADS, 1))
    store = cute.make_tiled_copy_tv(atom, rows, cute.make_layout((1, width))).get_slice(row)
    tOsO = store.partition_D(sO)  # (CPY, 1, Dv / 8)
    for part in range(O_COLUMNS // width):
        layout = cute.make_layout(((width, 1), 1))
        src = cute.make_tensor(rO.iterator + part * width, layout)
        cute.copy(store, src, tOsO[None, None, chunk * (O_COLUMNS // width) + part])
