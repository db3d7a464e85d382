"""PTX that the compiler wrote: small CuTe DSL kernels for three architectures."""

from __future__ import annotations

import pytest

cutlass = pytest.importorskip("cutlass")

import cuda.bindings.driver as cuda  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import make_fake_compact_tensor  # noqa: E402

from cute_fa import ptx  # noqa: E402


class RowSums:
    """Sums rows of a float tensor: a loop, a warp reduction, shared memory and a barrier."""

    threads = 64

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream) -> None:
        self.kernel(x, out).launch(
            grid=[cute.size(out), 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor) -> None:
        thread, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        partial = smem.allocate_tensor(cutlass.Float32, cute.make_layout(2))
        total = cutlass.Float32(0)
        columns = cute.size(x) // cute.size(out)
        for start in cutlass.range(0, columns, self.threads, unroll=1):
            if start + thread < columns:
                total += x[row * columns + start + thread]
        total = cute.arch.warp_reduction_sum(total)
        if thread % 32 == 0:
            partial[thread // 32] = total
        cute.arch.sync_threads()
        if thread == 0:
            out[row] = partial[0] + partial[1]


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100a"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ptx.Module:
    folder = tmp_path_factory.mktemp(request.param)
    tensors = [
        make_fake_compact_tensor(cutlass.Float32, (cute.sym_int32(),), stride_order=(0,))
        for _ in range(2)
    ]
    compiled = cute.compile(
        RowSums(),
        *tensors,
        cuda.CUstream(0),
        options=f"--gpu-arch {request.param} --keep-ptx --generate-line-info --dump-dir {folder}",
    )
    module = ptx.parse(compiled.artifacts.PTX)
    assert module.target == request.param
    return module


def test_one_kernel_with_its_launch_bounds(module: ptx.Module) -> None:
    (kernel,) = module.kernels.values()
    assert kernel.reqntid == (64, 1, 1)
    assert kernel.param_bytes >= 2 * 16
    assert all(param.offset % param.align == 0 for param in kernel.params)


def test_it_has_the_loop_the_reduction_and_the_barrier(module: ptx.Module) -> None:
    (kernel,) = module.kernels.values()
    opcodes = [instr.opcode for instr in kernel.body]
    assert opcodes.count("bar.sync") == 1
    assert opcodes.count("shfl.sync.bfly.b32") == 5
    assert opcodes[-1] == "ret"
    blocks = ptx.basic_blocks(kernel)
    assert any(s <= b.index for b in blocks for s in b.successors), "no loop"
    assert "__dynamic_shmem__0" in module.shared_vars


def test_nothing_is_live_at_the_entry(module: ptx.Module) -> None:
    (kernel,) = module.kernels.values()
    live = ptx.liveness(kernel, ptx.basic_blocks(kernel))
    assert live[0][0] == frozenset()
    assert any(out for _, out in live)


def test_instructions_know_their_python_line(module: ptx.Module) -> None:
    (kernel,) = module.kernels.values()
    barrier = next(instr for instr in kernel.body if instr.op == "bar")
    source = module.source_of(barrier)
    assert source is not None
    path, line = source.rsplit(":", 1)
    assert path.endswith(".py")
    with open(path) as file:
        assert int(line) <= len(file.readlines())


def test_lines_and_text_agree_with_the_file(module: ptx.Module) -> None:
    lines = module.text.splitlines()
    (kernel,) = module.kernels.values()
    for instr in kernel.body:
        first_word = lines[instr.line - 1].split()[0]
        assert instr.text.split()[0].startswith(first_word.rstrip(";"))
