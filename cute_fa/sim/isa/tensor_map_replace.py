"""Tensor maps that a kernel changes: ``tensormap.replace`` (PTX ISA 9.7.9.28), its copy to global
memory ``tensormap.cp_fenceproxy`` (9.7.13.16), and the fences between the two proxies (9.7.13.4).

A map is changed in shared or global memory and read by tensor copies from global memory. The
simulator carries everything out in program order; whether the fences are there that hardware needs
is asked by :mod:`cute_fa.sim.tensor_map_changes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import accesses
from cute_fa.sim.addresses import SHARED_WINDOW_END
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.memory import WORDS
from cute_fa.sim.shared_memory import fault_of
from cute_fa.sim.tensor_map import MAP_BYTES
from cute_fa.sim.tensor_map_changes import TensorMapChanges

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

CHUNK = 16
_BY_DIMENSION = ("box_dim", "global_dim", "global_stride", "element_stride")
_FLAGS = {"interleave_layout": (11, 2), "swizzle_mode": (13, 2), "fill_mode": (15, 1)}
_FLAGS["swizzle_atomicity"] = (19, 2)
_TF32, _FIRST_PACKED = 11, 13  # values of .elemtype; a map says tf32 with a flag


def put(words: np.ndarray, field: str, ordinal: int, value: int) -> None:
    """Change one field of a map, given as 32-bit words; the places are those of ``tensor_map``."""
    if field == "global_address":
        words[0], words[1] = value & 0xFFFF_FFFF, value >> 32
    elif field == "rank":
        _put_bits(words, 2, 4, 3, value)
    elif field == "elemtype":
        tf32 = _TF32 <= value < _FIRST_PACKED
        code = value - 4 if tf32 else value - 2 if value >= _FIRST_PACKED else value
        _put_bits(words, 2, 7, 4, code)
        _put_bits(words, 2, 16, 1, int(tf32))
    elif field in _FLAGS:
        _put_bits(words, 2, *_FLAGS[field], value)
    elif field == "global_dim":
        words[8 + ordinal] = (value - 1) & 0xFFFF_FFFF
    elif field == "global_stride":
        words[3 + ordinal] = value >> 4 & 0xFFFF_FFFF
        _put_bits(words, 7, 4 * ordinal, 4, value >> 36)
    elif field == "element_stride":
        _put_bits(words, 13, 3 * ordinal, 3, value - 1)
    elif ordinal == 0:
        _put_bits(words, 13, 24, 8, value - 1)
    else:
        _put_bits(words, 14, 8 * (ordinal - 1), 8, value - 1)


def _put_bits(words: np.ndarray, word: int, low: int, width: int, value: int) -> None:
    mask = (1 << width) - 1
    words[word] = (int(words[word]) & ~(mask << low)) | (value & mask) << low


class _MapAccess(Decoded):
    """Reads and writes of whole maps by single lanes."""

    counter_class = "tensor_map"

    def read(self, ctx: BlockContext, space: str, address: int, lane: np.ndarray) -> np.ndarray:
        """The 32 words of the map at an address, read by one lane."""
        chunks = [
            self._load(ctx, space, address + offset, lane) for offset in range(0, MAP_BYTES, CHUNK)
        ]
        return np.concatenate(chunks).view(np.uint32)

    def write(
        self, ctx: BlockContext, space: str, address: int, lane: np.ndarray, words: np.ndarray
    ) -> None:
        """Store the 32 words of a map."""
        for index, chunk in enumerate(words.view(WORDS[CHUNK])):
            addresses = np.full(lane.shape, address + CHUNK * index, np.uint64)
            values = np.broadcast_to(chunk, lane.shape)
            if space == "shared":
                ctx.subsystem("shared").store(ctx, addresses, CHUNK, values, lane)
            else:
                ctx.wave.memory.scatter(addresses, CHUNK, values, lane, fault_of(ctx))

    @staticmethod
    def note(ctx: BlockContext, at: tuple[int, ...], address: int, *, released: bool) -> None:
        """The lane at a position of ``ctx.rect`` has changed a map in global memory."""
        w0, _, c0, _ = ctx.rect
        unit: TensorMapChanges = ctx.subsystem(TensorMapChanges.name)
        unit.change(ctx, c0 + at[1], w0 + at[0], address, released=released)

    @staticmethod
    def _load(ctx: BlockContext, space: str, address: int, lane: np.ndarray) -> np.ndarray:
        addresses = np.full(lane.shape, address, np.uint64)
        if space == "shared":
            values = ctx.subsystem("shared").load(ctx, addresses, CHUNK, lane)
        else:
            values = ctx.wave.memory.gather(addresses, CHUNK, lane, fault_of(ctx))
        return np.ascontiguousarray(values[lane]).view(np.uint8)

    @staticmethod
    def lanes(ctx: BlockContext, mask: Mask) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """Position of each executing lane, and a mask of it alone."""
        active = ctx.lanes.dense_mask() if mask is None else mask
        found = []
        for position in np.argwhere(active):
            one = np.zeros_like(active)
            one[tuple(position)] = True
            found.append((tuple(int(x) for x in position), one))
        return found


@effect("tensormap.replace")
class Replace(_MapAccess):
    """``tensormap.replace.tile.field{.space}.b1024.type [addr], {ord,} new_val``."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts
        if parts[2] != "tile" or "b1024" not in parts:
            raise self.unsupported("mode")
        self.field = parts[3]
        self.space = accesses.space_of(parts)
        operands = list(instr.operands)
        self.ordinal = 0
        if self.field in _BY_DIMENSION:
            ordinal = operands.pop(1)
            if not isinstance(ordinal, ptx.Imm):
                raise self.unsupported("an ordinal that is not a literal")
            self.ordinal = ordinal.value
        elif self.field not in (*_FLAGS, "global_address", "rank", "elemtype"):
            raise self.unsupported(f"field .{self.field}")
        value = operands[1]
        if self.field == "swizzle_mode" and isinstance(value, ptx.Imm) and value.value > 3:
            raise self.unsupported("96-byte swizzles")
        self.sources = tuple(operands)
        self.source_dtypes = (None, np.dtype(np.uint64 if parts[-1] == "b64" else np.uint32))

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, values = sources
        for at, lane in self.lanes(ctx, mask):
            address = int(addresses[at])
            space = self.space
            if space == "generic":
                space = "shared" if address < SHARED_WINDOW_END else "global"
            words = self.read(ctx, space, address, lane)
            put(words, self.field, self.ordinal, int(values[at]))
            self.write(ctx, space, address, lane, words)
            if space == "global":
                self.note(ctx, at, address, released=False)


@effect("tensormap.cp_fenceproxy")
class CopyFenced(_MapAccess):
    """``tensormap.cp_fenceproxy.global.shared::cta.….sync.aligned [dst], [src], 128``.

    All lanes of a warp give the same addresses; the map is copied once for each.
    """

    collective = True

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        size = instr.operands[2]
        if not isinstance(size, ptx.Imm) or size.value != MAP_BYTES:
            raise self.unsupported("a size other than 128")
        self.sources = instr.operands[:2]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        targets, origins = sources
        seen = set()
        for at, lane in self.lanes(ctx, mask):
            key = (*at[:2], int(targets[at]), int(origins[at]))
            if key in seen:
                continue
            seen.add(key)
            words = self.read(ctx, "shared", key[3], lane)
            self.write(ctx, "global", key[2], lane, words)
            self.note(ctx, at, key[2], released=True)


@effect("fence.proxy.tensormap::generic")
class TensorMapFence(Decoded):
    """``fence.proxy.tensormap::generic.release.scope`` and ``….acquire.scope [addr], 128``."""

    counter_class = "fence"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        order = instr.parts[3]
        self.acquires = order == "acquire"
        if order not in ("acquire", "release") or len(instr.operands) != 2 * self.acquires:
            raise self.unsupported("kind of proxy fence")
        if self.acquires:
            if self.literal(instr.operands[1], "a size") != MAP_BYTES:
                raise self.unsupported("a size other than 128")
            self.sources = instr.operands[:1]

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        unit: TensorMapChanges = ctx.subsystem(TensorMapChanges.name)
        active = ctx.lanes.dense_mask() if mask is None else mask
        if not self.acquires:
            unit.release(ctx, np.asarray(active.any(axis=-1)))
            return
        w0, _, c0, _ = ctx.rect
        for w, c in np.argwhere(active.any(axis=-1)):
            for address in np.unique(sources[0][w, c][active[w, c]]):
                unit.acquire(ctx, c0 + int(c), w0 + int(w), int(address))
