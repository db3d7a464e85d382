"""``mma.sync`` with block scaling, of sm_120: PTX ISA sections 9.7.14.3 and 9.7.14.5.14.

``D = (A * scale_A) * (B * scale_B) + C``. Each row of A (column of B) is cut along k into 1, 2 or 4
chunks, each of which has its scale factor. The factors of a row lie in one 32-bit register of one
lane of its quad; two selectors name the lane and the byte.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import fragments
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Decoded, Mask, effect, minifloat, register_names
from cute_fa.sim.isa.matrix import SMALL_FLOATS, MmaForm, in_bytes

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

# Kind → its shape, chunks when the opcode does not say, and the legal (chunks, scale type).
_KINDS: dict[str, tuple[str, str | None, tuple[tuple[str, str], ...]]] = {
    "kind::mxf8f6f4": ("m16n8k32", "1X", (("1X", "ue8m0"),)),
    "kind::mxf4": ("m16n8k64", "2X", (("2X", "ue8m0"),)),
    "kind::mxf4nvf4": ("m16n8k64", None, (("2X", "ue8m0"), ("4X", "ue8m0"), ("4X", "ue4m3"))),
}
_PREFIXES = [
    f"mma.sync.aligned.{where}{kind}"
    for kind, (shape, _, _) in _KINDS.items()
    for where in ("", f"{shape}.row.col.")
]
_GROUP = np.arange(8)


@effect(*_PREFIXES)
class BlockScaledMma(Decoded):
    """``mma.sync…kind.block_scale{.scale_vec}.f32.atype.btype.f32.stype d, a, b, c, scale-a,
    {byte-id-a, thread-id-a}, scale-b, {byte-id-b, thread-id-b}``."""

    counter_class = "mma"
    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = list(instr.parts)
        kind = next(part for part in parts if part in _KINDS)
        shape, chunks, legal = _KINDS[kind]
        given = next((part[11:] for part in parts if part.startswith("scale_vec::")), chunks)
        d, a, b, c, self.scale_type = parts[-5:]
        known = {"mma", "sync", "aligned", "row", "col", "block_scale", kind, shape}
        strange = set(parts[:-5]) - known - {f"scale_vec::{given}"}
        if strange or shape not in parts or "block_scale" not in parts or (d, c) != ("f32", "f32"):
            raise self.unsupported("shape, types or modifiers")
        if (given, self.scale_type) not in legal:
            raise self.unsupported(f"scale factors {given} of .{self.scale_type}")
        self.chunks = int(str(given)[0])
        if kind == "kind::mxf8f6f4" and a in SMALL_FLOATS and b in SMALL_FLOATS:
            a, b = in_bytes(a), in_bytes(b)
        elif kind == "kind::mxf8f6f4" or (a, b) != ("e2m1", "e2m1"):
            raise self.unsupported(f"types .{a}.{b}")
        m, n, k = (int(x) for x in re.findall(r"\d+", shape))
        self.form = MmaForm(m, n, k, d, a, b, c, False)
        self.dests = register_names(instr.operands[0])
        self.dest_dtypes = [np.dtype(np.float32)] * 4
        self.sources = instr.operands[1:]
        counts = [len(o.items) if isinstance(o, ptx.Vector) else 1 for o in instr.operands]
        if counts != [4, 4, 2, 4, 1, 2, 1, 2]:
            raise self.unsupported(f"{counts} registers")
        word, half = np.dtype(np.uint32), np.dtype(np.uint16)
        self.source_dtypes = (word, word, np.dtype(np.float32), word, half, word, half)
        self.static_counts = {f"mma_flops.{self.form.operand_types}": self.form.flops}

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        a, b, c, scale_a, selector_a, scale_b, selector_b = sources
        form = self.form
        left = fragments.operand_matrix(fragments.operand_grid(list(a), 2), form.a)
        right = fragments.operand_matrix(fragments.operand_grid(list(b), 1), form.b)
        scales_a = self._scales(ctx, mask, _first(scale_a), selector_a, rows=form.m)
        scales_b = self._scales(ctx, mask, _first(scale_b), selector_b, rows=form.n)
        w, chunk = left.shape[:2], (self.chunks, form.k // self.chunks)
        left = left.reshape(*w, form.m, *chunk).swapaxes(-2, -3)
        right = right.reshape(*w, form.n, *chunk).swapaxes(-2, -3)
        products = np.matmul(left, right.swapaxes(-1, -2)).astype(np.float64)
        scaled = products * scales_a[..., :, None] * scales_b[..., None, :]
        total = scaled.sum(axis=2).astype(np.float32)
        registers = fragments.split_accumulators(total)
        return tuple(p + x for p, x in zip(registers, c, strict=True))

    def _scales(
        self, ctx: BlockContext, mask: Mask, word: np.ndarray, selector: Any, rows: int
    ) -> np.ndarray:
        """Scale factors ``(w, c, chunks, rows)`` in float64.

        Rows g and g + 8 of A are in a pair of lanes of quad g, column g of B in one lane.
        """
        byte, thread = (x[..., 0].astype(np.int64) for x in selector)
        self._check(ctx, mask, byte, thread, 2 if rows == 16 else 4)
        lanes = [4 * _GROUP + (2 * thread[..., None] if rows == 16 else thread[..., None])]
        if rows == 16:
            lanes.append(lanes[0] + 1)
        index = np.concatenate(lanes, axis=-1) & 31
        words = np.take_along_axis(word, index, axis=-1)
        factors = []
        for chunk in range(self.chunks):
            shift = (8 * ((byte + chunk) & 3)).astype(np.uint32)[..., None]
            codes = (words >> shift & np.uint32(0xFF)).astype(np.uint8)
            if self.scale_type == "ue4m3":
                codes = codes & np.uint8(0x7F)
            factors.append(minifloat.decode(codes, self.scale_type).astype(np.float64))
        return np.stack(factors, axis=2)

    def _check(
        self, ctx: BlockContext, mask: Mask, byte: np.ndarray, thread: np.ndarray, threads: int
    ) -> None:
        """Report selectors that table 37 does not list."""
        bad = (byte % self.chunks != 0) | (byte > 3) | (thread >= threads)
        if not bad.any():
            return
        active = ctx.lanes.dense_mask() if mask is None else mask
        lanes = bad[..., None] & active
        if lanes.any():
            w, c = np.argwhere(bad)[0]
            text = f"selector {{{int(byte[w, c])}, {int(thread[w, c])}}} of scale factors"
            report_lanes(ctx, "mma-operands", text, lanes)


def _first(operand: Any) -> np.ndarray:
    """A register, given bare or as a vector of one."""
    return operand[0] if isinstance(operand, tuple) else operand
