"""What can be said about wgmma registers from the program text alone.

Two rules of PTX ISA 9.7.15 are about registers, which are too many to watch while they run:
accumulators and A fragments that a thread has written need a ``wgmma.fence`` before the product,
and must not be touched from the product until a ``wait_group`` covers it. Both follow from a pass
over the control flow. What it finds is reported when the product concerned is executed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cute_fa import ptx

Finding = tuple[str, str, int | None]  # rule, text, index of the other instruction

_MOST_GROUPS = 8


class State(NamedTuple):
    """What holds at a place in the program, over all paths to it.

    Attributes:
        dirty: registers written since the last fence; None: there has been no fence.
        open: accumulators of products since the last commit; groups: of closed groups, oldest
            first.
        open_a, groups_a: the same for registers that hold A.
    """

    dirty: frozenset[str] | None
    open: tuple[tuple[str, int], ...] = ()
    groups: tuple[tuple[tuple[str, int], ...], ...] = ()
    open_a: tuple[tuple[str, int], ...] = ()
    groups_a: tuple[tuple[tuple[str, int], ...], ...] = ()


def _join(a: State, b: State) -> State:
    if a == b:
        return a
    dirty = None if a.dirty is None or b.dirty is None else a.dirty | b.dirty
    return State(
        dirty,
        _union(a.open, b.open),
        _align(a.groups, b.groups),
        _union(a.open_a, b.open_a),
        _align(a.groups_a, b.groups_a),
    )


def _union(
    a: tuple[tuple[str, int], ...], b: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({**dict(a), **dict(b)}.items()))


def _align(
    a: tuple[tuple[tuple[str, int], ...], ...], b: tuple[tuple[tuple[str, int], ...], ...]
) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Join two sequences of groups from the newest back: ``wait_group`` counts from there."""
    size = max(len(a), len(b))
    left, right = ((),) * (size - len(a)) + a, ((),) * (size - len(b)) + b
    return tuple(_union(x, y) for x, y in zip(left, right, strict=True))[-_MOST_GROUPS:]


class _Pass:
    def __init__(self, kernel: ptx.Kernel) -> None:
        self.kernel = kernel
        self.found: dict[int, dict[tuple[str, int | None], str]] = {}
        self.accumulators: dict[int, frozenset[str]] = {}
        self.fragments: dict[int, frozenset[str]] = {}
        for instr in kernel.body:
            if instr.opcode.startswith("wgmma.mma_async"):
                accumulator = frozenset(ptx.defs(instr))
                self.accumulators[instr.index] = accumulator
                a = instr.operands[1]
                names: list[str] = []
                if isinstance(a, ptx.Vector):
                    names = [item.name for item in a.items if isinstance(item, ptx.Reg)]
                self.fragments[instr.index] = frozenset(names)
        self.watched = frozenset().union(*self.accumulators.values(), *self.fragments.values())

    def run(self) -> dict[int, tuple[Finding, ...]]:
        if not self.watched:
            return {}
        blocks = ptx.basic_blocks(self.kernel, lambda instr: False)
        states: dict[int, State] = {0: State(None)}
        pending = [0]
        while pending:
            index = pending.pop()
            block = blocks[index]
            state = states[index]
            for instr in self.kernel.body[block.start : block.stop]:
                state = self._step(state, instr)
            for successor in block.successors:
                known = states.get(successor)
                joined = state if known is None else _join(known, state)
                if joined != known:
                    states[successor] = joined
                    pending.append(successor)
        return {
            index: tuple((rule, text, other) for (rule, other), text in rows.items())
            for index, rows in self.found.items()
        }

    def _step(self, state: State, instr: ptx.Instr) -> State:
        if instr.op == "wgmma":
            return self._product(state, instr)
        defs = self.watched.intersection(ptx.defs(instr))
        touched = defs | self.watched.intersection(ptx.uses(instr))
        if not touched:
            return state
        for group in (state.open, *state.groups):
            for name, product in group:
                if name in touched:
                    text = f"accumulator register {name} is accessed before the product's wait"
                    self._note(product, "wgmma-unwaited", text, instr.index)
        for group in (state.open_a, *state.groups_a):
            for name, product in group:
                if name in defs:
                    text = f"register {name} of A is written before the product's wait"
                    self._note(product, "wgmma-unwaited", text, instr.index)
        if defs and state.dirty is not None:
            return state._replace(dirty=state.dirty | defs)
        return state

    def _product(self, state: State, instr: ptx.Instr) -> State:
        kind = instr.parts[1]
        if kind == "fence":
            return state._replace(dirty=frozenset())
        if kind == "commit_group":
            groups = (*state.groups, state.open)[-_MOST_GROUPS:]
            groups_a = (*state.groups_a, state.open_a)[-_MOST_GROUPS:]
            return state._replace(open=(), groups=groups, open_a=(), groups_a=groups_a)
        if kind == "wait_group":
            count = instr.operands[0].value if isinstance(instr.operands[0], ptx.Imm) else 0
            left = state.groups[-count:] if count else ()
            left_a = state.groups_a[-count:] if count else ()
            return state._replace(groups=left, groups_a=left_a)
        accumulator, a = self.accumulators[instr.index], self.fragments[instr.index]
        if state.dirty is None or state.dirty & (accumulator | a):
            text = "no wgmma.fence between writes to the product's registers and the product"
            self._note(instr.index, "wgmma-fence", text, None)
        for group in (state.open, *state.groups):
            for name, product in group:
                if name in a:
                    text = f"accumulator register {name} is read as A before the product's wait"
                    self._note(product, "wgmma-unwaited", text, instr.index)
        index = instr.index
        return state._replace(
            open=_union(state.open, tuple((name, index) for name in accumulator)),
            open_a=_union(state.open_a, tuple((name, index) for name in a)),
        )

    def _note(self, product: int, rule: str, text: str, other: int | None) -> None:
        self.found.setdefault(product, {}).setdefault((rule, other), text)


@lru_cache(maxsize=64)
def findings(kernel: ptx.Kernel) -> dict[int, tuple[Finding, ...]]:
    """What is wrong with the registers of each product, by the product's index in the body."""
    return _Pass(kernel).run()
