"""Loads and stores: ``ld``, ``ldu``, ``st`` (PTX ISA 9.7.9, data movement).

Every state space, every width from 8 to 256 bits per thread, vectors included. Weak, volatile,
relaxed, acquire and release accesses all take effect at once, in program order; what their
strength changes is whether they can race (:mod:`cute_fa.sim.shadow`). Cache operators, eviction
priorities, cache policies and prefetch sizes have no effect on values and are accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim import accesses, private_memory
from cute_fa.sim.addresses import LOCAL_BASE, PARAM_BASE, PRIVATE_WINDOW_BYTES, SHARED_WINDOW_END
from cute_fa.sim.isa import Decoded, Mask, effect, register_names
from cute_fa.sim.memory import WORDS, count_sectors, poison
from cute_fa.sim.shared_memory import fault_of

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

_IGNORED = frozenset(
    (
        *("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"),
        *("cta", "cluster", "gpu", "sys"),
        *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified"),
    )
)
_IGNORED_PREFIXES = ("L1::", "L2::", "cta_group::")


def register_bytes(kernel: ptx.Kernel, name: str | None) -> int:
    """Bytes of a declared register (the sink counts as the widest)."""
    if name is None:
        return 16
    return accesses.element_bits((kernel.registers[name][1:],)) // 8


def _is_of_call(instr: ptx.Instr, kernel: ptx.Kernel) -> bool:
    """Whether a ``.param`` access is to a parameter or the result of a call the kernel makes."""
    bases = [o.base for o in instr.operands if isinstance(o, ptx.Address)]
    return any(isinstance(b, ptx.Symbol) and b.name in kernel.param_vars for b in bases)


class MemoryAccess(Decoded):
    """What loads, stores and atomics have in common.

    Attributes:
        space: one of ``accesses.SPACES`` or "generic".
        element: bytes of one element; count: elements per thread; nbytes: of the whole access.
        signed: the type sign-extends into wider registers.
    """

    operators: frozenset[str] = frozenset()
    """Further modifiers that the instruction takes."""

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.space = accesses.space_of(instr.parts)
        if self.space == "param" and _is_of_call(instr, kernel):
            self.space = "local"
        try:
            self.element = accesses.element_bits(instr.parts) // 8
        except ValueError as error:
            raise self.unsupported(str(error)) from None
        self.count = accesses.vector_length(instr.parts)
        self.nbytes = self.element * self.count
        self.signed = instr.parts[-1].startswith("s")
        if self.nbytes not in WORDS:
            raise self.unsupported(f"{self.nbytes} bytes per thread")
        for part in instr.parts[1:-1]:
            name = part.partition("::")[0]
            known = name in accesses.SPACES or part in _IGNORED or part in ("v2", "v4", "v8")
            known = known or part in self.operators
            if not known and not part.startswith(_IGNORED_PREFIXES):
                raise self.unsupported(f"modifier .{part}")
        self.counter_class = f"{instr.op}_{self.space}"  # type: ignore[misc]

    def spaces(self, addresses: np.ndarray, mask: Mask) -> list[tuple[str, Mask]]:
        """Which state space each lane's generic address lies in."""
        if self.space != "generic":
            return [(self.space, mask)]
        active = addresses if mask is None else addresses[mask]
        low, high = int(active.min()), int(active.max())
        if high < SHARED_WINDOW_END:
            return [("shared", mask)]
        if low >= SHARED_WINDOW_END and high < PARAM_BASE:
            return [("global", mask)]
        window = np.uint64(PRIVATE_WINDOW_BYTES)
        shared = addresses < np.uint64(SHARED_WINDOW_END)
        param = (addresses - np.uint64(PARAM_BASE)) < window
        local = (addresses - np.uint64(LOCAL_BASE)) < window
        lanes = {
            "shared": shared,
            "param": param,
            "local": local,
            "global": ~(shared | param | local),
        }
        if mask is not None:
            lanes = {space: where & mask for space, where in lanes.items()}
        return [(space, where) for space, where in lanes.items() if where.any()]

    def count_access(
        self, ctx: BlockContext, space: str, addresses: np.ndarray, mask: Mask
    ) -> None:
        """Add the bytes of one execution to the counters."""
        way = "read" if self.instr.op.startswith("ld") else "written"
        lanes = addresses.size if mask is None else int(np.count_nonzero(mask))
        if space in ("global", "const"):
            ctx.counters.add(f"global_bytes_{way}", lanes * self.nbytes)
            ctx.counters.add(f"global_sectors_{way}", count_sectors(addresses, mask))
        elif space in ("shared", "local"):
            ctx.counters.add(f"{space}_bytes_{way}", lanes * self.nbytes)


@effect("ld", "ldu")
class Load(MemoryAccess):
    """``ld``, ``ld.global.nc`` and ``ldu`` (PTX ISA 9.7.9.8 to 9.7.9.10).

    A strong load may be a poll for what another warp stores: its lanes let all others run first.
    """

    counter_class = "ld"
    progress = False

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.dests = register_names(instr.operands[0])
        if len(self.dests) != self.count:
            raise self.unsupported(f"{len(self.dests)} destinations for {self.count} elements")
        self.sources = instr.operands[1:2]
        self.polls = accesses.is_strong(instr)
        self.ends_block = self.polls  # type: ignore[misc]
        widths = [register_bytes(kernel, name) for name in self.dests]
        kind = "i" if self.signed else "u"
        self._from = np.dtype(f"{kind}{min(self.element, 8)}")
        self.dest_dtypes = [
            np.dtype(f"{kind}{self.element if name is None else min(width, 8)}")
            if self.element <= 8
            else np.dtype(np.uint64)
            for name, width in zip(self.dests, widths, strict=True)
        ]
        if any(width < self.element for width in widths):
            raise self.unsupported("the register is narrower than the type")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[Any, ...]:
        (addresses,) = sources
        if self.polls:
            ctx.yield_(mask)
        parts = self.spaces(addresses, mask)
        if len(parts) == 1:
            raw = self._load(ctx, parts[0][0], addresses, mask)
        else:
            raw = poison(addresses.shape, self.nbytes)
            for space, lanes in parts:
                assert lanes is not None
                raw[lanes] = self._load(ctx, space, addresses, lanes)[lanes]
        return self._elements(np.ascontiguousarray(raw))

    def _load(self, ctx: BlockContext, space: str, addresses: np.ndarray, mask: Mask) -> np.ndarray:
        self.count_access(ctx, space, addresses, mask)
        if space == "shared":
            return ctx.subsystem("shared").load(ctx, addresses, self.nbytes, mask)
        if space == "local":
            return ctx.subsystem("local").load(ctx, addresses, self.nbytes, mask)
        if space == "param":
            return private_memory.load_param(ctx, addresses, self.nbytes, mask)
        wide = addresses.astype(np.uint64, copy=False)
        return ctx.wave.memory.gather(wide, self.nbytes, mask, fault_of(ctx))

    def _elements(self, raw: np.ndarray) -> tuple[Any, ...]:
        """One array per destination, extended to the register's width."""
        if self.element == 16:
            halves = raw.view(np.uint64).reshape(*raw.shape, self.count, 2)
            return tuple((halves[..., j, 0], halves[..., j, 1]) for j in range(self.count))
        values = raw.view(self._from).reshape(*raw.shape, self.count)
        assert self.dest_dtypes is not None
        return tuple(
            np.ascontiguousarray(values[..., j].astype(dtype, copy=False))
            for j, dtype in enumerate(self.dest_dtypes)
        )


@effect("st")
class Store(MemoryAccess):
    """``st`` (PTX ISA 9.7.9.11)."""

    counter_class = "st"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        self.sources = instr.operands[:2]
        value = instr.operands[1]
        items = value.items if isinstance(value, ptx.Vector) else (value,)
        if len(items) != self.count:
            raise self.unsupported(f"{len(items)} values for {self.count} elements")
        narrow = all(
            not isinstance(item, ptx.Reg) or register_bytes(kernel, item.name) == self.element
            for item in items
        )
        plain = narrow and self.element <= 8
        self.source_dtypes = (None, np.dtype(f"u{self.element}") if plain else None)

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        addresses, value = sources
        values = self._pack(value, addresses.shape)
        for space, lanes in self.spaces(addresses, mask):
            self._store(ctx, space, addresses, values, lanes)

    def _pack(self, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The lanes' values as elements of the whole access."""
        items = value if isinstance(self.instr.operands[1], ptx.Vector) else (value,)
        if self.element == 16:
            items = tuple(half for pair in items for half in pair)
        dtype = WORDS[min(self.element, 8)]
        if len(items) == 1:
            return np.ascontiguousarray(items[0].astype(dtype, copy=False))
        packed = np.empty((*shape, len(items)), dtype)
        for j, item in enumerate(items):
            packed[..., j] = item
        return packed.view(WORDS[self.nbytes])[..., 0]

    def _store(
        self,
        ctx: BlockContext,
        space: str,
        addresses: np.ndarray,
        values: np.ndarray,
        mask: Mask,
    ) -> None:
        self.count_access(ctx, space, addresses, mask)
        if space == "shared":
            ctx.subsystem("shared").store(ctx, addresses, self.nbytes, values, mask)
        elif space == "local":
            ctx.subsystem("local").store(ctx, addresses, self.nbytes, values, mask)
        elif space == "param":
            private_memory.store_param(ctx, addresses, self.nbytes, mask)
        else:
            wide = addresses.astype(np.uint64, copy=False)
            ctx.wave.memory.scatter(wide, self.nbytes, values, mask, fault_of(ctx))
