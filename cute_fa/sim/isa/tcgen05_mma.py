"""``tcgen05.mma``, ``.mma.ws`` and ``.commit`` (PTX ISA 9.7.16.10.9, 9.7.16.12.1).

One thread issues a product; the tensor core's side is in :mod:`cute_fa.sim.umma`, its queue in
:mod:`cute_fa.sim.umma_queue`. Every thread that executes the instruction issues one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.addresses import RANK_SHIFT, SHARED_OFFSET_MASK
from cute_fa.sim.async_shadow import Issuer, report_warp
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.mbarriers import Mbarriers
from cute_fa.sim.umma import Mma, Product, product_of
from cute_fa.sim.umma_descriptors import SharedDescriptor
from cute_fa.sim.umma_instruction import BLOCK_SCALED, DEPTH, InstructionDescriptor, decode
from cute_fa.sim.umma_queue import TensorQueues
from cute_fa.sim.umma_zero_columns import zero_columns

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

At = tuple[int, int, int]  # w, c, lane in the rectangle

_LANES = 128


@lru_cache(maxsize=64)
def cta_groups(kernel: ptx.Kernel) -> frozenset[str]:
    """The ``.cta_group`` qualifiers of a kernel's tcgen05 instructions."""
    return frozenset(
        part
        for instr in kernel.body
        if instr.op == "tcgen05"
        for part in instr.parts
        if part.startswith("cta_group::")
    )


class TensorInstruction(Decoded):
    """What the instructions of one CTA or of a pair share.

    Attributes:
        pair: ``.cta_group::2``.
        mixed: whether the kernel's instructions name both groups, which they may not.
    """

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        groups = [part for part in instr.parts if part.startswith("cta_group::")]
        if groups not in (["cta_group::1"], ["cta_group::2"]):
            raise self.unsupported("a .cta_group of 1 or 2 is needed")
        self.pair = groups == ["cta_group::2"]
        self.mixed = len(cta_groups(kernel)) > 1


class ThreadIssued(TensorInstruction):
    """What the instructions that one thread issues share."""

    def issues(self, ctx: BlockContext, mask: Mask) -> Iterator[tuple[At, Issuer, tuple[int, ...]]]:
        """Of each executing thread, its place, itself, and the CTAs that take part."""
        active = ctx.lanes.dense_mask() if mask is None else mask
        w0, _, c0, _ = ctx.rect
        for w, c, lane in np.argwhere(active).tolist():
            warp, slot = w0 + w, c0 + c
            slots = self._slots(ctx, slot, warp)
            if slots is not None:
                yield (w, c, lane), Issuer(slot, warp, warp + 1), slots

    def _slots(self, ctx: BlockContext, slot: int, warp: int) -> tuple[int, ...] | None:
        """The CTAs that take part, in rank order; None if the pair has no second CTA."""
        if self.mixed:
            text = "the kernel's tcgen05 instructions name .cta_group::1 and .cta_group::2"
            report_warp(ctx, "tensor-cta-group", text, slot, warp)
        if not self.pair:
            return (slot,)
        even = slot - int(ctx.wave.cta_rank[slot]) % 2
        if ctx.wave.cluster_size % 2:
            text = f"a CTA pair in a cluster of {ctx.wave.cluster_size}"
            report_warp(ctx, "tensor-cta-group", text, slot, warp)
            return None
        return even, even + 1


@effect("tcgen05.mma")
class TensorMma(ThreadIssued):
    """``tcgen05.mma{.ws}.cta_group.kind{.block_scale{.scale_vec}}{.ashift}{.collector}``.

    ``.collector`` says what the tensor core may keep between instructions; it changes no result,
    since operands must not change while it does.

    Attributes:
        kind: of ``.kind::``; pair: ``.cta_group::2``; ws: ``.ws``.
        a_in_tmem: A is in tensor memory.
        scale_vector: scale factors per row; 0 without ``.block_scale``.
    """

    counter_class = "tcgen05_mma"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts
        if "sp" in parts:
            raise self.unsupported("sparse A")
        kinds = [part[6:] for part in parts if part.startswith("kind::")]
        if len(kinds) != 1 or kinds[0] not in DEPTH:
            raise self.unsupported("kind")
        self.kind = kinds[0]
        self.ws = "ws" in parts
        self.shift = "ashift" in parts
        self.scale_vector = self._scale_vector()
        self._modifiers()
        operands = instr.operands
        self.a_in_tmem = isinstance(operands[1], ptx.Address)
        if self.shift and not self.a_in_tmem:
            raise self.unsupported(".ashift of an A in shared memory")
        self._decode_operands(list(operands[4:]))
        self._forms: dict[int, InstructionDescriptor | None] = {}
        self._good: set[int] = set()

    def _modifiers(self) -> None:
        known = {"tcgen05", "mma", "ws", "ashift", "block_scale", "block16", "block32"}
        prefixes = ("cta_group::", "kind::", "collector::", "scale_vec::")
        self.refuse_unknown(self.instr.parts, known, prefixes)
        if (self.kind in BLOCK_SCALED) != ("block_scale" in self.instr.parts):
            raise self.unsupported(".block_scale has to go with the mx kinds")
        collectors = [part for part in self.instr.parts if part.startswith("collector::")]
        for part in collectors:
            buffer, _, use = part[11:].partition("::")
            buffers = ("b0", "b1", "b2", "b3") if self.ws else ("a",)
            if buffer not in buffers or use not in ("fill", "use", "lastuse", "discard"):
                raise self.unsupported(f"modifier .{part}")
            if self.shift and use in ("fill", "use"):
                raise self.unsupported(f".ashift with .{part}")

    def _scale_vector(self) -> int:
        """N of ``.scale_vec::NX``, of its aliases and of its defaults (9.7.16.10.7.1)."""
        if self.kind not in BLOCK_SCALED:
            return 0
        for part in self.instr.parts:
            if part.startswith("scale_vec::"):
                return int(part[11:-1])
            if part == "block16":
                return 4
        if self.kind == "mxf4nvf4" and "block32" not in self.instr.parts:
            raise self.unsupported(".kind::mxf4nvf4 without a scale vector size")
        return 1 if self.kind == "mxf8f6f4" else 2

    def _decode_operands(self, rest: list[ptx.Operand]) -> None:
        """Behind idesc: {mask}, {[scales A], [scales B]}, enable-d, {scale-d or zero mask}."""
        operands = self.instr.operands
        self.has_mask = bool(rest) and isinstance(rest[0], ptx.Vector)
        mask = [rest.pop(0)] if self.has_mask else []
        if self.has_mask:
            assert isinstance(mask[0], ptx.Vector)
            wanted = 8 if self.pair else 4
            if len(mask[0].items) != wanted or self.ws or self.scale_vector:
                raise self.unsupported(f"a disable-output-lane vector of other than {wanted}")
        scales = [rest.pop(0) for _ in range(2)] if self.scale_vector and len(rest) > 2 else []
        if not rest or len(rest) > 2 or bool(scales) != bool(self.scale_vector):
            raise self.unsupported("operands")
        self.d_shift = 0
        zero = []
        if len(rest) == 2:
            last = rest.pop()
            if self.ws:
                zero = [last]
            elif (
                isinstance(last, ptx.Imm) and self.kind in ("f16", "tf32") and 0 <= last.value < 16
            ):
                self.d_shift = last.value
            else:
                raise self.unsupported("scale-input-d")
        self.has_zero = bool(zero)
        self.sources = (*operands[:4], *rest, *mask, *scales, *zero)
        wide, word = np.dtype(np.uint64), np.dtype(np.uint32)
        a = None if self.a_in_tmem else wide
        self.source_dtypes = (
            None,
            a,
            wide,
            word,
            None,
            *([word] if mask else []),
            *([None] * len(scales)),
            *([wide] if zero else []),
        )

    # --- issuing ----------------------------------------------------------------------------------

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        queues: TensorQueues = ctx.subsystem(TensorQueues.name)
        d, a, b, idesc, enable, *rest = sources
        for at, issuer, slots in self.issues(ctx, mask):
            form = self._form(ctx, int(idesc[at]), issuer)
            if form is None:
                continue
            in_tmem = int(a[at]) if self.a_in_tmem else None
            product, scales = self._product(ctx, form, int(d[at]), in_tmem, at, rest, issuer)
            descriptors = [int(b[at])] + ([] if self.a_in_tmem else [int(a[at])])
            if product is None or not self._descriptors_good(ctx, product, descriptors, issuer):
                continue
            mma = Mma(
                self.instr,
                issuer,
                at[2],
                self.pair,
                product=product,
                slots=slots,
                a=int(a[at]),
                b=int(b[at]),
                accumulate=bool(enable[at]),
                d_shift=self.d_shift,
                a_scales=scales[0],
                b_scales=scales[1],
            )
            if not mma.begin(ctx, queues):
                queues.finish([mma], issuer.slot, np.uint32(0))  # what it began to access
            else:
                self._count(ctx, mma)
                queues.issue(mma)

    @staticmethod
    def _count(ctx: BlockContext, mma: Mma) -> None:
        product, form = mma.product, mma.product.form
        kind = form.a if form.a == form.b else f"{form.a}.{form.b}"
        ctx.counters.add(f"mma_flops.{kind}", product.flops)
        ctx.counters.add("mma_shared_bytes_read", product.shared_bytes)
        old = product.d_bytes if mma.accumulate else 0
        ctx.counters.add("mma_tmem_bytes_read", product.a_bytes + old)
        ctx.counters.add("mma_tmem_bytes_written", product.d_bytes)

    def _form(self, ctx: BlockContext, bits: int, issuer: Issuer) -> InstructionDescriptor | None:
        """The instruction descriptor; None, reported, if the ISA does not allow it."""
        if bits not in self._forms:
            form = decode(bits, self.kind)
            if form.sparse:
                raise self.unsupported("an instruction descriptor that says sparse")
            if form.k == 96:
                raise self.unsupported("K = 96 (bit 31 of the instruction descriptor, sm_103a)")
            if form.max_shift:
                raise self.unsupported("column shifts of .ws")
            faults = form.faults(pair=self.pair, ws=self.ws, scale_vector=self.scale_vector)
            if self.shift and form.m not in (128, 256):
                faults.append(f".ashift with M = {form.m}")
            if faults:
                text = f"instruction descriptor {bits:#010x}: {'; '.join(faults)}"
                report_warp(ctx, "tensor-descriptor", text, issuer.slot, issuer.first)
                return None
            if form.reserved:
                text = f"instruction descriptor {bits:#010x}: {form.reserved:#010x} is reserved"
                report_warp(ctx, "tensor-reserved-bits", text, issuer.slot, issuer.first)
            self._forms[bits] = form
        return self._forms[bits]

    def _product(
        self,
        ctx: BlockContext,
        form: InstructionDescriptor,
        address: int,
        a: int | None,
        at: At,
        rest: list[Any],
        issuer: Issuer,
    ) -> tuple[Product | None, tuple[tuple[int, int], tuple[int, int]]]:
        """The product and where its scale factors lie: (column, byte) of A's and B's.

        Args:
            address: of D; a: of A, if it is in tensor memory.
        """
        rest = list(rest)
        disabled = None
        if self.has_mask:
            disabled = self._disabled(np.array([int(x[at]) for x in rest.pop(0)], np.uint32))
        places = ((0, 0), (0, 0))
        if self.scale_vector:
            columns = [int(rest.pop(0)[at]) & 0xFFFF for _ in range(2)]
            places = (columns[0], form.a_scale), (columns[1], form.b_scale)
        zero = None
        if self.has_zero:
            bits = int(rest.pop(0)[at])
            if bits >> 56 & 63:
                raise self.unsupported("a column shift in the zero-column mask")
            zero = zero_columns(bits, form.m, form.n)
        product = product_of(
            form,
            address >> 16,
            address & 0xFFFF,
            a_in_tmem=self.a_in_tmem,
            pair=self.pair,
            ws=self.ws,
            scale_vector=self.scale_vector,
            disabled=disabled,
            zero_columns=zero,
            shift=self.shift,
        )
        if product.lane not in product.layout.alignments:
            text = f"D begins at lane {product.lane}; with layout {product.layout.name}"
            text += f" it may at {product.layout.alignments}"
            report_warp(ctx, "tensor-descriptor", text, issuer.slot, issuer.first)
            return None, places
        if a is not None and a >> 16 != product.lane:
            text = f"A begins at lane {a >> 16} and D at lane {product.lane}"
            report_warp(ctx, "tensor-descriptor", text, issuer.slot, issuer.first)
            return None, places
        return product, places

    @staticmethod
    def _disabled(words: np.ndarray) -> tuple[bytes, ...] | None:
        """The lanes of each CTA that are not written; None if all are."""
        if not words.any():
            return None
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, _LANES)
        return tuple(row.astype(bool).tobytes() for row in bits)

    def _descriptors_good(
        self, ctx: BlockContext, product: Product, descriptors: list[int], issuer: Issuer
    ) -> bool:
        """Whether the shared-memory descriptors, B's first, may be read this way."""
        good = True
        for name, bits, layout in zip(
            "BA", descriptors, (product.b_layout, product.a_layout), strict=False
        ):
            key = bits >> 46 | layout.transposed << 20
            if key in self._good:
                continue
            d = SharedDescriptor.decode(bits)
            faults = d.faults()
            if d.absolute:
                faults.append("an absolute leading address, which is for K = 96 only")
            if layout.transposed and (d.atom == 32) != (layout.per_chunk == 4):
                faults.append(
                    f"a transposed operand of {128 // layout.per_chunk}-bit elements with "
                    f"{d.atom}-byte swizzle atoms"
                )
            if faults:
                text = f"descriptor {bits:#018x} of {name}: {'; '.join(faults)}"
                report_warp(ctx, "tensor-descriptor", text, issuer.slot, issuer.first)
                good = False
            else:
                self._good.add(key)
        return good


@effect("tcgen05.commit")
class TensorCommit(ThreadIssued):
    """``tcgen05.commit.cta_group.mbarrier::arrive::one{.shared::cluster}{.multicast::cluster}``."""

    counter_class = "tcgen05_commit"
    ends_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        known = {"tcgen05", "commit", "mbarrier::arrive::one", "shared::cluster", "b64"}
        known |= {"multicast::cluster", "cta_group::1", "cta_group::2"}
        self.refuse_unknown(instr.parts, known)
        self.multicast = "multicast::cluster" in instr.parts
        if len(instr.operands) != 1 + self.multicast:
            raise self.unsupported("operands")
        self.sources = instr.operands

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        queues: TensorQueues = ctx.subsystem(TensorQueues.name)
        table: Mbarriers = ctx.subsystem(Mbarriers.name)
        for at, issuer, _ in self.issues(ctx, mask):
            addresses = [int(sources[0][at])]
            if self.multicast:
                ranks, low = int(sources[1][at]), addresses[0] & SHARED_OFFSET_MASK
                addresses = [rank << RANK_SHIFT | low for rank in range(16) if ranks >> rank & 1]
            found = [table.find(ctx, address, issuer.slot, issuer.first) for address in addresses]
            bars = [bar for bar in found if bar is not None]
            queues.commit(ctx, issuer, at[2], self.pair, bars)
