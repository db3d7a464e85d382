"""Warpgroup matrix products: what is pending, when it is computed, where the result goes.

The four warps of a warpgroup issue the same products and close the same groups, each at its own
time; a group is *issued* once all four have committed it. From then on its accumulators belong to
the tensor core until a wait covers the group: under the ``late`` policy they are poisoned, operands
in shared memory are read and the product is computed only at the wait; under ``eager`` that happens
at once; under ``random`` one or the other.

Products that follow one another on one accumulator within a group are one matrix product along k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa.ptx import Instr
from cute_fa.sim.async_shadow import Area, AsyncShadow, Issuer, report_warp
from cute_fa.sim.canonical_layouts import outside
from cute_fa.sim.descriptors import chain_chunks, chain_extent
from cute_fa.sim.engines import WARPGROUP, tensor_row
from cute_fa.sim.fragments import DECODERS
from cute_fa.sim.isa import Subsystem, Ticket, subsystem
from cute_fa.sim.memory import WORDS

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

ROWS = 64
POISON = np.uint32(0x7FC0DEAD)


@dataclass(frozen=True)
class WgmmaForm:
    """What a ``wgmma.mma_async`` says: n; types of D, A and B; transposition; signs; saturation.

    Attributes:
        rows: register file rows of the accumulator, in order; it identifies the accumulator.
        a_in_registers: A is four registers of each thread instead of a descriptor.
    """

    n: int
    d: str
    a: str
    b: str
    rows: tuple[int, ...]
    a_in_registers: bool
    transpose_a: bool = False
    transpose_b: bool = False
    sign: int = 1
    saturate: bool = False

    @property
    def chains_with(self) -> tuple[Any, ...]:
        """What two products on one accumulator need to have in common to be one."""
        return self.a, self.b, self.a_in_registers, self.transpose_a, self.transpose_b, self.sign


@dataclass(eq=False)
class Issue:
    """One executed ``wgmma.mma_async``, for all warps of a rectangle.

    Attributes:
        a: descriptors ``(w, c)``, or four registers ``(w, c, 32)`` stacked: ``(4, w, c, 32)``.
        b: descriptors ``(w, c)``; accumulate: scale-d ``(w, c)``.
    """

    form: WgmmaForm
    instr: Instr
    origin: tuple[int, int]  # w0, c0
    a: np.ndarray
    b: np.ndarray
    accumulate: np.ndarray

    def key(self, warp: int, slot: int) -> tuple[int, bool, int, int]:
        """What all warps of the warpgroup have to agree on."""
        at = warp - self.origin[0], slot - self.origin[1]
        a = 0 if self.form.a_in_registers else int(self.a[at])
        return self.instr.index, bool(self.accumulate[at]), a, int(self.b[at])


@dataclass(eq=False)
class Chain:
    """Products of one group on one accumulator.

    ``fresh``: the first one overwrites the accumulator. ``base``: its value before, ``(64, n)``,
    taken when the group was issued; None where it comes from an earlier pending group.
    """

    issues: list[list[Issue]]  # for each product, the issue of each of the four warps
    keys: list[tuple[int, bool, int, int]]
    fresh: bool
    base: np.ndarray | None = None
    areas: list[Area] = field(default_factory=list)

    @property
    def form(self) -> WgmmaForm:
        return self.issues[0][0].form


@dataclass(eq=False)
class Group:
    """One issued group of one warpgroup: its chains in order; ``limit`` for the race clocks."""

    chains: list[Chain]
    done: bool = False
    limit: np.uint32 | None = None


class Warpgroup:
    """The products of one warpgroup of one CTA.

    Attributes:
        open: products of each warp since its last commit.
        committed: groups that each warp has closed and that not all have; counts: all ever closed.
        groups: issued groups, by number; retired ones become None.
        values: accumulators between two pending groups, by register rows.
        pending: how many unfinished chains each accumulator has.
    """

    def __init__(self) -> None:
        self.open: list[list[Issue]] = [[] for _ in range(WARPGROUP)]
        self.committed: list[list[list[Issue]]] = [[] for _ in range(WARPGROUP)]
        self.counts = [0] * WARPGROUP
        self.groups: list[Group] = []
        self.retired = 0
        self.values: dict[tuple[int, ...], np.ndarray] = {}
        self.pending: dict[tuple[int, ...], int] = {}
        self.waiting: list[Ticket] = []


@subsystem
class TensorCores(Subsystem):
    """The warpgroups of one wave that use wgmma, by (slot, warpgroup)."""

    name = "tensor-cores"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.units: dict[tuple[int, int], Warpgroup] = {}
        self.reported: set[int] = set()

    @property
    def areas(self) -> AsyncShadow:
        return self.wave.shared_state[AsyncShadow.name]

    def unit(self, slot: int, warp: int) -> Warpgroup:
        key = slot, warp // WARPGROUP
        found = self.units.get(key)
        if found is None:
            found = self.units[key] = Warpgroup()
        return found

    def whole(self, warp: int) -> bool:
        """Whether the warp's warpgroup has all four warps."""
        return warp // WARPGROUP * WARPGROUP + WARPGROUP <= self.wave.num_warps

    def issue(self, warps: Sequence[tuple[int, int]], issue: Issue) -> None:
        """``(warp, slot)`` execute a product."""
        for warp, slot in warps:
            self.unit(slot, warp).open[warp % WARPGROUP].append(issue)

    def commit(self, ctx: BlockContext, warps: Sequence[tuple[int, int]]) -> None:
        """Close the open group of each ``(warp, slot)``; empty ones count."""
        touched = {}
        for warp, slot in warps:
            unit = self.unit(slot, warp)
            member = warp % WARPGROUP
            unit.committed[member].append(unit.open[member])
            unit.open[member] = []
            unit.counts[member] += 1
            touched[slot, warp // WARPGROUP] = unit
        for (slot, number), unit in touched.items():
            while all(unit.committed):
                self._issue_group(ctx, unit, slot, number, [c.pop(0) for c in unit.committed])
                ctx.release(*unit.waiting)
                unit.waiting = []

    def _issue_group(
        self, ctx: BlockContext, unit: Warpgroup, slot: int, number: int, lists: list[list[Issue]]
    ) -> None:
        first = number * WARPGROUP
        keys = [
            [issue.key(first + member, slot) for issue in issues]
            for member, issues in enumerate(lists)
        ]
        if any(other != keys[0] for other in keys[1:]):
            text = "the warps of a warpgroup issue different products or give different operands"
            instr = lists[0][0].instr if lists[0] else ctx.instr
            report_warp(ctx, "wgmma-operands", text, slot, first, instr=instr)
            shortest = min(len(issues) for issues in lists)
            lists = [issues[:shortest] for issues in lists]
            keys[0] = keys[0][:shortest]
        chains: list[Chain] = []
        for position, key in enumerate(keys[0]):
            members = [issues[position] for issues in lists]
            self._extend(chains, members, key)
        group = Group(chains)
        unit.groups.append(group)
        policy = self.wave.options.completion
        eager = policy == "eager" or (policy == "random" and bool(self.wave.rng.random() < 0.5))
        for chain in chains:
            self._begin_reads(ctx, chain, slot, number)
            rows = chain.form.rows
            if not unit.pending.get(rows):
                if not chain.fresh:
                    chain.base = self._read_accumulator(chain.form, slot, number)
                unit.pending[rows] = 0
            unit.pending[rows] += 1
        if eager:
            self._finish_before(unit, slot, number, len(unit.groups))
        else:
            for chain in chains:
                places = np.array(chain.form.rows)
                self.wave.regs["r"][places, first : first + WARPGROUP, slot] = POISON

    @staticmethod
    def _extend(chains: list[Chain], members: list[Issue], key: tuple[int, bool, int, int]) -> None:
        """Add a product to the group's chains: to the last one on its accumulator if it fits."""
        form = members[0].form
        accumulates = key[1]
        for chain in reversed(chains):
            if chain.form.rows == form.rows:
                if accumulates and chain.form.chains_with == form.chains_with:
                    chain.issues.append(members)
                    chain.keys.append(key)
                    return
                break
        chains.append(Chain([members], [key], fresh=not accumulates))

    # --- operands in shared memory ----------------------------------------------------------------

    @staticmethod
    def _operands(chain: Chain) -> list[tuple[tuple[int, ...], int, bool]]:
        """(descriptors, rows, transposed) of the operands in shared memory: B, then A."""
        form = chain.form
        out = [(tuple(key[3] for key in chain.keys), form.n, form.transpose_b)]
        if not form.a_in_registers:
            out.append((tuple(key[2] for key in chain.keys), ROWS, form.transpose_a))
        return out

    def _begin_reads(self, ctx: BlockContext, chain: Chain, slot: int, number: int) -> None:
        first = number * WARPGROUP
        issuer = Issuer(slot, first, first + WARPGROUP)
        row = tensor_row(self.wave.num_warps, number)
        committing, ctx.instr = ctx.instr, chain.issues[0][0].instr
        for operand in self._operands(chain):
            extent = chain_extent(*operand)
            text = outside(self.wave, extent)
            if text is not None:
                report_warp(ctx, "shared-out-of-bounds", text, slot, first)
                continue
            if self.areas.active:
                area = self.areas.matrix(slot, chain_chunks(*operand), extent)
                self.areas.begin_read(ctx, issuer, area, row)
                chain.areas.append(area)
        ctx.instr = committing

    def _operand(self, chunks: np.ndarray, slot: int, kind: str, transposed: bool) -> np.ndarray:
        """Decode an operand from shared memory: ``(rows, k)``."""
        words = self.wave.smem[slot]
        flat = words[: words.size // 16 * 16].view(WORDS[16])
        data = np.ascontiguousarray(flat.take(chunks, mode="clip"))
        if transposed:
            turned = np.ascontiguousarray(data.view(np.uint16).T)
            return DECODERS[kind](turned.view(np.uint32))
        return DECODERS[kind](data.view(np.uint32))

    # --- results ----------------------------------------------------------------------------------

    def _fragment(self, chain: Chain, slot: int, number: int) -> np.ndarray:
        """A from registers: ``(64, k)``; register j: row half j % 2, 16-byte half j // 2."""
        first = number * WARPGROUP
        out = np.empty((WARPGROUP, 2, 8, len(chain.issues), 2, 4), np.uint32)
        for position, members in enumerate(chain.issues):
            for member, issue in enumerate(members):
                w, c = first + member - issue.origin[0], slot - issue.origin[1]
                registers = issue.a[:, w, c].reshape(2, 2, 8, 4)  # k half, row half, row, word
                out[member, :, :, position] = registers.transpose(1, 2, 0, 3)
        return DECODERS[chain.form.a](out.reshape(ROWS, -1))

    def _product(self, chain: Chain, slot: int, number: int) -> np.ndarray:
        form = chain.form
        chunks = [chain_chunks(*operand) for operand in self._operands(chain)]
        right = self._operand(chunks[0], slot, form.b, form.transpose_b)
        if form.a_in_registers:
            left = self._fragment(chain, slot, number)
        else:
            left = self._operand(chunks[1], slot, form.a, form.transpose_a)
        if form.d == "s32":
            return (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.int64)
        product = left @ right.T
        return product if form.sign > 0 else -product

    def _finish_before(self, unit: Warpgroup, slot: int, number: int, stop: int) -> None:
        """Compute the groups up to ``stop`` that are not done, in order."""
        for group in unit.groups[unit.retired : stop]:
            if group.done:
                continue
            group.done = True
            for chain in group.chains:
                self._finish(unit, chain, slot, number)

    def _finish(self, unit: Warpgroup, chain: Chain, slot: int, number: int) -> None:
        form = chain.form
        value = self._product(chain, slot, number)
        if not chain.fresh:
            base = unit.values.get(form.rows) if chain.base is None else chain.base
            if base is not None:
                value = value + base
        value = _round(form, value)
        unit.pending[form.rows] -= 1
        if unit.pending[form.rows]:
            unit.values[form.rows] = value
        else:
            unit.values.pop(form.rows, None)
            self._write_accumulator(form, slot, number, value)

    def _read_accumulator(self, form: WgmmaForm, slot: int, number: int) -> np.ndarray:
        first = number * WARPGROUP
        rows = np.array(form.rows)
        raw = np.ascontiguousarray(self.wave.regs["r"][rows, first : first + WARPGROUP, slot])
        if form.d == "f16":
            pairs = raw.view(np.float16).reshape(form.n // 8, 2, WARPGROUP, 8, 4, 2)
            return pairs.transpose(2, 1, 3, 0, 4, 5).reshape(ROWS, form.n).astype(np.float32)
        typed = raw.view(np.int32 if form.d == "s32" else np.float32)
        grid = typed.reshape(form.n // 8, 2, 2, WARPGROUP, 8, 4).transpose(3, 1, 4, 0, 5, 2)
        return grid.reshape(ROWS, form.n)

    def _write_accumulator(
        self, form: WgmmaForm, slot: int, number: int, value: np.ndarray
    ) -> None:
        first = number * WARPGROUP
        grid = value.reshape(WARPGROUP, 2, 8, form.n // 8, 4, 2)
        if form.d == "f16":
            halves = np.ascontiguousarray(grid.transpose(3, 1, 0, 2, 4, 5)).astype(np.float16)
            raw = halves.view(np.uint32)
        else:
            raw = np.ascontiguousarray(grid.transpose(3, 1, 5, 0, 2, 4)).view(np.uint32)
        shaped = raw.reshape(len(form.rows), WARPGROUP, 32)
        self.wave.regs["r"][np.array(form.rows), first : first + WARPGROUP, slot] = shaped

    # --- waiting ----------------------------------------------------------------------------------

    def wait(self, warp: int, slot: int, newest: int) -> Warpgroup | None:
        """A warp waits for all but its ``newest`` closed groups.

        Returns:
            None if they are complete now; the warpgroup if other warps have yet to commit them.
        """
        unit = self.units.get((slot, warp // WARPGROUP))
        if unit is None:
            return None
        stop = unit.counts[warp % WARPGROUP] - newest
        if stop > len(unit.groups):
            return unit
        number = warp // WARPGROUP
        self._finish_before(unit, slot, number, stop)
        self._retire(unit, slot, number, stop)
        clocks = self.areas.clocks
        if clocks is not None and stop > 0:
            limit = unit.groups[stop - 1].limit
            if limit is not None:
                known = np.zeros((1, clocks.columns), np.uint32)
                row = tensor_row(self.wave.num_warps, number)
                known[0, int(clocks.agent[row, slot])] = limit
                clocks.acquire((warp, warp + 1, slot, slot + 1), known)
        return None

    def _retire(self, unit: Warpgroup, slot: int, number: int, stop: int) -> None:
        """What the groups read has been read, and their operands can be dropped."""
        row = tensor_row(self.wave.num_warps, number)
        clocks = self.areas.clocks
        for group in unit.groups[unit.retired : max(stop, unit.retired)]:
            if clocks is not None:
                for chain in group.chains:
                    event = clocks.access(chain.issues[0][0].instr.index)
                    for area in chain.areas:
                        self.areas.finish_read(area, row, slot, row, event)
                    group.limit = np.uint32(event + np.uint32(clocks.agents))
                if group.limit is None and unit.retired:
                    group.limit = unit.groups[unit.retired - 1].limit
            group.chains = []
            unit.retired += 1

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        """A warp must not exit with products that it has not waited for."""
        for (slot, number), unit in self.units.items():
            _, _, c0, c1 = lanes.rect
            unwaited = unit.retired < len(unit.groups) or any(unit.open) or any(unit.committed)
            if unwaited and c0 <= slot < c1:
                gone = lanes.full_mask()[:, slot].any(axis=-1)
                mine = [w for w in np.flatnonzero(gone) if w // WARPGROUP == number]
                if mine:
                    text = "a warp exits with wgmma products that it has not waited for"
                    report_warp(ctx, "wgmma-unwaited", text, slot, int(mine[0]))

    def describe(self) -> list[str]:
        return [
            f"warpgroup {number} of CTA {tuple(int(x) for x in self.wave.cta_ids[slot])}: "
            f"wgmma groups committed by its warps: {unit.counts}"
            for (slot, number), unit in self.units.items()
            if unit.waiting
        ]


def _round(form: WgmmaForm, value: np.ndarray) -> np.ndarray:
    """A result in the accumulator's type (as float32 for f16)."""
    if form.d == "s32":
        if form.saturate:
            limit = np.iinfo(np.int32)
            return np.clip(value, limit.min, limit.max).astype(np.int32)
        return value.astype(np.int32)
    if form.d == "f16":
        return value.astype(np.float16).astype(np.float32)
    return value.astype(np.float32, copy=False)
