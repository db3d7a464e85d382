"""Basic blocks of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from cute_fa.ptx.module import Instr, Kernel
from cute_fa.ptx.opcodes import ENDS_THREAD, JUMPS, falls_through
from cute_fa.ptx.operands import Symbol


@dataclass(frozen=True)
class Block:
    """Instructions ``body[start:stop]``, entered at the first and left after the last.

    ``successors`` are block indices: the next block first where control may fall through, then
    the branch's targets.
    """

    index: int
    start: int
    stop: int
    successors: tuple[int, ...]


class Blocks(Sequence[Block]):
    """The blocks of one kernel, in order of its body; block 0 is the entry."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Block, ...]: ...
    def __getitem__(self, index: int | slice) -> Block | tuple[Block, ...]:
        return self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Of each block, the blocks that may follow it."""
        return tuple(block.successors for block in self._blocks)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Of each block, the blocks that it may follow."""
        into: list[list[int]] = [[] for _ in self._blocks]
        for block in self._blocks:
            for successor in block.successors:
                into[successor].append(block.index)
        return tuple(tuple(found) for found in into)

    def starting_at(self, instr_index: int) -> Block:
        """The block that starts with instruction ``instr_index``; KeyError if none does."""
        return self._blocks[self._by_start[instr_index]]

    @cached_property
    def _by_start(self) -> dict[int, int]:
        return {block.start: block.index for block in self._blocks}


def branch_targets(kernel: Kernel, instr: Instr) -> tuple[int, ...]:
    """Indices into ``kernel.body`` that ``instr`` may jump to; empty if it is no branch."""
    if instr.op == "bra":
        return tuple(kernel.labels[o.name] for o in instr.operands if isinstance(o, Symbol))
    if instr.op == "brx":
        tables = (o.name for o in instr.operands if isinstance(o, Symbol))
        labels = (label for table in tables for label in kernel.branch_targets[table])
        return tuple(kernel.labels[label] for label in labels)
    return ()


def basic_blocks(kernel: Kernel, splits_after: Callable[[Instr], bool] | None = None) -> Blocks:
    """Cut ``kernel``'s body at branch targets, after branches and after chosen instructions.

    Args:
        splits_after: whether a block must end after this instruction, branches aside: the
            simulator ends blocks where threads may have to wait.
    """
    body = kernel.body
    starts = {0}
    targets: dict[int, tuple[int, ...]] = {}
    for instr in body:
        is_jump = instr.op in JUMPS
        if is_jump:
            targets[instr.index] = branch_targets(kernel, instr)
            starts.update(targets[instr.index])
        if is_jump or instr.op in ENDS_THREAD or (splits_after and splits_after(instr)):
            starts.add(instr.index + 1)
    starts.discard(len(body))
    ordered = sorted(starts)
    index_of = {start: index for index, start in enumerate(ordered)}
    blocks = []
    for index, start in enumerate(ordered):
        stop = ordered[index + 1] if index + 1 < len(ordered) else len(body)
        last = body[stop - 1]
        successors = [index + 1] if falls_through(last) and stop < len(body) else []
        for target in targets.get(last.index, ()):
            if index_of[target] not in successors:
                successors.append(index_of[target])
        blocks.append(Block(index, start, stop, tuple(successors)))
    return Blocks(blocks)
