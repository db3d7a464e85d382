"""Programs for sm_100a: the tensor core, its memory, and what orders them with the threads."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass.cute.nvgpu import tcgen05

from tests.sim.dsl_tensor_core import Operand, tma_operands
from tests.sim.mistakes.program import Program

THREADS = 128
M, N, K = 128, 64, 64
TILES = 3
COLUMNS = 64  # of tensor memory


class TensorCoreGemm(Program):
    """``out = (a b^T) + 1``: float16 (M, TILES * K) by (N, TILES * K), float32 out.

    TMA fills one stage, a product per stage accumulates in tensor memory, a commit frees the stage.
    The sum is loaded, stored back to tensor memory with 1 added, and loaded again.
    """

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, out: cute.Tensor):
        product = tma_operands(a, b, cutlass.Float16, (M, N, K))
        self.kernel(*product, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1])

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, a: Operand, b: Operand, mC: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, 2)
        holding = smem.allocate_array(cutlass.Int32, 1)
        sA, sB = a.allocate(smem, cutlass.Float16), b.allocate(smem, cutlass.Float16)
        full, free = barriers, barriers + 1
        if warp == 0:
            self.begin(full, free, holding)
        if cutlass.const_expr(not self.has("no barrier behind the allocation")):
            cute.arch.sync_threads()
        tile = M, N, K
        gA = cute.local_tile(a.tensor, tile, (0, 0, None), proj=(1, None, 1))
        gB = cute.local_tile(b.tensor, tile, (0, 0, None), proj=(None, 1, 1))
        part = mma.get_slice(0)
        tAsA, tAgA = a.partition(sA, part.partition_A(gA))
        tBsB, tBgB = b.partition(sB, part.partition_B(gB))
        tCrA, tCrB = mma.make_fragment_A(sA), mma.make_fragment_B(sB)
        address = cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, holding)
        fragment = mma.make_fragment_C(mma.partition_shape_C((M, N)))
        acc = cute.make_tensor(address, fragment.layout)
        if cutlass.const_expr(self.has("an accumulator outside the allocation")):
            acc = cute.make_tensor(address + COLUMNS, fragment.layout)

        for k in cutlass.range_constexpr(TILES):
            if warp == 0:
                with cute.arch.elect_one():
                    nbytes = 2 * K * (M + (0 if self.has("the bytes of A announced only") else N))
                    cute.arch.mbarrier_arrive_and_expect_tx(full, nbytes)
                cute.copy(a.atom, tAgA[None, k], tAsA[None, 0], tma_bar_ptr=full)
                cute.copy(b.atom, tBgB[None, k], tBsB[None, 0], tma_bar_ptr=full)
                if cutlass.const_expr(not self.has("no wait for the operands")):
                    cute.arch.mbarrier_wait(full, k % 2)
                for step in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
                    fresh = k == 0 and step == 0
                    wrong = self.has("an accumulator that nobody has cleared")
                    mma.set(tcgen05.Field.ACCUMULATE, not fresh or wrong)
                    now = None, None, step, 0
                    cute.gemm(mma, acc, tCrA[now], tCrB[now], acc)
                self.commit(free, k)
            if cutlass.const_expr(self.waits_for_commit(k)):
                cute.arch.mbarrier_wait(free, k % 2)
        self.epilogue(part.partition_C(mC), acc, thread)
        self.end(warp, address)

    @cute.jit
    def begin(self, full, free, holding):
        with cute.arch.elect_one():
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init(free, 2 if self.has("a commit counted twice") else 1)
            cute.arch.mbarrier_init_fence()
        columns = 2 * COLUMNS if self.has("more columns freed than allocated") else COLUMNS
        columns = columns // 2 if self.has("too few columns allocated") else columns
        cute.arch.alloc_tmem(columns, holding)
        if cutlass.const_expr(self.has("an allocation while another has the rest")):
            cute.arch.alloc_tmem(512, holding)

    @cute.jit
    def commit(self, free, k: cutlass.Constexpr):
        if cutlass.const_expr(not (self.has("no commit") or self.drops_the_last_commit(k))):
            with cute.arch.elect_one():
                tcgen05.commit(free)

    def drops_the_last_commit(self, k: int) -> bool:
        return self.has("no commit of the last product") and k + 1 == TILES

    def waits_for_commit(self, k: int) -> bool:
        if self.has("no wait for the last commit"):
            return k + 1 < TILES
        dropped = self.drops_the_last_commit(k)
        return not (dropped or self.has("operands refilled before the commit"))

    @cute.jit
    def epilogue(self, tCgC, acc, thread):
        rows = acc[None, 0, 0]
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition.x16)
        load = tcgen05.make_tmem_copy(cute.make_copy_atom(op, cutlass.Float32), rows)
        to = tcgen05.St32x32bOp(tcgen05.Repetition.x16)
        store = tcgen05.make_tmem_copy(cute.make_copy_atom(to, cutlass.Float32), rows)
        row = thread
        if cutlass.const_expr(self.has("the lanes of another warp")):
            row = thread ^ 32
        mine, place = load.get_slice(row), store.get_slice(row)
        tTgC = mine.partition_D(tCgC[None, 0, 0])
        values = cute.make_rmem_tensor(tTgC.shape, cutlass.Float32)
        cute.copy(load, mine.partition_S(rows), values)
        if cutlass.const_expr(not self.waits_for_no_load()):
            cute.arch.fence_view_async_tmem_load()
        if cutlass.const_expr(self.has("cells cleared while they are loaded")):
            zeros = cute.make_rmem_tensor(tTgC.shape, cutlass.Float32)
            zeros.fill(0.0)
            cute.copy(store, zeros, place.partition_D(rows))
        for i in cutlass.range_constexpr(cute.size(values)):
            values[i] = values[i] + 1.0
        cute.copy(store, values, place.partition_D(rows))
        if cutlass.const_expr(not self.has("no wait for the store")):
            cute.arch.fence_view_async_tmem_store()
        cute.copy(load, mine.partition_S(rows), values)
        cute.arch.fence_view_async_tmem_load()
        cute.autovec_copy(values, tTgC)

    def waits_for_no_load(self) -> bool:
        return self.has("no wait for the load") or self.has("cells cleared while they are loaded")

    @cute.jit
    def end(self, warp, address):
        if cutlass.const_expr(not self.has("freed while others still load")):
            cute.arch.sync_threads()
        if cutlass.const_expr(not self.has("tensor memory is never freed")):
            freeing = 1 if self.has("freed by every warp") else 0
            if warp == 0 or freeing == 1:
                if cutlass.const_expr(self.has("freed twice")):
                    cute.arch.dealloc_tmem(address, COLUMNS)
                cute.arch.dealloc_tmem(address, COLUMNS)
