"""Programs for sm_80: cp.async, barriers, shuffles, bounds. All map float32 vectors:
``program(source, out)``.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.memory

from tests.sim.mistakes.program import Program

THREADS = 128
WARPS = THREADS // 32
TILE = 4 * THREADS
TILES = 4


class OneCta(Program):
    """One CTA of ``THREADS`` threads."""

    @cute.jit
    def __call__(self, source: cute.Tensor, out: cute.Tensor):
        self.kernel(source, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])


class RingCopy(OneCta):
    """``out[t, i] = source[t, TILE-1-i]``: tiles come through a ring of two slots by cp.async."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        ring = cutlass.memory.SmemAllocator().allocate_tensor(
            cutlass.Float32, cute.make_layout((TILE, 2)), byte_alignment=16
        )
        self.fetch(source, ring, thread, 0)
        for t in cutlass.range_constexpr(TILES):
            if cutlass.const_expr(t + 1 < TILES):
                self.fetch(source, ring, thread, t + 1)
            pending = 1 if t + 1 < TILES or self.has("a wait that leaves a group pending") else 0
            if cutlass.const_expr(not self.has("no cp_async_wait_group")):
                cute.arch.cp_async_wait_group(pending)
            if cutlass.const_expr(not self.has("no barrier behind the wait")):
                cute.arch.sync_threads()
            if cutlass.const_expr(self.has("a store into a slot being filled")):
                ring[4 * thread, (t + 1) % 2] = cutlass.Float32(0.0)
            for i in cutlass.range_constexpr(4):
                where = i * THREADS + thread
                out[where + t * TILE] = ring[TILE - 1 - where, t % 2]
            if cutlass.const_expr(not self.has("no barrier before the refill")):
                cute.arch.sync_threads()

    @cute.jit
    def fetch(self, source, ring, thread, t: cutlass.Constexpr):
        copy = cute.make_copy_atom(
            cute.nvgpu.cpasync.CopyG2SOp(), cutlass.Float32, num_bits_per_copy=128
        )
        begin = cute.domain_offset((t * TILE,), source)
        if cutlass.const_expr(self.has("an address that is not 16-byte aligned")):
            address = (source.iterator + t * TILE + 1).toint()
            gmem = cute.AddressSpace.gmem
            wrong = cute.make_ptr(cutlass.Float32, address, gmem, assumed_align=16)
            begin = cute.make_tensor(wrong, cute.make_layout(TILE))
        slot = cute.slice_(ring, (None, t % 2))
        if cutlass.const_expr(self.has("two warps fill one place") and t == 0):
            thread = thread % 96
        piece = cute.local_tile(begin, (4,), (thread,))
        cute.copy(copy, piece, cute.local_tile(slot, (4,), (thread,)))
        if cutlass.const_expr(not self.has("no cp_async_commit_group")):
            cute.arch.cp_async_commit_group()


class Exchange(OneCta):
    """``out[i] = source[i] + source[i ^ 64]``: warps exchange values in shared memory."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = thread // 32, thread % 32
        staged = cutlass.memory.SmemAllocator().allocate_tensor(
            cutlass.Float32, cute.make_layout(THREADS), byte_alignment=16
        )
        where = thread
        if cutlass.const_expr(self.has("an index past shared memory")):
            where = thread + 100_000
        if cutlass.const_expr(self.has("two warps write one place")):
            where = thread % 64
        if cutlass.const_expr(self.has("the last warp writes nothing")):
            if warp < WARPS - 1:
                staged[where] = source[thread]
        else:
            staged[where] = source[thread]

        if cutlass.const_expr(self.has("a barrier for some lanes of a warp")):
            if lane < 16:
                cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)
        elif cutlass.const_expr(self.has("a barrier of their own for half of a warp's lanes")):
            if lane < 16:
                cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)
            else:
                cute.arch.barrier(barrier_id=2, number_of_threads=THREADS)
        elif cutlass.const_expr(self.has("a barrier for some warps")):
            if warp < 2:
                cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)
        elif cutlass.const_expr(self.has("a barrier of too few threads")):
            cute.arch.barrier(barrier_id=1, number_of_threads=THREADS // 2)
        elif cutlass.const_expr(self.has("a barrier of too many threads")):
            cute.arch.barrier(barrier_id=1, number_of_threads=2 * THREADS)
        elif cutlass.const_expr(self.has("two counts for one barrier")):
            if warp < 2:
                cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)
            else:
                cute.arch.barrier(barrier_id=1, number_of_threads=THREADS - 32)
        elif cutlass.const_expr(self.has("two barriers where one was meant")):
            cute.arch.barrier(barrier_id=1 + warp // 2, number_of_threads=THREADS)
        elif cutlass.const_expr(self.has("arrivals where waits were meant")):
            cute.arch.barrier_arrive(barrier_id=1, number_of_threads=THREADS)
        elif cutlass.const_expr(self.has("a warp barrier where a CTA barrier was meant")):
            cute.arch.sync_warp()
        elif cutlass.const_expr(not self.has("no barrier")):
            cute.arch.barrier(barrier_id=1, number_of_threads=THREADS)
        out[thread] = source[thread] + staged[thread ^ 64]


class WarpSums(OneCta):
    """``out[i]`` = the sum of all ``THREADS`` numbers: by shuffles, then through shared memory."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = thread // 32, thread % 32
        sums = cutlass.memory.SmemAllocator().allocate_tensor(
            cutlass.Float32, cute.make_layout(WARPS), byte_alignment=16
        )
        total = source[thread]
        if cutlass.const_expr(self.has("a shuffle by some lanes")):
            if lane < 20:
                for step in cutlass.range_constexpr(5):
                    total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        else:
            for step in cutlass.range_constexpr(5):
                total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        if lane == 0:
            sums[warp] = total
        if cutlass.const_expr(not self.has("no barrier before the last sum")):
            cute.arch.sync_threads()
        whole = cutlass.Float32(0.0)
        for w in cutlass.range_constexpr(WARPS):
            whole += sums[w]
        out[thread] = whole


class Shift(OneCta):
    """``out[i] = source[i + 1]``, 0 at the end, for vectors that are no multiple of the CTA."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        count = cute.size(source)
        stop = count if self.has("no bounds on the load") else count - 1
        for t in cutlass.range_constexpr(cute.ceil_div(count, THREADS)):
            index = t * THREADS + thread
            value = cutlass.Float32(0.0)
            if index < stop:
                value = source[index + 1]
            if cutlass.const_expr(self.has("no bounds on the store")):
                out[index] = value
            elif cutlass.const_expr(self.has("a bound that is off by one")):
                if index <= count:
                    out[index] = value
            elif index < count:
                out[index] = value
