"""Everything that a forward kernel moves by TMA, and shared memory for it."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import cute

from cute_fa.blocks.copies import shared_tile
from cute_fa.blocks.fp8 import PAIR, pairs_of
from cute_fa.blocks.plan import TmaForwardPlan
from cute_fa.blocks.signature import DTYPES
from cute_fa.blocks.tiles import PANEL_ELEMENT_BYTES, SMEM_ALIGN_BYTES
from cute_fa.blocks.tma import TmaTensor, shared_tiles, tma_load, tma_store


@dataclass(frozen=True)
class Transfers:
    """The four tensors of a launch as TMA sees them; of fp8 inputs, Q, K and V in pairs.

    Attributes:
        q, o: in boxes of ``plan.box_rows`` rows, (box, D) and (box, Dv).
        k, v: in tiles of N keys, (N, D) and (N, Dv), or what each CTA of a cluster loads of them.
    """

    q: TmaTensor
    k: TmaTensor
    v: TmaTensor
    o: TmaTensor

    @staticmethod
    def of(
        plan: TmaForwardPlan,
        mQ: cute.Tensor,  # (B, Sq, Hq, D), or packed (Tq, Hq, D)
        mK: cute.Tensor,  # (B, Sk, Hk, D) or (Tk, Hk, D)
        mV: cute.Tensor,  # (B, Sk, Hk, Dv) or (Tk, Hk, Dv)
        mO: cute.Tensor,  # (B, Sq, Hq, Dv) or (Tq, Hq, Dv)
    ) -> Transfers:
        """Made on the host."""
        if plan.is_fp8:
            mQ, mK, mV = map(pairs_of, (mQ, mK, mV))
        receivers = plan.num_ctas if plan.has_multicast else 1
        is_paired = plan.num_ctas == 2 and receivers == 1
        k_columns, v_columns = plan.panel_d // receivers, plan.panel_dv // receivers
        return Transfers(
            q=tma_load(mQ, plan.box_rows, plan.panel_d, plan.packed_group, is_paired),
            k=tma_load(mK, plan.k_rows, k_columns, 1, is_paired, receivers),
            v=tma_load(mV, plan.tile_n, v_columns, 1, is_paired, receivers),
            o=tma_store(mO, plan.box_rows, plan.padded_dv, plan.packed_group),
        )

    def prefetch(self) -> None:
        """Bring all tensor maps near; by one thread."""
        for tensor in (self.q, self.k, self.v, self.o):
            tensor.prefetch()


def allocate_panels(
    smem: cutlass.memory.SmemAllocator, plan: TmaForwardPlan, num_bytes: int
) -> cute.Pointer:
    """Shared memory for what panels are made of, aligned for any swizzle."""
    dtype = PAIR if plan.is_fp8 else DTYPES[plan.dtype]
    elements = num_bytes // PANEL_ELEMENT_BYTES
    return smem.allocate_array(dtype, elements, byte_alignment=SMEM_ALIGN_BYTES)


def allocate_q_and_o(
    smem: cutlass.memory.SmemAllocator, plan: TmaForwardPlan, count: int
) -> tuple[cute.Pointer, cute.Tensor, cute.Tensor]:
    """Shared memory for ``count`` boxes of Q and of O, which has Q's unless ``plan.has_own_o``.

    Returns:
        where Q begins, not swizzled; sQ (box, D, count); sO (box, Dv, count).
    """
    memory_q = allocate_panels(smem, plan, count * plan.smem_q_place_bytes)
    memory_o, place_o_bytes = memory_q, plan.smem_q_place_bytes
    if plan.has_own_o:
        memory_o = allocate_panels(smem, plan, count * plan.smem_o_bytes)
        place_o_bytes = plan.smem_o_bytes
    memory_o = cute.recast_ptr(memory_o, dtype=DTYPES[plan.out_dtype])

    def boxes(memory: cute.Pointer, columns: int, place_bytes: int) -> cute.Tensor:
        place = place_bytes // PANEL_ELEMENT_BYTES
        return shared_tiles(memory, plan.box_rows, columns, count, place)

    sQ = boxes(memory_q, plan.panel_d, plan.smem_q_place_bytes)
    return memory_q, sQ, boxes(memory_o, plan.padded_dv, place_o_bytes)


def columns_of(
    rank: cutlass.Int32 | None, memory: cute.Pointer, rows: int, columns: int, stages: int
) -> cute.Tensor:
    """What the CTA ``rank`` of a pair loads of the ``shared_tile`` at ``memory``: half of its
    panels, (rows, columns / 2, stage); None: all of it."""
    if rank is None:
        return shared_tile(memory, rows, columns, stages)
    half, tile = columns // 2, rows * columns
    return shared_tiles(memory + rank * (rows * half), rows, half, stages, tile)
