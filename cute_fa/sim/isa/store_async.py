"""Stores that a thread starts and does not wait for, and stores of whole regions.

``st.async`` and ``red.async`` to shared memory of the cluster (PTX ISA 9.7.9.12, 9.7.13.7),
``st.bulk`` (9.7.9.13). ``multimem`` instructions (9.7.9.14) need several GPUs and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import accesses
from cute_fa.sim.addresses import RANK_SHIFT, SHARED_BASE, SHARED_OFFSET_MASK
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.boxes import reduce
from cute_fa.sim.bulk import Target, land
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.mbarriers import Mbarriers

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

Merge = Callable[[np.ndarray, np.ndarray], np.ndarray]

_REDUCTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("inc", "dec"), ("u32",)),
    **dict.fromkeys(("min", "max"), ("u32", "s32")),
    **dict.fromkeys(("and", "or", "xor"), ("b32",)),
    "add": ("u32", "s32", "u64"),
}


class _AsyncWrite(Decoded):
    """One value per thread, on its way until the barrier of the CTA it goes to has its bytes."""

    counter_class = "st_async"
    ends_block = True
    merge: Merge | None = None

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        if len(instr.operands) != 3 or "mbarrier::complete_tx::bytes" not in instr.parts:
            raise self.unsupported("completion other than by an mbarrier")
        self.element = accesses.element_bits(instr.parts) // 8
        self.count = accesses.vector_length(instr.parts)
        if self.element not in (4, 8):
            raise self.unsupported(f"type .{instr.parts[-1]}")
        self.nbytes = self.element * self.count
        self.sources = instr.operands
        self.source_dtypes = (None, np.dtype(f"u{self.element}"), None)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, value, signals = sources
        items = value if isinstance(value, tuple) else (value,)
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, _, c0, _ = ctx.rect
        ctx.counters.add("shared_bytes_written", int(np.count_nonzero(active)) * self.nbytes)
        for w, c, lane in np.argwhere(active):
            data = np.array([item[w, c, lane] for item in items]).view(np.uint8)
            where = int(addresses[w, c, lane]), int(signals[w, c, lane])
            self._store(ctx, c0 + int(c), w0 + int(w), *where, data)

    def _store(
        self, ctx: BlockContext, slot: int, warp: int, address: int, signal: int, data: np.ndarray
    ) -> None:
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        bar = table.find(ctx, signal, slot, warp)
        offset = address & SHARED_OFFSET_MASK
        rank = address >> RANK_SHIFT
        wave = ctx.wave
        bad = rank >= wave.cluster_size or offset % self.nbytes != 0
        if bad or offset < SHARED_BASE or offset + self.nbytes > wave.smem_end:
            text = f"a {self.nbytes}-byte asynchronous store to rank {rank}, offset {offset:#x}"
            report_warp(ctx, "bulk-operands", text, slot, warp, address=address)
            return
        if bar is None:
            return
        target = slot - int(wave.cta_rank[slot]) + rank
        if target != bar.slot:
            text = "the store and its mbarrier are in different CTAs"
            report_warp(ctx, "bulk-operands", text, slot, warp, address=address)
        place = Target.bytes(ctx, target, offset, self.nbytes, bar)
        land(ctx, Issuer(slot, warp, warp + 1), [place], lambda: data, merge=self.merge)


@effect("st.async")
class StoreAsync(_AsyncWrite):
    """``st.async.shared::cluster.mbarrier::complete_tx::bytes{.v2|.v4}.type [a], b, [mbar]``."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        known = {"async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes"}
        if set(instr.parts[1:-1]) - known - {"v2", "v4"}:
            raise self.unsupported("modifiers")


@effect("red.async")
class ReduceAsync(_AsyncWrite):
    """``red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.op.type [a], b,
    [mbar]``.
    """

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        kind = instr.parts[-1]
        operators = [part for part in instr.parts if part in _REDUCTIONS]
        known = {"async", "relaxed", "cluster", "shared::cluster", "mbarrier::complete_tx::bytes"}
        if len(operators) != 1 or kind not in _REDUCTIONS[operators[0]]:
            raise self.unsupported("operator or type")
        if set(instr.parts[1:-1]) - known - {operators[0]}:
            raise self.unsupported("modifiers")
        self.merge = partial(_merge, operators[0], kind)


def _merge(operator: str, kind: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    dtype = f"u{int(kind[1:]) // 8}"
    return np.asarray(reduce(operator, kind, old.view(dtype), new.view(dtype))).view(np.uint8)


@effect("st.bulk")
class StoreBulk(Decoded):
    """``st.bulk{.weak}{.shared::cta} [a], size, 0``: zeros; sizes are multiples of 8 bytes."""

    counter_class = "st_shared"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        if set(instr.parts[2:]) - {"weak", "shared::cta"}:
            raise self.unsupported("modifiers")
        value = instr.operands[2]
        if not isinstance(value, ptx.Imm) or value.value != 0:
            raise self.unsupported("an initial value other than 0")
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, sizes = sources
        active = ctx.lanes.dense_mask() if mask is None else mask
        odd = active & (sizes % 8 != 0)
        if odd.any():
            text = f"{int(sizes[odd][0])} bytes, which is no multiple of 8"
            report_lanes(ctx, "bulk-operands", text, odd)
        ctx.counters.add("shared_bytes_written", int(sizes[active].sum()))
        zeros = np.zeros(addresses.shape, np.uint64)
        shared = ctx.subsystem("shared")
        step = addresses.dtype.type
        for offset in range(0, int(sizes[active].max()) & ~7, 8):
            lanes = active & (sizes > offset)
            shared.store(ctx, addresses + step(offset), 8, zeros, lanes)


@effect("multimem")
class Multimem(Decoded):
    """``multimem…`` addresses one location on each of several GPUs; one is simulated."""

    counter_class = "multimem"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        raise self.unsupported("multimem addresses memory of several GPUs")
