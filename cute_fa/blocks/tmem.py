"""Tensor memory: 128 lanes × 512 columns of 32 bits, private to a CTA (PTX ISA, "Tensor Memory").

An address is lane << 16 | column. Warp w of a warpgroup reaches lanes 32w … 32w + 31 only, so with
the 32x32b shapes thread t of a warpgroup loads and stores row t of a tile, all columns of it, and a
row needs no shuffles.

Loads and stores are asynchronous. ``finish_loads`` and ``finish_stores`` wait for this thread's;
the fences order them, and the tensor core's work, around a barrier or an mbarrier that another
thread waits for (PTX ISA, "Memory Consistency Model for 5th generation of TensorCore operations").
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import dsl_user_op

LANES = 128
LANE_STRIDE = 1 << 16
COLUMN_BYTES = 4


@dsl_user_op
def fence_before_signal(*, loc=None, ip=None) -> None:
    """tcgen05.fence::before_thread_sync: for the thread that is about to signal another."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def fence_after_signal(*, loc=None, ip=None) -> None:
    """tcgen05.fence::after_thread_sync: for the thread that has waited for another's signal."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)


def finish_loads() -> None:
    """Wait until this thread's tcgen05.ld are complete; the whole warp calls."""
    cute.arch.fence_view_async_tmem_load()


def finish_stores() -> None:
    """Wait until this thread's tcgen05.st are complete; the whole warp calls."""
    cute.arch.fence_view_async_tmem_store()


def allocate(columns: int, address: cute.Pointer, is_paired: bool = False) -> None:
    """One warp: take ``columns`` (a power of two, at least 32) and write where to ``address``.

    Nobody of this CTA allocates again, so the permit goes back at once. A pair of CTAs takes the
    same columns in both, by one warp of each.
    """
    cute.arch.alloc_tmem(columns, address, is_paired)
    cute.arch.relinquish_tmem_alloc_permit(is_paired)


def allocated(address: cute.Pointer) -> cute.Pointer:
    """The allocation whose address lies at ``address`` in shared memory, as fp32 columns."""
    return cute.arch.retrieve_tmem_ptr(cutlass.Float32, COLUMN_BYTES * 4, address)


def release(base: cute.Pointer, columns: int, is_paired: bool = False) -> None:
    """One warp, of a pair one of each CTA: give the allocation back, when no access to it is
    left."""
    cute.arch.dealloc_tmem(base, columns, is_paired)


@dataclass(frozen=True)
class TmemRow:
    """One thread's row of a tile in tensor memory, in chunks of columns.

    Attributes:
        base: the tile's first column.
        columns: of the tile, 32 bits wide.
        chunk: columns that one instruction moves.
        thread: within the warpgroup; its row.
    """

    base: cute.Pointer
    columns: cutlass.Constexpr
    chunk: cutlass.Constexpr
    thread: cutlass.Int32

    @property
    def num_chunks(self) -> int:
        return self.columns // self.chunk

    def load(self, index: int, dst: cute.Tensor) -> None:
        """Issue tcgen05.ld of chunk ``index`` to the registers ``dst`` (chunk,), fp32."""
        copy = self._copy(tcgen05.Ld32x32bOp(tcgen05.Repetition(self.chunk)))
        row = copy.get_slice(self.thread).partition_S(self._tile)  # (CPY, 1, chunks)
        cute.copy(copy, row[None, None, index], self._fragment(dst))

    def store(self, index: int, src: cute.Tensor) -> None:
        """Issue tcgen05.st of the registers ``src`` (chunk,), fp32, to chunk ``index``."""
        copy = self._copy(tcgen05.St32x32bOp(tcgen05.Repetition(self.chunk)))
        row = copy.get_slice(self.thread).partition_D(self._tile)  # (CPY, 1, chunks)
        cute.copy(copy, self._fragment(src), row[None, None, index])

    @property
    def _tile(self) -> cute.Tensor:
        """All rows, (128, columns)."""
        layout = cute.make_layout((LANES, self.columns), stride=(LANE_STRIDE, 1))
        return cute.make_tensor(self.base, layout)

    def _copy(self, op) -> cute.TiledCopy:
        return tcgen05.make_tmem_copy(cute.make_copy_atom(op, cutlass.Float32), self._tile)

    def _fragment(self, registers: cute.Tensor) -> cute.Tensor:
        """``registers`` (chunk,) in the shape of a chunk's partition, (CPY, 1)."""
        layout = cute.make_layout(((self.chunk, 1), 1), stride=((1, 0), 0))
        return cute.make_tensor(registers.iterator, layout)
