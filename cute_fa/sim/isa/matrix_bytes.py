"""``ldmatrix`` and ``stmatrix`` of bytes, of 4- and of 6-bit elements (PTX ISA 9.7.14.5.15, .16).

Every row in shared memory takes 16 bytes; with ``g = lane // 4`` and ``t = lane % 4``:

* ``m8n16``: lane holds row g, columns 4t … 4t+3, in one register;
* ``m16n16.trans``: address j is of column j; two registers hold rows g and g+8, columns 4t … 4t+3;
* ``m16n8.trans``: address j is of column j; one register holds columns 2t and 2t+1 of row g in its
  lower half, those of row g+8 in its upper half, as accumulators of ``mma.sync`` do.

Elements of 4 and 6 bits (``b4x16_p64``, ``b6x16_p32``: 16 of them, then padding) come out in the
low bits of bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import accesses
from cute_fa.sim.isa import Decoded, Mask, effect, register_names
from cute_fa.sim.isa.matrix import addressing_lanes
from cute_fa.sim.memory import WORDS

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

ROW_BYTES = 16
_LANES = np.arange(32)


def unpack_bits(rows: np.ndarray, bits: int) -> np.ndarray:
    """16 elements of ``bits`` (4 or 6) from the start of each row of bytes, a byte each."""
    groups = rows[..., : 2 * bits].reshape(*rows.shape[:-1], -1, bits // 2).astype(np.uint32)
    word = sum(groups[..., i] << np.uint32(8 * i) for i in range(bits // 2))
    elements = [word >> np.uint32(bits * i) & np.uint32((1 << bits) - 1) for i in range(4)]
    return np.stack(elements, axis=-1).astype(np.uint8).reshape(*rows.shape[:-1], 16)


class _ByteMatrixAccess(Decoded):
    """What both directions share: state space, addresses, and which lanes give them."""

    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        counts = [part for part in instr.parts if part in ("x1", "x2", "x4")]
        self.space = accesses.space_of(instr.parts)
        if len(counts) != 1 or self.space not in ("shared", "generic"):
            raise self.unsupported("number of matrices or state space")
        self.count = int(counts[0][1:])
        self.square = "m16n16" in instr.parts
        known = {"sync", "aligned", "shared", "shared::cta", counts[0], instr.parts[3]}
        transposed = instr.parts[3] != "m8n16"
        formats = {"b8"} if transposed else set()
        if instr.op == "ldmatrix":
            formats |= {"b6x16_p32", "b4x16_p64"}
            known |= {"b8x16"}
        known |= {"trans"} if transposed else set()
        if set(instr.parts[1:-1]) - known or instr.parts[-1] not in formats:
            raise self.unsupported("modifiers or type")
        if transposed != ("trans" in instr.parts) or (self.square and self.count == 4):
            raise self.unsupported("this combination of shape, count and .trans")
        self.bits = {"b8": 8, "b6x16_p32": 6, "b4x16_p64": 4}[instr.parts[-1]]
        rows = self.count * (16 if self.square else 8)
        self._addressing = None if rows == 32 else rows > _LANES

    def lanes(self, mask: Mask, shape: tuple[int, ...]) -> Mask:
        """The lanes whose addresses count."""
        return addressing_lanes(self._addressing, mask, shape)

    def count_bytes(self, ctx: BlockContext, addresses: np.ndarray, mask: Mask, way: str) -> None:
        lanes = self.lanes(mask, addresses.shape)
        rows = addresses.size if lanes is None else int(np.count_nonzero(lanes))
        ctx.counters.add(f"shared_bytes_{way}", rows * ROW_BYTES)


@effect("ldmatrix.sync.aligned.m16n16", "ldmatrix.sync.aligned.m8n16")
class LdMatrixBytes(_ByteMatrixAccess):
    """``ldmatrix.sync.aligned.m8n16.xN.shared.b8x16.srcfmt``, and ``.m16n16.xN.trans`` also of
    bytes."""

    counter_class = "ldmatrix"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        if len(self.dests) != self.count * (2 if self.square else 1):
            raise self.unsupported(f"{len(self.dests)} registers for {self.count} matrices")
        self.sources = instr.operands[1:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        (addresses,) = sources
        self.count_bytes(ctx, addresses, mask, "read")
        lanes = self.lanes(mask, addresses.shape)
        raw = ctx.subsystem("shared").load(ctx, addresses, ROW_BYTES, lanes)
        rows = raw.view(np.uint8).reshape(*raw.shape, ROW_BYTES)
        if self.bits != 8:
            rows = unpack_bits(rows, self.bits)
        out: list[np.ndarray] = []
        for j in range(self.count):
            if self.square:
                matrix = rows[:, :, 16 * j : 16 * j + 16].swapaxes(-1, -2)
                out += [_quads(matrix[:, :, :8]), _quads(matrix[:, :, 8:])]
            else:
                out.append(_quads(rows[:, :, 8 * j : 8 * j + 8]))
        return tuple(out)


def _quads(matrix: np.ndarray) -> np.ndarray:
    """``(w, c, 8, 16)`` bytes: lane 4g+t gets columns 4t … 4t+3 of row g, as uint32."""
    words = np.ascontiguousarray(matrix).view(np.uint32)
    return words.reshape(*words.shape[:2], 32)


@effect("stmatrix.sync.aligned.m16n8")
class StMatrixBytes(_ByteMatrixAccess):
    """``stmatrix.sync.aligned.m16n8.xN.trans.shared.b8``."""

    counter_class = "stmatrix"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        values = instr.operands[1]
        given = len(values.items) if isinstance(values, ptx.Vector) else 1
        if given != self.count:
            raise self.unsupported(f"{given} registers for {self.count} matrices")
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, values = sources
        values = values if isinstance(values, tuple) else (values,)
        columns = np.zeros((*addresses.shape[:2], 4, 8, ROW_BYTES), np.uint8)
        for j, value in enumerate(values):
            elements = np.ascontiguousarray(value).view(np.uint8)
            # (g, t, upper half, column parity) → (t, parity: the column), (upper half, g: the row)
            elements = elements.reshape(*addresses.shape[:2], 8, 4, 2, 2)
            columns[:, :, j] = elements.transpose(0, 1, 3, 5, 4, 2).reshape(
                *addresses.shape[:2], 8, ROW_BYTES
            )
        rows = columns.reshape(*addresses.shape, ROW_BYTES).view(WORDS[ROW_BYTES])[..., 0]
        self.count_bytes(ctx, addresses, mask, "written")
        lanes = self.lanes(mask, addresses.shape)
        ctx.subsystem("shared").store(ctx, addresses, ROW_BYTES, rows, lanes)
