"""A kernel with something of everything that resources and flags are about."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

THREADS = 256
ELEMENTS = 32


class Gather:
    """Sums exp2 of elements of a register array, which a run-time index puts in local memory.

    With ``roles``, one warpgroup gives registers away and the other takes them; with ``bounded``,
    the compiler is told how many blocks an SM holds.
    """

    def __init__(self, roles: bool, bounded: bool) -> None:
        self.roles = roles
        self.bounded = bounded

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream) -> None:
        self.kernel(x, out).launch(
            grid=[1, 1, 1],
            block=[THREADS, 1, 1],
            min_blocks_per_mp=1 if self.bounded else 0,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor) -> None:
        thread, _, _ = cute.arch.thread_idx()
        if cutlass.const_expr(self.roles):
            if thread < THREADS // 2:
                cute.arch.setmaxregister_decrease(40)
            else:
                cute.arch.setmaxregister_increase(232)
        values = cute.make_rmem_tensor((ELEMENTS,), cutlass.Float32)
        for i in cutlass.range_constexpr(ELEMENTS):
            values[i] = x[thread + i * THREADS]
        total = cutlass.Float32(0)
        for i in cutlass.range(0, cute.size(out), 1, unroll=1):
            total += cute.exp2(values[(i * 7 + thread) % ELEMENTS], fastmath=True)
        cute.arch.sync_threads()
        out[thread] = total
