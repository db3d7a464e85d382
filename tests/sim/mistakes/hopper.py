"""Programs for sm_90a: TMA with mbarriers both ways, wgmma, clusters, register reallocation."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import TensorMapManager, TensorMapUpdateMode
from cutlass.utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from tests.sim.mistakes.program import Program

THREADS = 128
WARPS = THREADS // 32

ROWS, COLUMNS = 32, 32
TILE_BYTES = 4 * ROWS * COLUMNS
TILES = 4
PER_THREAD = ROWS * COLUMNS // THREADS

MAP_BYTES = 128

MMA_M = MMA_N = 64
MMA_K = 64
MMA_TILES = 3


class TmaScale(Program):
    """``out = 2 * source``, float32 (TILES * ROWS, COLUMNS): TMA into a ring of two slots and out
    of a staging tile; warp 0 issues everything."""

    @cute.jit
    def __call__(self, source: cute.Tensor, out: cute.Tensor):
        tile = cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1))
        ops = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        load = cpasync.make_tiled_tma_atom(ops[0], source, tile, (ROWS, COLUMNS))
        store = cpasync.make_tiled_tma_atom(ops[1], out, tile, (ROWS, COLUMNS))
        self.kernel(*load, *store).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(
        self, load: cute.CopyAtom, mSource: cute.Tensor, store: cute.CopyAtom, mOut: cute.Tensor
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        smem = cutlass.memory.SmemAllocator()
        shape = ROWS, COLUMNS
        ring = smem.allocate_tensor(
            cutlass.Float32,
            cute.make_layout((*shape, 2), stride=(COLUMNS, 1, ROWS * COLUMNS)),
            byte_alignment=128,
        )
        staged = smem.allocate_tensor(
            cutlass.Float32, cute.make_layout(shape, stride=(COLUMNS, 1)), byte_alignment=128
        )
        barriers = smem.allocate_array(cutlass.Int64, 4)
        full, empty = barriers, barriers + 2
        if warp == 0:
            self.initialise(full, empty)
        if cutlass.const_expr(not self.has("no barrier behind mbarrier_init")):
            cute.arch.sync_threads()

        alone = cute.make_layout(1)
        sS, gS = cpasync.tma_partition(
            load,
            0,
            alone,
            cute.group_modes(ring, 0, 2),
            cute.group_modes(cute.local_tile(mSource, shape, (None, 0)), 0, 2),
        )
        sO, gO = cpasync.tma_partition(
            store,
            0,
            alone,
            cute.group_modes(staged, 0, 2),
            cute.group_modes(cute.local_tile(mOut, shape, (None, 0)), 0, 2),
        )
        for t in cutlass.range_constexpr(2):
            self.fetch(load, gS, sS, full, empty, warp, t)
        for t in cutlass.range_constexpr(TILES):
            slot = t % 2
            if cutlass.const_expr(self.has("a wait for the other parity")):
                cute.arch.mbarrier_wait(full + slot, (t // 2 + 1) % 2)
            elif cutlass.const_expr(not self.has("no wait for the tile")):
                cute.arch.mbarrier_wait(full + slot, t // 2 % 2)
            if cutlass.const_expr(self.has("a slot released before it is read")):
                self.release(empty + slot)
            values = cute.make_rmem_tensor((PER_THREAD,), cutlass.Float32)
            for i in cutlass.range_constexpr(PER_THREAD):
                where = i * THREADS + thread
                values[i] = 2 * ring[where // COLUMNS, where % COLUMNS, slot]
            if cutlass.const_expr(not self.has("a slot released before it is read")):
                self.release(empty + slot)
            if cutlass.const_expr(t + 2 < TILES):
                self.fetch(load, gS, sS, full, empty, warp, t + 2)
            self.write(store, staged, sO, gO, values, thread, warp, t)
        if cutlass.const_expr(not self.has("exit before the store has read")):
            self.await_store(warp)

    @cute.jit
    def initialise(self, full, empty):
        readers = WARPS
        if cutlass.const_expr(self.has("an empty barrier that counts threads")):
            readers = THREADS
        if cutlass.const_expr(self.has("an empty barrier that counts one warp")):
            readers = 1
        with cute.arch.elect_one():
            for slot in cutlass.range_constexpr(2):
                if cutlass.const_expr(not (self.has("a barrier without mbarrier_init") and slot)):
                    cute.arch.mbarrier_init(full + slot, 1)
                cute.arch.mbarrier_init(empty + slot, readers)
        if cutlass.const_expr(not self.has("no mbarrier_init_fence")):
            cute.arch.mbarrier_init_fence()

    @cute.jit
    def fetch(self, load, source, ring, full, empty, warp, t: cutlass.Constexpr):
        slot = t % 2
        nbytes = TILE_BYTES
        if cutlass.const_expr(self.has("half the bytes announced")):
            nbytes = TILE_BYTES // 2
        if cutlass.const_expr(self.has("twice the bytes announced")):
            nbytes = 2 * TILE_BYTES
        if warp == 0:
            if cutlass.const_expr(t > 1 and not self.has("no wait for the empty slot")):
                cute.arch.mbarrier_wait(empty + slot, (t // 2 + 1) % 2)
            if cutlass.const_expr(self.has("every lane announces")):
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, nbytes)
            elif cutlass.const_expr(self.has("no bytes announced")):
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(full + slot)
            elif cutlass.const_expr(self.has("bytes announced after the copy")):
                pass
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + slot, nbytes)
            to = ring[None, 0 if self.has("one slot filled in every round") else slot]
            cute.copy(load, source[None, t], to, tma_bar_ptr=full + slot)

    @cute.jit
    def release(self, empty):
        cute.arch.sync_warp()
        if cutlass.const_expr(not self.has("a slot is never released")):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty)

    @cute.jit
    def await_store(self, warp):
        if warp == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def write(self, store, staged, shared, out, values, thread, warp, t: cutlass.Constexpr):
        if cutlass.const_expr(t > 0):
            if cutlass.const_expr(not self.has("staging rewritten while the store reads")):
                self.await_store(warp)
            cute.arch.sync_threads()
        for i in cutlass.range_constexpr(PER_THREAD):
            where = i * THREADS + thread
            staged[where // COLUMNS, where % COLUMNS] = values[i]
        if cutlass.const_expr(not self.has("no proxy fence before the store")):
            cute.arch.fence_proxy("async.shared", space="cta")
        if cutlass.const_expr(not self.has("no barrier before the store")):
            cute.arch.sync_threads()
        if warp == 0:
            cute.copy(store, shared, out[None, t])
            if cutlass.const_expr(not self.has("no commit of the store")):
                cute.arch.cp_async_bulk_commit_group()


class WarpgroupGemm(Program):
    """``out = a b^T``: float16 (64, K) by (64, K), float32 out; operands stored by threads."""

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
        tile = MMA_M, MMA_N, MMA_K
        row = LayoutEnum.ROW_MAJOR
        mma = sm90.make_trivial_tiled_mma(
            cutlass.Float16,
            cutlass.Float16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            cutlass.Float32,
            (1, 1, 1),
            (64, MMA_N),
        )
        layout_a = sm90.make_smem_layout_a(row, tile, cutlass.Float16, 2)
        layout_b = sm90.make_smem_layout_b(row, tile, cutlass.Float16, 2)
        self.kernel(mma, a, b, out, layout_a, layout_b).launch(
            grid=[1, 1, 1], block=[THREADS, 1, 1]
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        a: cute.Tensor,
        b: cute.Tensor,
        out: cute.Tensor,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        smem = cutlass.memory.SmemAllocator()
        sA, sB = (
            smem.allocate_tensor(cutlass.Float16, x.outer, byte_alignment=1024, swizzle=x.inner)
            for x in (layout_a, layout_b)
        )
        part = mma.get_slice(thread)
        tCrA = mma.make_fragment_A(part.partition_A(sA))
        tCrB = mma.make_fragment_B(part.partition_B(sB))
        tCgC = part.partition_C(out)
        acc = cute.make_rmem_tensor(tCgC.shape, cutlass.Float32)
        self.fill(a, sA, thread, 0)
        self.fill(b, sB, thread, 0)
        for k in cutlass.range_constexpr(MMA_TILES):
            if cutlass.const_expr(not self.has("no proxy fence before the product")):
                cute.arch.fence_proxy("async.shared", space="cta")
            if cutlass.const_expr(not self.has("no barrier before the product")):
                cute.arch.sync_threads()
            if cutlass.const_expr(not self.has("no warpgroup.fence") or k > 0):
                warpgroup.fence()
            for step in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
                mma.set(warpgroup.Field.ACCUMULATE, k > 0 or step > 0)
                now = None, None, step, k % 2
                cute.gemm(mma, acc, tCrA[now], tCrB[now], acc)
            if cutlass.const_expr(not self.has("no warpgroup.commit_group")):
                warpgroup.commit_group()
            if cutlass.const_expr(k + 1 < MMA_TILES):
                self.fill(a, sA, thread, k + 1)
                self.fill(b, sB, thread, k + 1)
            if cutlass.const_expr(self.has("operands refilled before the product is complete")):
                warpgroup.wait_group(1)
            elif cutlass.const_expr(not self.has("no warpgroup.wait_group")):
                warpgroup.wait_group(0)
            if cutlass.const_expr(self.has("an accumulator read before the wait")):
                acc[0] = acc[0] + 1.0
            cute.arch.sync_threads()
        for i in cutlass.range_constexpr(cute.size(acc)):
            tCgC[i] = acc[i]

    @cute.jit
    def fill(self, source, tile, thread, k: cutlass.Constexpr):
        """Thread t stores half of row t / 2."""
        row, half = thread // 2, thread % 2 * (MMA_K // 2)
        for i in cutlass.range_constexpr(MMA_K // 2):
            tile[row, half + i, k % 2] = source[row, k * MMA_K + half + i]


class ChangedMap(Program):
    """``out = source``, float32 (ROWS, COLUMNS), by TMA with a tensor map that warp 0 writes to
    ``maps`` and warp 1 uses."""

    @cute.jit
    def __call__(self, source: cute.Tensor, maps: cute.Tensor, out: cute.Tensor):
        tile = cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1))
        op = cpasync.CopyBulkTensorTileG2SOp()
        load = cpasync.make_tiled_tma_atom(op, source, tile, (ROWS, COLUMNS))
        self.kernel(*load, source, maps, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(
        self,
        load: cute.CopyAtom,
        mSource: cute.Tensor,
        source: cute.Tensor,
        maps: cute.Tensor,
        out: cute.Tensor,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        smem = cutlass.memory.SmemAllocator()
        staged = smem.allocate_tensor(
            cutlass.Float32,
            cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1)),
            byte_alignment=128,
        )
        full = smem.allocate_array(cutlass.Int64, 1)
        manager = TensorMapManager(TensorMapUpdateMode.GMEM, MAP_BYTES)
        written = manager.get_tensormap_ptr(maps.iterator)
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
            if cutlass.const_expr(self.has("a map acquired before it is changed")):
                manager.fence_tensormap_update(written)
            manager.init_tensormap_from_atom(load, written, 0)
            manager.fence_tensormap_initialization()
            cpasync.update_tma_descriptor(load, source, written)
            cute.arch.sync_warp()
            if cutlass.const_expr(not self.has("a changed map that is not released")):
                cpasync.fence_tma_desc_release()
        cute.arch.sync_threads()
        sS, gS = cpasync.tma_partition(
            load,
            0,
            cute.make_layout(1),
            cute.group_modes(staged, 0, 2),
            cute.group_modes(mSource, 0, 2),
        )
        if warp == 1:
            if cutlass.const_expr(
                not self.has("a changed map that is not acquired")
                and not self.has("a map acquired before it is changed")
            ):
                manager.fence_tensormap_update(written)
            used = manager.get_tensormap_ptr(maps.iterator, cute.AddressSpace.generic)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, TILE_BYTES)
            cute.copy(load, gS, sS, tma_bar_ptr=full, tma_desc_ptr=used)
        cute.arch.mbarrier_wait(full, 0)
        for i in cutlass.range_constexpr(PER_THREAD):
            where = i * THREADS + thread
            out[where // COLUMNS, where % COLUMNS] = staged[where // COLUMNS, where % COLUMNS]


class PairOfCtas(Program):
    """A cluster of two CTAs of ``THREADS`` threads."""

    @cute.jit
    def __call__(self, source: cute.Tensor, out: cute.Tensor):
        self.kernel(source, out).launch(grid=[2, 1, 1], block=[THREADS, 1, 1], cluster=[2, 1, 1])


class ClusterExchange(PairOfCtas):
    """``out`` is ``source`` with its halves exchanged, by distributed shared memory."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        rank, _, _ = cute.arch.block_idx()
        layout = cute.make_layout(THREADS)
        own = cutlass.memory.SmemAllocator().allocate_tensor(
            cutlass.Float32, layout, byte_alignment=16
        )
        peer = 1 - rank
        if cutlass.const_expr(self.has("a rank that the cluster does not have")):
            peer = rank + 1
        theirs = cute.make_ptr(
            cutlass.Float32,
            cute.arch.map_dsmem_ptr(own.iterator + thread, peer).toint(),
            cute.AddressSpace.smem,
        )
        index = rank * THREADS + thread
        if cutlass.const_expr(self.has("arrive twice")):
            cute.arch.cluster_arrive()
        if cutlass.const_expr(self.has("wait without arrive")):
            cute.arch.cluster_wait()
        if cutlass.const_expr(self.has("the peer leaves before it is read")):
            own[thread] = source[index]
            self.sync()
            out[index] = cute.arch.load(theirs, cutlass.Float32, ss="cluster")
        else:
            self.sync()
            cute.arch.store(theirs, source[index], ss="cluster")
            if cutlass.const_expr(self.has("a CTA barrier where a cluster barrier was meant")):
                cute.arch.sync_threads()
            elif cutlass.const_expr(self.has("a relaxed arrive")):
                cute.arch.cluster_arrive_relaxed()
                cute.arch.cluster_wait()
            elif cutlass.const_expr(self.has("a cluster barrier for one CTA")):
                if rank == 0:
                    self.sync()
            else:
                self.sync()
            out[index] = own[thread]

    @cute.jit
    def sync(self):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


class ClusterSignal(PairOfCtas):
    """``out = source``: CTA 1 begins when CTA 0 arrives at a barrier of CTA 1's."""

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        rank, _, _ = cute.arch.block_idx()
        begun = cutlass.memory.SmemAllocator().allocate_array(cutlass.Int64, 1)
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(begun, 1)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.has("an arrival that may come before mbarrier_init")):
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        if rank == 0:
            if warp == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(begun, 1)
        elif cutlass.const_expr(not self.has("the peer leaves before the arrival")):
            cute.arch.mbarrier_wait(begun, 0)
        index = rank * THREADS + thread
        out[index] = source[index]


class Registers(Program):
    """``out = source``: one warpgroup gives registers away, another takes them."""

    @cute.jit
    def __call__(self, source: cute.Tensor, out: cute.Tensor):
        self.kernel(source, out).launch(grid=[1, 1, 1], block=[3 * THREADS, 1, 1])

    @cute.kernel
    def kernel(self, source: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(thread // THREADS)
        if group == 0:
            if cutlass.const_expr(not self.has("nobody gives registers away")):
                cute.arch.setmaxregister_decrease(24)
        else:
            if cutlass.const_expr(self.has("more registers than there are")):
                cute.arch.setmaxregister_increase(256 - 8)
            else:
                cute.arch.setmaxregister_increase(240)
            index = thread - THREADS
            out[index] = source[index]
