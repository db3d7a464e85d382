"""``tcgen05.cp`` and ``tcgen05.shift`` (PTX ISA 9.7.16.9); carried out by :mod:`umma_moves`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.canonical_layouts import CHUNK
from cute_fa.sim.isa import Mask, effect
from cute_fa.sim.isa.tcgen05_mma import ThreadIssued
from cute_fa.sim.tensor_pieces import QUARTER_LANES
from cute_fa.sim.umma_descriptors import SharedDescriptor
from cute_fa.sim.umma_moves import COPY_SHAPES, Copy, Shift
from cute_fa.sim.umma_queue import TensorQueues

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

_SOURCES = ("b6x16_p32", "b4x16_p64")


@effect("tcgen05.cp")
class TensorCopy(ThreadIssued):
    """``tcgen05.cp.cta_group.shape{.multicast}{.b8x16.src_fmt} [taddr], s-desc``.

    Attributes:
        shape: a row of ``COPY_SHAPES``; source: format to decompress, or None.
        bytes: written to the tensor memory of each CTA.
    """

    counter_class = "tcgen05_cp"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = [part for part in instr.parts[2:] if not part.startswith("cta_group::")]
        formats = [part for part in parts if part == "b8x16" or part in _SOURCES]
        name = ".".join(part for part in parts if part not in formats)
        if name not in COPY_SHAPES:
            raise self.unsupported(f"shape .{name}")
        if formats and (formats[0] != "b8x16" or len(formats) != 2):
            raise self.unsupported("a pair of formats that does not exist")
        self.shape = COPY_SHAPES[name]
        self.source = formats[1] if formats else None
        self.bytes = self.shape.rows * len(self.shape.lanes[0]) * self.shape.chunks * CHUNK
        self.sources = instr.operands[:2]
        self.source_dtypes = None, np.dtype(np.uint64)
        self._good: set[int] = set()

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, descriptors = sources
        queues: TensorQueues = ctx.subsystem(TensorQueues.name)
        for at, issuer, slots in self.issues(ctx, mask):
            descriptor = int(descriptors[at])
            if not self._descriptor_good(ctx, descriptor, issuer):
                continue
            copy = Copy(
                self.instr,
                issuer,
                at[2],
                self.pair,
                self.shape,
                slots,
                int(addresses[at]),
                descriptor,
                self.source,
            )
            if copy.begin(ctx, queues.row):
                ctx.counters.add("tmem_bytes_written", self.bytes * len(slots))
                queues.issue(copy)

    def _descriptor_good(self, ctx: BlockContext, bits: int, issuer: Issuer) -> bool:
        key = bits >> 46
        if key in self._good:
            return True
        decoded = SharedDescriptor.decode(bits)
        faults = decoded.faults()
        if decoded.absolute:
            faults.append("an absolute leading address, which is for K = 96 only")
        if faults:
            text = f"descriptor {bits:#018x}: {'; '.join(faults)}"
            report_warp(ctx, "tensor-descriptor", text, issuer.slot, issuer.first)
            return False
        self._good.add(key)
        return True


@effect("tcgen05.shift")
class TensorShift(ThreadIssued):
    """``tcgen05.shift.cta_group.down [taddr]``; ``.down`` may also stand first."""

    counter_class = "tcgen05_shift"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        if "down" not in instr.parts or len(instr.parts) != 4:
            raise self.unsupported("a direction other than .down")
        self.sources = instr.operands[:1]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        queues: TensorQueues = ctx.subsystem(TensorQueues.name)
        for at, issuer, slots in self.issues(ctx, mask):
            address = int(sources[0][at])
            if (address >> 16) % QUARTER_LANES:
                text = f"a shift from lane {address >> 16}, no multiple of {QUARTER_LANES}"
                report_warp(ctx, "tmem-operands", text, issuer.slot, issuer.first, address=address)
                continue
            shift = Shift(self.instr, issuer, at[2], self.pair, slots, address)
            if shift.begin(ctx, queues.row):
                queues.issue(shift)
