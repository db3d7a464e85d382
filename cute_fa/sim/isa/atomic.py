"""Atomics and reductions: ``atom``, ``red`` (PTX ISA 9.7.13.5, 9.7.13.6).

On global, shared and generic addresses. Lanes that name the same location take turns in the order
warp, CTA, lane; the hardware's order is not specified. Semantics and scopes are accepted: every
effect is immediate and seen by all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.async_shadow import AsyncShadow
from cute_fa.sim.isa import Mask, effect, register_names
from cute_fa.sim.isa.half import narrow, widen
from cute_fa.sim.isa.load_store import MemoryAccess
from cute_fa.sim.memory import WORDS, poison
from cute_fa.sim.shared_memory import fault_of

if TYPE_CHECKING:
    from cute_fa.sim.shadow import SharedShadow
    from cute_fa.sim.wave import BlockContext

Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]

_BITWISE: dict[str, Combine] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}
_INTEGER: dict[str, Combine] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "inc": lambda old, most: np.where(old >= most, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - old.dtype.type(1)),
}
_FLOAT: dict[str, Combine] = {"add": np.add, "min": np.fmin, "max": np.fmax}
_OPERATORS = frozenset((*_BITWISE, *_INTEGER, "cas", "noftz"))


def _half_combine(operator: str, kind: str) -> Combine:
    """An operator on packed f16 or bf16: computed in float32, rounded once."""

    def combine(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        a, b = (widen(np.ascontiguousarray(x).view(np.uint16), kind) for x in (old, new))
        return np.ascontiguousarray(narrow(_FLOAT[operator](a, b), kind)).view(old.dtype)

    return combine


def flush_subnormals(x: np.ndarray) -> np.ndarray:
    """Replace float32 subnormals by zeros of their sign."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def _flushing_add(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return flush_subnormals(flush_subnormals(old) + flush_subnormals(new))


def combiner(operator: str, type_name: str, is_global: bool) -> tuple[Combine, np.dtype] | None:
    """What one turn does, and the numpy dtype it works on; None if PTX has no such form.

    ``add.f32`` on global memory flushes subnormals, on shared memory it does not (ISA 9.7.13.5).
    """
    kind, bits = type_name.rstrip("0123456789"), type_name.lstrip("busf").removesuffix("x2")
    if type_name in ("f16", "bf16", "f16x2", "bf16x2") and operator in _FLOAT:
        packed = np.dtype(np.uint32 if type_name.endswith("x2") else np.uint16)
        return _half_combine(operator, type_name.removesuffix("x2")), packed
    if kind == "f" and operator in _FLOAT and bits in ("32", "64"):
        flush = bits == "32" and operator == "add" and is_global
        return _flushing_add if flush else _FLOAT[operator], np.dtype(f"f{int(bits) // 8}")
    if kind in ("b", "u", "s") and operator in _BITWISE and bits in ("32", "64"):
        return _BITWISE[operator], np.dtype(f"u{int(bits) // 8}")
    if kind in ("u", "s") and operator in _INTEGER and bits in ("32", "64"):
        return _INTEGER[operator], np.dtype(f"{'i' if kind == 's' else 'u'}{int(bits) // 8}")
    return None


def take_turns(
    view: np.ndarray, index: np.ndarray, turn: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Read-modify-write in the order of ``index``, as few rounds as the busiest location needs.

    Args:
        view: the memory. index: element numbers, one-dimensional.
        turn: ``turn(old, which)`` gives the new values for positions ``which`` of ``index``.

    Returns:
        the value that each position found.
    """
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    first = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    lengths = np.diff(np.append(first, len(index)))
    rank = np.arange(len(index)) - np.repeat(first, lengths)
    found = np.empty(len(index), view.dtype)
    for number in range(int(rank.max()) + 1):
        which = order[rank == number]
        old = view[index[which]]
        found[which] = old
        view[index[which]] = turn(old, which)
    return found


@effect("atom", "red")
class Atomic(MemoryAccess):
    """``atom.op.type d, [a], b{, c}`` and ``red.op.type [a], b``; vectors element by element."""

    counter_class = "atomic"
    operators = _OPERATORS

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        if "async" in instr.parts or self.space not in ("shared", "global", "generic"):
            raise self.unsupported("address space, or asynchronous")
        names = [p for p in instr.parts if p in _OPERATORS and p != "noftz"]
        if len(names) != 1:
            raise self.unsupported("operator")
        self.operator = names[0]
        operands = list(instr.operands)
        self.returns = instr.op == "atom"
        if self.returns:
            self.dests = register_names(operands.pop(0))
        wanted = 3 if self.operator == "cas" else 2
        if "L2::cache_hint" in instr.parts:
            operands = operands[:wanted]
        if len(operands) != wanted:
            raise self.unsupported("operands")
        self.sources = tuple(operands)
        type_name = instr.parts[-1]
        if self.operator == "cas":
            if type_name not in ("b16", "b32", "b64"):
                raise self.unsupported(f"cas on .{type_name}")
            self.dtype = np.dtype(f"u{self.element}")
        else:
            found = combiner(self.operator, type_name, True)
            if found is None:
                raise self.unsupported(f".{self.operator} on .{type_name}")
            self.dtype = found[1]
        self.source_dtypes = (None, *[self.dtype] * (wanted - 1))
        self.dest_dtypes = [self.dtype] * len(self.dests)
        self.type_name = type_name

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> tuple[np.ndarray, ...] | None:
        addresses, *given = sources
        values = [self._elements(x) for x in given]
        found = poison((*addresses.shape, self.count), self.element).view(self.dtype)
        for space, lanes in self.spaces(addresses, mask):
            self._count_atomic(ctx, space, addresses, lanes)
            if space == "shared":
                self._shared(ctx, addresses, values, lanes, found)
            elif space == "global":
                self._global(ctx, addresses, values, lanes, found)
            else:
                raise self.unsupported(f"an address in {space} memory")
        if not self.returns:
            return None
        return tuple(np.ascontiguousarray(found[..., j]) for j in range(self.count))

    def _elements(self, value: Any) -> np.ndarray:
        """Operand values ``(w, c, 32, count)``."""
        items = value if isinstance(value, tuple) else (value,)
        if len(items) != self.count:
            raise self.unsupported(f"{len(items)} values for {self.count} elements")
        return np.stack(items, axis=-1)

    def _count_atomic(
        self, ctx: BlockContext, space: str, addresses: np.ndarray, mask: Mask
    ) -> None:
        lanes = addresses.size if mask is None else int(np.count_nonzero(mask))
        ctx.counters.add(f"{space}_bytes_written", lanes * self.nbytes)
        if self.returns:
            ctx.counters.add(f"{space}_bytes_read", lanes * self.nbytes)

    def _turns(
        self, view: np.ndarray, index: np.ndarray, values: list[np.ndarray], is_global: bool
    ) -> np.ndarray:
        """Carry out the operation at ``index``; values are one-dimensional, in the same order."""
        view = view.view(self.dtype)
        if self.operator == "cas":
            compare, swap = values
            return take_turns(
                view, index, lambda old, which: np.where(old == compare[which], swap[which], old)
            )
        known = combiner(self.operator, self.type_name, is_global)
        assert known is not None  # __init__ refused the others
        combine, operand = known[0], values[0]
        return take_turns(view, index, lambda old, which: combine(old, operand[which]))

    def _spread(self, index: np.ndarray) -> np.ndarray:
        """Element numbers of whole accesses → of their elements, in lane order."""
        return (index[:, None] * self.count + np.arange(self.count)).reshape(-1)

    def _shared(
        self,
        ctx: BlockContext,
        addresses: np.ndarray,
        values: list[np.ndarray],
        mask: Mask,
        found: np.ndarray,
    ) -> None:
        shared = ctx.subsystem("shared")
        index, good, _ = shared.locate(ctx, addresses, self.nbytes, mask)
        lanes = np.ones(addresses.shape, bool) if good is None else good
        if not lanes.any():
            return
        if shared.shadow.active:
            self._check_shared(ctx, shared.shadow, index, good, lanes)
        view = shared.flat.view(WORDS[self.element])
        old = self._turns(
            view, self._spread(index[lanes]), [v[lanes].reshape(-1) for v in values], False
        )
        found[lanes] = old.reshape(-1, self.count)

    def _check_shared(
        self,
        ctx: BlockContext,
        shadow: SharedShadow,
        index: np.ndarray,
        good: Mask,
        lanes: np.ndarray,
    ) -> None:
        """A read and a write, but where ``red.async`` is on its way, which atomics may overlap."""
        reduced = ctx.subsystem(AsyncShadow.name).reduced_into(index, self.nbytes)
        if reduced is not None and reduced.any():
            good = lanes & ~reduced
            if not good.any():
                return
        shadow.read(ctx, index, self.nbytes, good)
        shadow.write(ctx, index, self.nbytes, good)

    def _global(
        self,
        ctx: BlockContext,
        addresses: np.ndarray,
        values: list[np.ndarray],
        mask: Mask,
        found: np.ndarray,
    ) -> None:
        wide = addresses.astype(np.uint64, copy=False)
        memory, fault = ctx.wave.memory, fault_of(ctx)
        for view, index, lanes in memory.writable_words(wide, self.nbytes, mask, fault):
            elements = view.view(WORDS[self.element])
            chosen = [v[lanes].reshape(-1) for v in values]
            old = self._turns(elements, self._spread(index), chosen, True)
            found[lanes] = old.reshape(-1, self.count)
