"""``tcgen05.ld`` and ``tcgen05.st`` (PTX ISA 9.7.16.8): tensor memory to registers and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Decoded, Mask, effect, register_names
from cute_fa.sim.isa.floating import max_nan, max_number, min_nan, min_number
from cute_fa.sim.tensor_flow import used_loads
from cute_fa.sim.tensor_memory import (
    COLUMN_MASK,
    COLUMNS,
    LANE_SHIFT,
    POISON,
    TensorMemory,
    check_whole_warps,
)
from cute_fa.sim.tensor_pieces import (
    HALF_LANES,
    QUARTER_LANES,
    QUARTERS,
    SHAPES,
    Piece,
    Shape,
    image,
    pieces,
)

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

WARP = 32
_KEY_COLUMNS = 1 << 20  # room for a column in the number that stands for an access
_MOST_PLANS = 4096
_REDUCTIONS = {
    ("max", False): max_number,
    ("max", True): max_nan,
    ("min", False): min_number,
    ("min", True): min_nan,
}

Plan = tuple[tuple[Piece, ...], bool]  # pieces; whether they cover the rectangle


class _Access(Decoded):
    """What loads and stores share: the form, the warps' addresses, and where they lead.

    Attributes:
        shape, form: by name and as a row of ``SHAPES``; repeat: the factor behind ``.x``.
        registers: of each thread.
        packed: two 16-bit columns for each 32 bits of a register.
        columns: columns of each access; split: how far the second one is from the first, or 0.
    """

    collective = True
    modifiers: frozenset[str] = frozenset()

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        parts = instr.parts[2:]
        names = [part for part in parts if part in SHAPES]
        repeats = [int(part[1:]) for part in parts if part[:1] == "x" and part[1:].isdigit()]
        if len(names) != 1 or len(repeats) != 1:
            raise self.unsupported("shape")
        self.shape, self.repeat = names[0], repeats[0]
        self.form: Shape = SHAPES[self.shape]
        if self.repeat & (self.repeat - 1) or self.repeat > self.form.most:
            raise self.unsupported(f"repeat factor .x{self.repeat} of shape .{self.shape}")
        self.packed = f"{self.pack}::16b" in parts
        known = {"sync", "aligned", self.shape, f"x{self.repeat}", f"{self.pack}::16b"}
        self.refuse_unknown(parts, known | self.modifiers)
        self.registers = self.form.registers * self.repeat
        self.columns = self.form.columns * self.repeat * (2 if self.packed else 1)
        self.split = 0

    pack = "pack"

    def vector(self, operand: ptx.Operand) -> ptx.Vector:
        """The registers, as many as the shape has."""
        if not isinstance(operand, ptx.Vector):
            operand = ptx.Vector((operand,))
        if len(operand.items) != self.registers:
            raise self.unsupported(f"{len(operand.items)} registers, not {self.registers}")
        return operand

    def half_offset(self, operands: tuple[ptx.Operand, ...]) -> None:
        """Take ``immHalfSplitoff`` of ``.16x32bx2``."""
        wanted = self.shape == "16x32bx2"
        if len(operands) != int(wanted):
            raise self.unsupported("number of operands")
        if wanted:
            if not isinstance(operands[0], ptx.Imm):
                raise self.unsupported("a half offset that is not a literal")
            self.split = operands[0].value

    def plan(
        self, ctx: BlockContext, memory: TensorMemory, addresses: np.ndarray, mask: Mask
    ) -> Plan:
        """The pieces that the executing warps access, worked out once for the same addresses."""
        if addresses.strides[2]:
            uneven = addresses != addresses[..., :1]
            if mask is not None:
                uneven &= mask
            if uneven.any():
                text = "the lanes of a warp give different tensor memory addresses"
                report_lanes(ctx, "tmem-operands", text, uneven, addresses)
        base = addresses[..., 0] if mask is None else self._first_active(addresses, mask)
        where = None if mask is None else mask.tobytes()
        key = self.instr.index, ctx.rect, base.tobytes(), where, memory.epoch
        known = memory.plans.get(key)
        if known is None:
            known, good = self._work_out(ctx, memory, base.astype(np.int64), mask)
            if good:
                if len(memory.plans) >= _MOST_PLANS:
                    memory.plans.clear()
                memory.plans[key] = known
        return known

    @staticmethod
    def _first_active(addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
        lane = mask.argmax(axis=-1)[..., None]
        return np.take_along_axis(addresses, lane, axis=-1)[..., 0]

    def _work_out(
        self, ctx: BlockContext, memory: TensorMemory, base: np.ndarray, mask: Mask
    ) -> tuple[Plan, bool]:
        """The plan, and whether there was nothing wrong with it."""
        w0, w1, c0, c1 = ctx.rect
        lanes, column = base >> LANE_SHIFT, base & COLUMN_MASK
        own = np.arange(w0, w1)[:, None] % QUARTERS * QUARTER_LANES
        active = np.ones(base.shape, bool) if mask is None else mask.any(axis=-1)
        # An address that names lanes of the first quarter is common in programs that run: the
        # hardware adds the warp's own quarter, which the ISA does not say.
        implied = (lanes < QUARTER_LANES) & (own > 0)
        offset = np.where(implied, lanes, lanes - own)
        foreign = (offset < 0) | (offset >= QUARTER_LANES)
        skewed = ~foreign & (offset % self.form.lanes != 0)
        last = np.maximum(column, column + self.split) + self.columns
        outside = (last > COLUMNS) | (column + self.split < 0)
        unallocated = np.zeros_like(foreign)
        for start in np.unique(column[active & ~outside]):
            owned = np.ones(c1 - c0, bool)
            for first in {int(start), int(start) + self.split}:
                owned &= memory.allocated[c0:c1, first : first + self.columns].all(axis=1)
            unallocated |= (column == start) & ~owned
        bad = np.zeros_like(foreign)
        size = f"{self.columns} columns from lane {{}}, column {{}} on"
        for rule, which, text in (
            ("tmem-lane-access", foreign, "the warp may not access this: "),
            ("tmem-operands", skewed, f"lanes that are no multiple of {self.form.lanes}: "),
            ("tmem-out-of-bounds", outside, "past the last column: "),
            ("tmem-unallocated", unallocated, "columns that are not allocated: "),
        ):
            found = which & active & ~bad
            if found.any():
                w, c = np.argwhere(found)[0]
                text += size.format(int(lanes[w, c]), int(column[w, c]))
                shown = np.broadcast_to(base[..., None], (*base.shape, WARP))
                report_lanes(ctx, rule, text, np.repeat(found[..., None], WARP, -1), shown)
                bad |= found
        self._note_implied(ctx, base, implied & active & ~bad)
        keys = np.where(active & ~bad, offset // HALF_LANES * _KEY_COLUMNS + column, -1)
        halves = self.form.lanes // HALF_LANES
        out = []
        for number, piece in pieces(ctx.rect, keys):
            half, start = divmod(number, _KEY_COLUMNS)
            columns = slice(start, start + self.columns)
            out.append(piece._replace(columns=columns, halves=slice(half, half + halves)))
        whole = not bad.any() and bool(active.all())
        return (tuple(out), whole), not bad.any()

    @staticmethod
    def _note_implied(ctx: BlockContext, base: np.ndarray, warps: np.ndarray) -> None:
        """Report the warps that leave their quarter of the lanes to the hardware."""
        if warps.any():
            text = "the address names lanes of warp 0; the warp's own lanes are taken"
            shown = np.broadcast_to(base[..., None], (*base.shape, WARP))
            report_lanes(
                ctx, "tmem-lane-implied", text, np.repeat(warps[..., None], WARP, -1), shown
            )

    def accesses(self, piece: Piece) -> tuple[Piece, ...]:
        """The accesses of a piece: one, or the two of ``.16x32bx2``."""
        return (piece, piece.shifted(self.split)) if self.shape == "16x32bx2" else (piece,)


@effect("tcgen05.ld")
class Load(_Access):
    """``tcgen05.ld{.red}.sync.aligned.shape.num…  r{, redval}, [taddr]{, immHalfSplitoff}``.

    Attributes:
        used: the registers are used before others are let on (:mod:`tensor_flow`).
        reduction: of ``.red``; by type, with ``.abs`` on what it takes.
    """

    counter_class = "ld_tmem"
    modifiers = frozenset(("red", "min", "max", "abs", "NaN", "f32", "u32", "s32", "b32"))

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        operands = list(instr.operands)
        self.dests = register_names(self.vector(operands.pop(0)))
        self.reduces = "red" in instr.parts
        if self.reduces:
            self.dests += register_names(operands.pop(0))
            self._reduction(instr.parts)
        self.sources = (operands.pop(0),)
        self.half_offset(tuple(operands))
        self.dest_dtypes = [np.dtype(np.uint32)] * len(self.dests)
        self.static_counts = {"tmem_bytes_read": 4 * WARP * self.registers}
        self.used = instr.index in used_loads(kernel)

    def _reduction(self, parts: tuple[str, ...]) -> None:
        kinds = [part for part in parts if part in ("f32", "u32", "s32")]
        operators = [part for part in parts if part in ("min", "max")]
        if len(kinds) != 1 or len(operators) != 1 or self.repeat < 2 or self.packed:
            raise self.unsupported("reduction")
        if self.shape not in ("32x32b", "16x32bx2"):
            raise self.unsupported(f"a reducing load of shape .{self.shape}")
        self.type = {"f32": np.float32, "u32": np.uint32, "s32": np.int32}[kinds[0]]
        self.operator, self.nan, self.abs = operators[0], "NaN" in parts, "abs" in parts
        if kinds[0] != "f32" and (self.nan or self.abs):
            raise self.unsupported("reduction")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...]:
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        check_whole_warps(ctx, mask)
        parts, whole = self.plan(ctx, memory, sources[0], mask)
        shadow = memory.shadow
        if shadow.active:
            for piece in parts:
                for access in self.accesses(piece):
                    shadow.load(ctx, access, used=self.used)
        if whole and len(parts) == 1:
            values = self._values(memory, parts[0])
        else:
            w0, w1, c0, c1 = ctx.rect
            values = np.full((self.registers, w1 - w0, c1 - c0, WARP), POISON, np.uint32)
            for piece in parts:
                warps, slots = piece.warps, piece.slots
                rows, columns = (
                    slice(warps.start - w0, warps.stop - w0),
                    slice(slots.start - c0, slots.stop - c0),
                )
                values[:, rows, columns] = self._values(memory, piece)
        if self.reduces:
            self._check_target(ctx)
            return (*values, self._reduce(values))
        return tuple(values)

    def _values(self, memory: TensorMemory, piece: Piece) -> np.ndarray:
        """The registers of a piece's threads, a fresh array ``(registers, w, c, 32)``."""
        w, c = piece.shape
        if self.shape == "16x32bx2":
            out = np.empty((self.registers, w, c, WARP), np.uint32)
            for number, access in enumerate(self.accesses(piece)):
                cells = self._cells(memory, access)
                out[..., number * 16 : number * 16 + 16] = image(self.shape, cells)
            return out
        view = image(self.shape, self._cells(memory, piece))
        return np.array(view, order="C").reshape(self.registers, w, c, WARP)

    def _cells(self, memory: TensorMemory, access: Piece) -> np.ndarray:
        cells = memory.read(access)
        if self.packed:
            low = cells[:, 0::2] & np.uint32(0xFFFF)
            return low | cells[:, 1::2] << np.uint32(16)
        return cells

    def _reduce(self, values: np.ndarray) -> np.ndarray:
        """Smallest or largest of each thread's registers."""
        numbers = values.view(self.type)
        if self.type is not np.float32:
            join = np.maximum if self.operator == "max" else np.minimum
            return join.reduce(numbers, axis=0).view(np.uint32)
        join_floats = _REDUCTIONS[self.operator, self.nan]
        if self.abs:
            numbers = np.abs(numbers)
        result = numbers[0]
        for row in numbers[1:]:
            result = join_floats(result, row)
        return np.ascontiguousarray(result).view(np.uint32)

    def _check_target(self, ctx: BlockContext) -> None:
        arch = ctx.wave.options.arch
        if arch.startswith("sm_100"):
            text = f"tcgen05.ld.red does not exist on {arch}: it takes sm_101, sm_103 or sm_110"
            report_lanes(ctx, "tmem-operands", text, ctx.lanes.dense_mask())


@effect("tcgen05.st")
class Store(_Access):
    """``tcgen05.st.sync.aligned.shape.num{.unpack::16b}.b32 [taddr]{, immHalfSplitoff}, r``."""

    counter_class = "st_tmem"
    modifiers = frozenset(("b32",))
    pack = "unpack"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        operands = instr.operands
        self.half_offset(operands[1:-1])
        self.sources = operands[0], self.vector(operands[-1])
        self.source_dtypes = None, np.dtype(np.uint32)
        self.static_counts = {"tmem_bytes_written": 4 * WARP * self.registers}

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        memory: TensorMemory = ctx.subsystem(TensorMemory.name)
        check_whole_warps(ctx, mask)
        parts, _ = self.plan(ctx, memory, sources[0], mask)
        shadow = memory.shadow
        w0, _, c0, _ = ctx.rect
        values = np.stack(sources[1]) if parts else None
        for piece in parts:
            if shadow.active:
                for access in self.accesses(piece):
                    shadow.store(ctx, access)
            assert values is not None
            warps, slots = piece.warps, piece.slots
            rows, columns = (
                slice(warps.start - w0, warps.stop - w0),
                slice(slots.start - c0, slots.stop - c0),
            )
            self._put(memory, piece, values[:, rows, columns])

    def _put(self, memory: TensorMemory, piece: Piece, values: np.ndarray) -> None:
        """Store the registers of a piece's threads, ``(registers, w, c, 32)``."""
        for number, access in enumerate(self.accesses(piece)):
            part = values
            if self.shape == "16x32bx2":
                part = values[..., number * 16 : number * 16 + 16]
            cells = memory.split[access.place]
            if not self.packed:
                target = image(self.shape, cells)
                memory.write(access, target, part.reshape(target.shape))
                continue
            for half, bits in enumerate((part & np.uint32(0xFFFF), part >> np.uint32(16))):
                target = image(self.shape, cells[:, half::2])
                memory.write(access, target, bits.reshape(target.shape))
