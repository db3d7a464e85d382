"""Small CuTe DSL programs that the tests of the simulated device compile and run."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.memory
from cuda.bindings import driver
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

THREADS = 128


@cute.kernel
def scale_kernel(source: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    index = block * THREADS + thread
    if index < cute.size(source):
        out[index] = source[index] * factor


@cute.jit
def scale(source: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32, stream: driver.CUstream):
    """out = source * factor, one element per thread."""
    blocks = cute.ceil_div(cute.size(source), THREADS)
    scale_kernel(source, out, factor).launch(
        grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream
    )


@cute.jit
def scale_without_stream(source: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32):
    blocks = cute.ceil_div(cute.size(source), THREADS)
    scale_kernel(source, out, factor).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1])


@cute.jit
def scale_pointers(
    source: cute.Pointer, out: cute.Pointer, count: cutlass.Int32, stream: driver.CUstream
):
    """As `scale` by 2, on bare pointers."""
    layout = cute.make_layout(count)
    scale_kernel(
        cute.make_tensor(source, layout), cute.make_tensor(out, layout), cutlass.Float32(2.0)
    ).launch(grid=[cute.ceil_div(count, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def reverse_kernel(source: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    staged = cutlass.memory.SmemAllocator().allocate_tensor(
        cutlass.Float32, cute.make_layout(THREADS), byte_alignment=16
    )
    copy = cute.make_copy_atom(
        cute.nvgpu.cpasync.CopyG2SOp(), cutlass.Float32, num_bits_per_copy=128
    )
    if thread < THREADS // 4:
        cute.copy(
            copy,
            cute.local_tile(source, (4,), (thread,)),
            cute.local_tile(staged, (4,), (thread,)),
        )
    cute.arch.cp_async_commit_group()
    cute.arch.cp_async_wait_group(0)
    cute.arch.barrier()
    out[thread] = staged[THREADS - 1 - thread]


@cute.jit
def reverse(source: cute.Tensor, out: cute.Tensor, stream: driver.CUstream):
    """out = source reversed, `THREADS` elements, through shared memory and cp.async."""
    reverse_kernel(source, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def wide_shared_kernel(out: cute.Tensor, count: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    staged = cutlass.memory.SmemAllocator().allocate_tensor(
        cutlass.Float32, cute.make_layout(count), byte_alignment=16
    )
    staged[count - 1 - thread] = cutlass.Float32(1.0)
    out[thread] = staged[count - 1 - thread]


@cute.jit
def wide_shared(out: cute.Tensor, count: cutlass.Constexpr, stream: driver.CUstream):
    """Asks for ``4 * count`` bytes of shared memory."""
    wide_shared_kernel(out, count).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


def symbolic_scale_arguments() -> tuple[object, ...]:
    """Arguments to compile `scale` for TVM-FFI: vectors of any length, the framework's stream."""
    length = cute.sym_int32()
    tensors = [make_fake_compact_tensor(cutlass.Float32, (length,)) for _ in range(2)]
    return (*tensors, cutlass.Float32(0.0), make_fake_stream(use_tvm_ffi_env_stream=True))
