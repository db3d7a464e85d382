"""A small CuTe DSL GEMM on the fifth-generation tensor core, by one CTA or by a pair, for tests.

C = A B^T, one output tile per CTA group, one stage: TMA fills shared memory, a product of the whole
k tile accumulates in tensor memory, a commit frees the stage again.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers as sm100

THREADS = 128
TILE_K_BYTES = 128
COLUMNS = 256


@dataclass(frozen=True)
class Operand:
    """A or B of a product: one stage of it in shared memory, filled by TMA."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # (M or N, K), as TMA sees it
    layout: cute.ComposedLayout  # of shared memory, (MMA, MMA_M or MMA_N, MMA_K, stage)

    def allocate(self, smem: cutlass.memory.SmemAllocator, dtype: type) -> cute.Tensor:
        """Shared memory of the stage."""
        layout = self.layout
        return smem.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def partition(self, shared: cute.Tensor, source: cute.Tensor) -> tuple:
        """(TMA, stage) and (TMA, k tile) of the copies from ``source``, (MMA, …, k tile)."""
        tiles = cute.group_modes(shared, 0, 3), cute.group_modes(source, 0, 3)
        return cpasync.tma_partition(self.atom, 0, cute.make_layout(1), *tiles)


def tma_operands(
    a: cute.Tensor,
    b: cute.Tensor,
    dtype: type,
    tile: tuple[int, int, int],
    *,
    group: int = 1,
    major: OperandMajorMode = OperandMajorMode.K,
) -> tuple[cute.TiledMma, Operand, Operand]:
    """The product of one tile, (M, N, K) of ``group`` CTAs, with float32 sums; on the host."""
    ctas = tcgen05.CtaGroup.ONE if group == 1 else tcgen05.CtaGroup.TWO
    mma = sm100.make_trivial_tiled_mma(dtype, dtype, major, major, cutlass.Float32, ctas, tile[:2])
    layouts = (
        sm100.make_smem_layout_a(mma, tile, dtype, 1),
        sm100.make_smem_layout_b(mma, tile, dtype, 1),
    )
    cluster = cute.tiled_divide(cute.make_layout((group, 1, 1)), (mma.thr_id,)).shape
    op = cpasync.CopyBulkTensorTileG2SOp(ctas)
    one_a, one_b = (cute.select(layout, mode=[0, 1, 2]) for layout in layouts)
    tma_a = cute.nvgpu.make_tiled_tma_atom_A(op, a, one_a, tile, mma, cluster)
    tma_b = cute.nvgpu.make_tiled_tma_atom_B(op, b, one_b, tile, mma, cluster)
    return mma, Operand(*tma_a, layouts[0]), Operand(*tma_b, layouts[1])


class TensorCoreGemm:
    """``c[m, n] = sum_k a[m, k] * b[n, k]`` for whole tiles.

    Args:
        dtype: of A and B; C is float32.
        group: CTAs that work on one tile.
        tile_m, tile_n: of the group.
        transposed: A and B are given with m and n as their contiguous dimensions.
    """

    def __init__(
        self,
        dtype: type,
        group: int = 1,
        tile_m: int = 128,
        tile_n: int = 64,
        transposed: bool = False,
    ) -> None:
        self.dtype, self.group = dtype, group
        self.major = OperandMajorMode.MN if transposed else OperandMajorMode.K
        self.tile = tile_m, tile_n, TILE_K_BYTES * 8 // dtype.width
        self.nbytes = (tile_m + tile_n) * TILE_K_BYTES

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
        product = tma_operands(a, b, self.dtype, self.tile, group=self.group, major=self.major)
        grid = cute.ceil_div(c.shape[0], self.tile[0]) * self.group, c.shape[1] // self.tile[1], 1
        self.kernel(*product, c).launch(
            grid=grid, block=[THREADS, 1, 1], cluster=[self.group, 1, 1]
        )

    @cute.kernel
    def kernel(self, mma: cute.TiledMma, a: Operand, b: Operand, mC: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        block, column, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = block % self.group
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, 2)
        holding = smem.allocate_array(cutlass.Int32, 1)
        sA, sB = a.allocate(smem, self.dtype), b.allocate(smem, self.dtype)
        full, free = barriers, barriers + 1
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(full, 1)
                cute.arch.mbarrier_init(free, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.alloc_tmem(COLUMNS, holding, is_two_cta=self.group == 2)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.group == 2):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

        where = block // self.group, column
        gA = cute.local_tile(a.tensor, self.tile, (*where, None), proj=(1, None, 1))
        gB = cute.local_tile(b.tensor, self.tile, (*where, None), proj=(None, 1, 1))
        gC = cute.local_tile(mC, self.tile, (*where, None), proj=(1, 1, None))
        part = mma.get_slice(rank)
        tAsA, tAgA = a.partition(sA, part.partition_A(gA))
        tBsB, tBgB = b.partition(sB, part.partition_B(gB))
        tCrA, tCrB = mma.make_fragment_A(sA), mma.make_fragment_B(sB)
        address = cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, holding)
        fragment = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2]))
        acc = cute.make_tensor(address, fragment.layout)

        for k in cutlass.range(cute.size(gA, mode=[2]), unroll=1):
            if warp == 0:
                if rank == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, self.nbytes)
                cute.copy(a.atom, tAgA[None, k], tAsA[None, 0], tma_bar_ptr=full)
                cute.copy(b.atom, tBgB[None, k], tBsB[None, 0], tma_bar_ptr=full)
                if rank == 0:
                    cute.arch.mbarrier_wait(full, k % 2)
                    for step in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
                        mma.set(tcgen05.Field.ACCUMULATE, (k > 0) | (step > 0))
                        now = None, None, step, 0
                        cute.gemm(mma, acc, tCrA[now], tCrB[now], acc)
                    with cute.arch.elect_one():
                        mask = 3 if self.group == 2 else None
                        tcgen05.commit(free, mask, mma.op.cta_group)
            cute.arch.mbarrier_wait(free, k % 2)

        tCgC = part.partition_C(gC)
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x16), cutlass.Float32)
        load = tcgen05.make_tmem_copy(atom, acc[None, 0, 0])
        mine = load.get_slice(thread)
        tTtC = mine.partition_S(acc[None, 0, 0])
        tTgC = mine.partition_D(tCgC[None, 0, 0])
        values = cute.make_rmem_tensor(tTgC.shape, cutlass.Float32)
        cute.copy(load, tTtC, values)
        cute.autovec_copy(values, tTgC)
        cute.arch.fence_view_async_tmem_load()
        cute.arch.sync_threads()
        if cutlass.const_expr(self.group == 2):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        if warp == 0:
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.group == 2)
            cute.arch.dealloc_tmem(address, COLUMNS, is_two_cta=self.group == 2)
