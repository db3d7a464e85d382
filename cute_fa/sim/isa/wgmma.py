"""``wgmma`` (PTX ISA 9.7.15); the tensor core's side is in :mod:`cute_fa.sim.wgmma`.

Accumulators live in the register file itself: ``wgmma.fence`` and ``wgmma.wait_group`` end their
basic blocks, so that what threads wrote before is there, and what the tensor core wrote is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import hazards
from cute_fa.sim.async_shadow import report_warp
from cute_fa.sim.isa import Decoded, Mask, WaitReason, blocking, effect
from cute_fa.sim.wgmma import Issue, TensorCores, WgmmaForm
from cute_fa.sim.wgmma_flow import findings

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext

_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}
_ACCUMULATORS = {
    "f16": ("f16", "f32"),
    "bf16": ("f32",),
    "tf32": ("f32",),
    "e4m3": ("f16", "f32"),
    "e5m2": ("f16", "f32"),
    "s8": ("s32",),
    "u8": ("s32",),
}
_FAMILIES = ({"f16"}, {"bf16"}, {"tf32"}, {"e4m3", "e5m2"}, {"s8", "u8"})


class _Wgmma(Decoded):
    counter_class = "wgmma"
    collective = True

    @staticmethod
    def warps(ctx: BlockContext, mask: Mask) -> list[tuple[int, int]]:
        """(warp, slot) of every executing warp."""
        w0, w1, c0, c1 = ctx.rect
        if mask is None:
            return [(warp, slot) for slot in range(c0, c1) for warp in range(w0, w1)]
        return [(w0 + int(w), c0 + int(c)) for w, c in np.argwhere(mask.any(axis=-1))]


@effect("wgmma.fence")
class WgmmaFence(_Wgmma):
    """``wgmma.fence.sync.aligned`` (9.7.15.7.1): orders register accesses before the products."""

    ends_block = True

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        return None


@effect("wgmma.mma_async")
class MmaAsync(_Wgmma):
    """``wgmma.mma_async.sync.aligned.m64nNkK.d.a.b`` (9.7.15.5.2)."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts
        shape = next((re.fullmatch(r"m64n(\d+)k(\d+)", p) for p in parts if p[:3] == "m64"), None)
        types = [p for p in parts if p in _DEPTH or p in ("f32", "s32")]
        if shape is None or len(types) != 3 or "sp" in parts:
            raise self.unsupported("shape or types")
        self.n, depth = int(shape[1]), int(shape[2])
        self.types = d, a, b = types[0], types[1], types[2]
        if not any({a, b} <= family for family in _FAMILIES) or d not in _ACCUMULATORS[a]:
            raise self.unsupported("types")
        if self.n % 8 or not 8 <= self.n <= 256 or depth != _DEPTH[a]:
            raise self.unsupported("shape")
        operands = instr.operands
        accumulator = operands[0]
        count = self.n // (4 if d == "f16" else 2)
        if not isinstance(accumulator, ptx.Vector) or len(accumulator.items) != count:
            raise self.unsupported(f"an accumulator of other than {count} registers")
        self.names = [self._register(item) for item in accumulator.items]
        self.a_in_registers = isinstance(operands[1], ptx.Vector)
        self.sources = operands[1:4]
        wide = np.dtype(np.uint64)
        self.source_dtypes = (np.dtype(np.uint32) if self.a_in_registers else wide, wide, None)
        self._literals([self._literal(operand) for operand in operands[4:]], a)
        self.static_counts = {}
        kind = a if a == b else f"{a}.{b}"
        self.static_counts = {f"mma_flops.{kind}": 2 * 16 * self.n * depth}  # a warp's quarter
        self._form: WgmmaForm | None = None
        self.findings = findings(kernel).get(instr.index, ())

    def _register(self, item: ptx.Operand) -> str:
        if not isinstance(item, ptx.Reg):
            raise self.unsupported("an accumulator that is not made of registers")
        return item.name

    def _literal(self, operand: ptx.Operand) -> int:
        if not isinstance(operand, ptx.Imm):
            raise self.unsupported("a scale or transposition that is not a literal")
        return operand.value

    def _literals(self, values: list[int], a: str) -> None:
        """scale-a, scale-b{, trans-a}{, trans-b}: signs for floats, transposition for 16 bits."""
        self.sign, self.transpose_a, self.transpose_b = 1, False, False
        integers = a in ("s8", "u8")
        wanted = 0 if integers else 2
        if a in ("f16", "bf16"):
            wanted += 1 if self.a_in_registers else 2
            self.transpose_b = bool(values[-1:] and values[-1])
            self.transpose_a = not self.a_in_registers and len(values) == 4 and bool(values[2])
        if len(values) != wanted:
            raise self.unsupported(f"{len(values)} literal operands, {wanted} expected")
        if not integers:
            self.sign = values[0] * values[1]
            if self.sign not in (1, -1):
                raise self.unsupported("scales other than 1 and -1")

    def form(self, ctx: BlockContext) -> WgmmaForm:
        """The form with the accumulator's rows in the register file."""
        if self._form is None:
            program = ctx.wave.program
            rows = tuple(program.location(name).row for name in self.names)
            self._form = WgmmaForm(
                self.n,
                *self.types,
                rows,
                self.a_in_registers,
                self.transpose_a,
                self.transpose_b,
                self.sign,
                "satfinite" in self.instr.parts,
            )
        return self._form

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        a, b, scale = sources
        cores: TensorCores = ctx.subsystem(TensorCores.name)
        warps = self.warps(ctx, mask)
        self._check(ctx, cores, warps, mask, sources)
        issue = Issue(
            self.form(ctx),
            self.instr,
            (ctx.rect[0], ctx.rect[2]),
            np.stack(a) if self.a_in_registers else a[..., 0].copy(),
            b[..., 0].copy(),
            scale[..., 0].astype(bool),
        )
        cores.issue([pair for pair in warps if cores.whole(pair[0])], issue)

    def _check(
        self,
        ctx: BlockContext,
        cores: TensorCores,
        warps: list[tuple[int, int]],
        mask: Mask,
        sources: tuple[Any, ...],
    ) -> None:
        warp, slot = warps[0]
        descriptors = sources[1:2] if self.a_in_registers else sources[:2]
        for value in descriptors:
            uneven = value != value[..., :1]
            if mask is not None:
                uneven = uneven & mask & mask[..., :1]
            if uneven.any():
                text = "the lanes of a warp give different matrix descriptors"
                report_warp(ctx, "wgmma-operands", text, slot, warp)
        if not all(cores.whole(number) for number, _ in warps):
            text = "a warpgroup of fewer than four warps"
            report_warp(ctx, "wgmma-operands", text, slot, warp)
        if self.findings and self.instr.index not in cores.reported:
            cores.reported.add(self.instr.index)
            for rule, text, other in self.findings:
                site = None
                if other is not None:
                    touching = ctx.wave.kernel.body[other]
                    site = hazards.site(ctx.wave, touching, "access", warp, slot)
                report_warp(ctx, rule, text, slot, warp, other=site)


@effect("wgmma.commit_group")
class WgmmaCommit(_Wgmma):
    """``wgmma.commit_group.sync.aligned`` (9.7.15.7.2)."""

    ends_block = True

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        ctx.subsystem(TensorCores.name).commit(ctx, self.warps(ctx, mask))


@blocking("wgmma.wait_group")
class WgmmaWait(_Wgmma):
    """``wgmma.wait_group.sync.aligned N`` (9.7.15.7.3)."""

    own_block = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.newest = self.literal(instr.operands[0], "a group count")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> LaneSet | None:
        cores: TensorCores = ctx.subsystem(TensorCores.name)
        w0, _, c0, _ = ctx.rect
        for warp, slot in self.warps(ctx, mask):
            unit = cores.wait(warp, slot, self.newest)
            if unit is not None:
                held = np.zeros(ctx.lanes.shape, bool)
                held[warp - w0, slot - c0] = True
                reason = WaitReason("waits for the other warps of its warpgroup to commit")
                unit.waiting.append(ctx.park(held, reason, retry=True))
        return None
