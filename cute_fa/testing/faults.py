"""Faults in a kernel's synchronisation: every one that a mistake could make, one at a time.

:func:`faults` lists them from the PTX of a kernel. Each takes one instruction and leaves it out
(every fence, commit, wait, arrival, byte announcement, barrier, allocation of tensor memory), or
changes it: the other parity, half the bytes, another slot of the ring.
:mod:`cute_fa.testing.fault_survey` runs a kernel under each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cute_fa import ptx

KINDS: dict[str, str] = {
    "fence": "fences: memory, proxies, mbarrier initialisation, wgmma, tcgen05",
    "commit": "commits of asynchronous groups, and of tcgen05 work to mbarriers",
    "wait": "waits: mbarriers, asynchronous groups, tcgen05 loads and stores, clusters",
    "arrive": "arrivals at mbarriers, named barriers and clusters",
    "expect_tx": "announcements of bytes",
    "barrier": "barriers of a CTA, named ones too, and of a warp",
    "allocation": "allocations and releases of tensor memory",
    "parity": "a wait for the other parity",
    "bytes": "half the bytes announced",
    "stage": "one slot of a ring in the place of another",
}
"""What is left out or, from "parity" on, changed."""

_GUARD = re.compile(r"@\s*!?\s*[%$\w]+\s+")
_REGISTER = re.compile(r"(%[a-z]+)\d+\b")


@dataclass(frozen=True)
class Fault:
    """One change to a PTX text.

    Attributes:
        kind: a key of ``KINDS``.
        line: of the instruction, 1-based; index: its place in ``Kernel.body``.
        text: the instruction as written, on one line.
        start, stop: its characters in the PTX text, semicolon included.
        replacement: what stands there instead.
        barriers: where its mbarriers lie in shared memory, as far as a trace has shown.
    """

    kind: str
    line: int
    index: int
    text: str
    start: int
    stop: int
    replacement: str
    barriers: tuple[int, ...] = ()

    def apply(self, text: str) -> str:
        """The PTX with the fault."""
        return text[: self.start] + self.replacement + text[self.stop :]

    @property
    def form(self) -> str:
        """The instruction with its registers unnumbered: the same after small changes elsewhere."""
        return _REGISTER.sub(r"\1", self.text)

    def __str__(self) -> str:
        return f"{self.kind}: {self.text} (PTX line {self.line})"


@dataclass(frozen=True)
class _Statement:
    """An instruction and where it stands; ``guard`` as written, with the blank behind it."""

    instr: ptx.Instr
    start: int
    stop: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    places: Mapping[str, tuple[int, ...]]

    def fault(self, kind: str, replacement: str) -> Fault:
        instr, barriers = self.instr, self.places.get("barrier", ())
        place = self.start, self.stop
        return Fault(kind, instr.line, instr.index, instr.text, *place, replacement, barriers)

    def rewritten(
        self, *, opcode: str | None = None, operands: Mapping[int, str] | None = None
    ) -> str:
        """The statement with another opcode or other operands; one replaced by "" is dropped."""
        kept = [(operands or {}).get(i, text) for i, text in enumerate(self.operands)]
        listed = ", ".join(text for text in kept if text)
        return f"{self.guard}{opcode or self.opcode} {listed};"


def faults(
    text: str,
    kernel: str | None = None,
    *,
    addresses: Mapping[int, Mapping[str, tuple[int, ...]]] | None = None,
) -> list[Fault]:
    """Every fault of a kernel, in the order of its instructions.

    Args:
        text: a PTX module.
        kernel: its name; None if the module has one kernel.
        addresses: ``Trace.shared_addresses()`` of a run; slots of rings are exchanged only where
            it says which slots an instruction uses.
    """
    module = ptx.parse(text)
    (name,) = module.kernels if kernel is None else (kernel,)
    found: list[Fault] = []
    places = addresses or {}
    rings = _rings(places)
    for statement in _statements(text, module.kernels[name], places):
        for build in (_left_out, _parity, _bytes):
            found += build(statement)
        found += _stages(statement, rings)
    return found


# --- statements -----------------------------------------------------------------------------------


def _statements(
    text: str, kernel: ptx.Kernel, places: Mapping[int, Mapping[str, tuple[int, ...]]]
) -> Iterator[_Statement]:
    """The instructions that may have faults, with their places in the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    end = 0
    for instr in kernel.body:
        if _left_out_kind(instr) is None and instr.op not in ("cp", "mbarrier"):
            continue
        words = r"\s+".join(re.escape(word) for word in instr.text.rstrip(";").split())
        match = re.compile(words + r"\s*;").search(text, max(end, starts[instr.line - 1]))
        assert match is not None, f"PTX line {instr.line} does not hold {instr.text!r}"
        end = match.end()
        body = match.group().rstrip(";").rstrip()
        guard = _GUARD.match(body)
        prefix = guard.group() if guard else ""
        opcode, _, operands = body[len(prefix) :].partition(" ")
        if "\t" in opcode:
            opcode, _, operands = body[len(prefix) :].partition("\t")
        parts, where = tuple(_split(operands)), places.get(instr.index, {})
        yield _Statement(instr, match.start(), match.end(), prefix, opcode, parts, where)


def _split(operands: str) -> Iterator[str]:
    """Operands at the commas outside brackets and braces."""
    depth = start = 0
    for at, char in enumerate(operands):
        depth += char in "[{"
        depth -= char in "]}"
        if char == "," and depth == 0:
            yield operands[start:at].strip()
            start = at + 1
    if operands[start:].strip():
        yield operands[start:].strip()


# --- left out -------------------------------------------------------------------------------------

_WAITS = {"try_wait", "test_wait", "wait_group", "wait_all", "wait"}


def _names(instr: ptx.Instr) -> tuple[str, ...]:
    """The parts of an opcode without what stands behind ``::``, as in ``tcgen05.wait::st``."""
    return tuple(part.partition("::")[0] for part in instr.parts)


_LEFT_OUT: tuple[tuple[str, Callable[[ptx.Instr], bool]], ...] = (
    ("fence", lambda i: i.op in ("fence", "membar") or _names(i)[1] == "fence"),
    ("commit", lambda i: any(part in ("commit", "commit_group") for part in i.parts)),
    ("arrive", lambda i: any(part in ("arrive", "arrive_drop") for part in i.parts)),
    ("expect_tx", lambda i: i.parts[:2] == ("mbarrier", "expect_tx")),
    ("wait", lambda i: not _WAITS.isdisjoint(_names(i))),
    ("barrier", lambda i: i.op in ("bar", "barrier") and "sync" in i.parts),
    (
        "allocation",
        lambda i: (
            i.op == "tcgen05" and i.parts[1] in ("alloc", "dealloc", "relinquish_alloc_permit")
        ),
    ),
)


def _left_out_kind(instr: ptx.Instr) -> str | None:
    if len(instr.parts) < 2:
        return None
    return next((kind for kind, applies in _LEFT_OUT if applies(instr)), None)


def _left_out(statement: _Statement) -> Iterator[Fault]:
    instr = statement.instr
    kind = _left_out_kind(instr)
    if kind is None:
        return
    replacement = ""
    if kind == "wait" and instr.op == "mbarrier":
        # The answer of a wait that does not wait.
        replacement = f"{statement.guard}setp.eq.u32 {statement.operands[0]}, 0, 0;"
    yield statement.fault(kind, replacement)
    if kind == "arrive" and "expect_tx" in instr.parts:
        opcode = statement.opcode.replace(".expect_tx", "")
        without = statement.rewritten(opcode=opcode, operands={len(statement.operands) - 1: ""})
        yield statement.fault("expect_tx", without)


# --- changed --------------------------------------------------------------------------------------


def _parity(statement: _Statement) -> Iterator[Fault]:
    if statement.instr.op != "mbarrier" or "parity" not in statement.instr.parts:
        return
    yield _changed(statement, "parity", 2, "xor.b32 %changed, {}, 1;")


def _bytes(statement: _Statement) -> Iterator[Fault]:
    if statement.instr.op == "mbarrier" and "expect_tx" in statement.instr.parts:
        last = len(statement.operands) - 1
        yield _changed(statement, "bytes", last, "shr.u32 %changed, {}, 1;")


def _changed(statement: _Statement, kind: str, operand: int, change: str) -> Fault:
    """Operand number ``operand``, 32 bits wide, replaced by what ``change`` makes of it."""
    given = statement.operands[operand]
    text = statement.rewritten(operands={operand: "%changed"})
    return statement.fault(kind, f"{{ .reg .b32 %changed; {change.format(given)} {text} }}")


def _stages(
    statement: _Statement,
    rings: Mapping[str, list[frozenset[int]]],
) -> Iterator[Fault]:
    """The first slot that the instruction uses in place of another of its ring, and back."""
    if statement.instr.op not in ("mbarrier", "cp") or statement.instr.parts[1] == "init":
        return
    simple = [i for i, text in enumerate(statement.operands) if text[0] == "[" and "," not in text]
    for what, used in statement.places.items():
        ring = next((ring for ring in rings[what] if used[0] in ring), None)
        if ring is None or not simple:
            continue
        operand = simple[0] if what == "tile" else simple[-1]
        other = used[1] if len(used) > 1 else min(ring - {used[0]})
        yield statement.fault("stage", _exchanged(statement, operand, used[0], other))


def _rings(
    addresses: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> dict[str, list[frozenset[int]]]:
    """Slots that one instruction uses by turns are a ring; rings that share a slot are one."""
    rings: dict[str, list[frozenset[int]]] = {"barrier": [], "tile": []}
    for places in addresses.values():
        for what, used in places.items():
            if len(used) > 1:
                touching = [ring for ring in rings[what] if ring & set(used)]
                apart = [ring for ring in rings[what] if not ring & set(used)]
                rings[what] = [*apart, frozenset(used).union(*touching)]
    return rings


def _exchanged(statement: _Statement, operand: int, one: int, other: int) -> str:
    """The statement with two shared-memory addresses in each other's place."""
    inside = statement.operands[operand].strip("[] ")
    base, _, offset = inside.partition("+")
    load = "cvt.u32.u64" if base.strip().startswith("%rd") else "mov.u32"
    text = statement.rewritten(operands={operand: "[%place]"})
    return (
        f"{{ .reg .b32 %place; .reg .pred %is_one; .reg .pred %is_other; "
        f"{load} %place, {base}; add.u32 %place, %place, {offset or 0}; "
        f"setp.eq.u32 %is_one, %place, {one}; setp.eq.u32 %is_other, %place, {other}; "
        f"@%is_one mov.u32 %place, {other}; @%is_other mov.u32 %place, {one}; {text} }}"
    )
