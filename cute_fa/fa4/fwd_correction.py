"""CORRECTION: one warpgroup that rescales O in tensor memory where it must, and finishes it."""

from __future__ import annotations

import cutlass
from cutlass import cute

from cute_fa.blocks import tmem
from cute_fa.blocks.packed_math import both, mul2
from cute_fa.blocks.row_tile import RowTile, Uses
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tile_scheduler import WorkTile, for_each_tile
from cute_fa.blocks.tiles import CHUNK_BYTES, WARP_THREADS, WARPGROUP_THREADS, WARPGROUP_WARPS
from cute_fa.fa4.config import Fa4FwdBarrier
from cute_fa.fa4.fwd_context import Cta

O_COLUMNS = 16
"""Columns of O in registers at a time."""


@cute.jit
def correct(cta: Cta, thread: cutlass.Int32):
    """Rescale O before each product that is added to it, and hand out O / l, of all tiles.

    Waits: barrier RESCALE; signals o, sums, o_gone, q_landed.   Signals: p, sums_taken, o_out.
    Registers: cfg.correction_registers.
    """
    cta = cta.with_tmem()
    warp = cute.arch.make_warp_uniform(thread // WARP_THREADS)

    def correct_tile(work: WorkTile, uses: Uses) -> Uses:
        return _correct_tile(cta, cta.tile(work, uses), thread, warp)

    for_each_tile(cta.schedule, correct_tile, Uses.none())
    if cutlass.const_expr(not cta.config.is_paired):
        # This role has waited for whatever else anybody did to tensor memory.
        cute.arch.barrier(
            barrier_id=int(Fa4FwdBarrier.CORRECTION), number_of_threads=WARPGROUP_THREADS
        )
        if warp == 0:
            tmem.release(cta.tmem, cta.config.tmem_map.columns)


@cute.jit
def _correct_tile(cta: Cta, tile: RowTile, thread: cutlass.Int32, warp: cutlass.Int32) -> Uses:
    cfg = cta.config
    count = tile.blocks.count
    if count > 0:
        # The first product overwrites O, which this role has read: nothing to rescale.
        cta.signals.p.arrive_at(tuple(cta.s_buffer(tile, i, 0) for i in range(cfg.num_q_tiles)))
    for t in cutlass.range(cfg.num_q_tiles, count * cfg.num_q_tiles, unroll=1):
        i, j = t % cfg.num_q_tiles, t // cfg.num_q_tiles
        _rescale(cta, tile, i, j, thread, warp)
    for i in cutlass.range(cfg.num_q_tiles, unroll=1):
        _finish(cta, tile, i, thread)
    return tile.uses_after


@cute.jit
def _rescale(
    cta: Cta,
    tile: RowTile,
    i: cutlass.Int32,
    j: cutlass.Int32,
    thread: cutlass.Int32,
    warp: cutlass.Int32,
):
    """O ← O · factor of block ``j``, unless the factors of all 32 rows of the warp are 1."""
    cfg = cta.config
    buffer = cta.s_buffer(tile, i, j)
    cute.arch.barrier(
        barrier_id=int(Fa4FwdBarrier.RESCALE) + WARPGROUP_WARPS * buffer + warp,
        number_of_threads=2 * WARP_THREADS,
    )
    factor = cta.sFactor[thread, buffer]
    cta.signals.o.wait(i, cta.o_use(tile, j - 1))
    if cute.arch.vote_any_sync(factor != 1.0):
        tO = tmem.TmemRow(cta.tmem_o(i), cfg.padded_dv, O_COLUMNS, thread)
        rO = cute.make_rmem_tensor(O_COLUMNS, cutlass.Float32)
        for chunk in cutlass.range_constexpr(tO.num_chunks):
            tO.load(chunk, rO)
            tmem.finish_loads()
            _scale_row(rO, factor)
            tO.store(chunk, rO)
        tmem.finish_stores()
    cta.signals.p.arrive(buffer)


@cute.jit
def _finish(cta: Cta, tile: RowTile, i: cutlass.Int32, thread: cutlass.Int32):
    """O / l of Q tile ``i`` to 16 bits in shared memory; 0 where no key is seen."""
    cfg = cta.config
    count, tiles = tile.blocks.count, tile.uses.tiles
    cta.signals.sums.wait(i, tiles)
    total = cta.sSum[thread, i]
    if cutlass.const_expr(cfg.is_resident):
        cta.signals.sums_taken.arrive(i)
    if count > 0:
        # All products of the tile are done, those that read Q as well.
        cta.signals.o.wait(i, cta.o_use(tile, count - 1))
    if cutlass.const_expr(not cfg.has_own_o):
        _await_unread_q(cta, tile, i)
    if cutlass.const_expr(cfg.has_o_gone):
        cta.signals.o_gone.wait_for_previous(i, tiles)
    inverse = cute.arch.rcp_approx(cutlass.select_(total == 0.0, cutlass.Float32(1.0), total))
    of_out = cta.descales_of(tile).of_out
    if cutlass.const_expr(of_out is not None):
        inverse = inverse * of_out
    tO = tmem.TmemRow(cta.tmem_o(i), cfg.padded_dv, O_COLUMNS, thread)
    rO = cute.make_rmem_tensor(O_COLUMNS, cutlass.Float32)
    rO_16 = cute.make_rmem_tensor(O_COLUMNS, DTYPES[cfg.out_dtype])
    for chunk in cutlass.range_constexpr(tO.num_chunks):
        rO.fill(0.0)
        if count > 0:
            tO.load(chunk, rO)
        _scale_row(rO, inverse)
        rO_16.store(rO.load().to(rO_16.element_type))
        _store_row(cta.sO[None, None, i], thread, chunk, rO_16)
    tmem.finish_loads()
    # TMA reads O through the async proxy.
    cute.arch.fence_view_async_shared()
    cta.signals.o_out.arrive(i)


@cute.jit
def _await_unread_q(cta: Cta, tile: RowTile, i: cutlass.Int32):
    """If no product has read Q, wait until it has landed: it must not land on O."""
    if cutlass.const_expr(cta.config.has_q_landed):
        cta.signals.q_landed.wait(i, tile.uses.tiles)
    elif tile.blocks.count == 0:
        cta.pipe_q.wait(cta.q_use(tile, i))


def _scale_row(rO: cute.Tensor, factor: cutlass.Float32) -> None:
    """rO ← rO · factor, two at a time."""
    for c in range(0, cute.size(rO), 2):
        rO[c], rO[c + 1] = mul2((rO[c], rO[c + 1]), both(factor))


def _store_row(sO: cute.Tensor, row: cutlass.Int32, chunk: int, rO: cute.Tensor) -> None:
    """Chunk ``chunk`` of one row of O, 16 bytes at a time.

    Eight neighbouring rows' 16 bytes lie in different banks: the swizzle of the tile.
    """
    width = CHUNK_BYTES * 8 // rO.element_type.width
    atom = cute.make_copy_atom(
        cute.nvgpu.CopyUniversalOp(), rO.element_type, num_bits_per_copy=8 * CHUNK_BYTES
    )
    rows = cute.make_layout((WARPGROUP_THREADS, 1))
    store = cute.make_tiled_copy_tv(atom, rows, cute.make_layout((1, width))).get_slice(row)
    tOsO = store.partition_D(sO)  # (CPY, 1, Dv / 8)
    for part in range(O_COLUMNS // width):
        src = cute.make_tensor(rO.iterator + part * width, cute.make_layout(((width, 1), 1)))
        cute.copy(store, src, tOsO[None, None, chunk * (O_COLUMNS // width) + part])
