"""The instruction registry: which Python object carries out which PTX form.

Two kinds of instruction exist.

* A **pure** instruction only computes: its result depends on its register and immediate operands.
  Its handler is an *emitter*: it is given an :class:`Emitter` and writes the instruction's meaning
  as an expression over numpy arrays into the function that is generated for the basic block.
* An **effect** instruction touches memory, other lanes or the scheduler. Its handler is a class
  derived from :class:`Decoded`: it is constructed once per instruction of the kernel, when the
  kernel is prepared, and its ``run`` is called each time lanes execute the instruction.
  A **blocking** instruction is an effect that may hold lanes back; it ends its basic block.

Both are found by the longest registered prefix of the opcode, so ``"ld"`` serves every load and
``"ld.param"`` overrides it for one state space.

Arrays have shape ``(w, c, 32)`` over the rectangle being executed: warp of the CTA x CTA slot of
the wave x lane.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from cute_fa import ptx
from cute_fa.errors import UnsupportedError

if TYPE_CHECKING:
    from cute_fa.sim.lanes import LaneSet
    from cute_fa.sim.wave import BlockContext, Wave

Mask = np.ndarray | None  # bool (w, c, 32); None: every lane of the rectangle


class UnsupportedInstruction(UnsupportedError):
    """A PTX instruction (or a modifier of one) that the simulator cannot carry out.

    Args:
        instr: the instruction; its line number and text are quoted.
        why: which part of it is not supported.
    """

    def __init__(
        self, instr: ptx.Instr, why: str = "no handler for this form", more: Sequence[str] = ()
    ) -> None:
        self.instr = instr
        self.why = why
        self.lines = (f"line {instr.line}: {instr.text}  ({why})", *more)
        kinds = "a PTX instruction" if not more else f"{len(self.lines)} PTX instructions"
        super().__init__(
            f"the simulator does not support {kinds}",
            got="\n            ".join(self.lines),
            fix="report the instruction; if it is not needed, compile the program without it",
        )

    @classmethod
    def of_many(cls, errors: Sequence[UnsupportedInstruction]) -> UnsupportedInstruction:
        """One error that lists every form of several, each form once."""
        forms: dict[tuple[str, str], UnsupportedInstruction] = {}
        for error in errors:
            forms.setdefault((error.instr.opcode, error.why), error)
        first, *others = forms.values()
        return cls(first.instr, first.why, [line for error in others for line in error.lines])


class Decoded:
    """Base of the handlers of effect and blocking instructions.

    ``__init__`` parses the modifiers once and raises :class:`UnsupportedInstruction` for what it
    does not implement. It may set on the instance:

    ``dests``
        names of the destination registers in the order of what ``run`` returns; ``None`` for the
        sink ``_``. A ``.b128`` destination takes one ``(low, high)`` tuple of uint64 arrays.
    ``dest_dtypes``
        numpy dtype of each returned array (default: unsigned of the register's width). The item
        size must equal the register's width, except for predicates (bool).
    ``sources``
        operands whose values ``run`` receives, in this order. A ``Reg``, ``Imm``, ``Special`` or
        ``Symbol`` arrives as an array; an ``Address`` as the array of addresses (uint32 or uint64,
        by the base register's width); a ``Vector`` or ``Pair`` as a tuple of arrays; a ``Sink`` as
        ``None``; a ``TensorAddress`` as ``(addresses, (coordinate, ...))``; a ``Negated`` predicate
        as its complement; a ``.b128`` register as a ``(low, high)`` tuple.
    ``source_dtypes``
        numpy dtype (or None) for each source, viewed bit for bit; for vectors it holds for every
        item. Default: unsigned of the register's width; immediates uint32, or uint64 if they need
        it.
    ``static_counts``
        what one warp adds to the counters each time it executes the instruction, known in advance,
        for example ``{"mma_flops.bf16": 4096}``. Costs nothing at run time.

    Source arrays always have the full shape ``(w, c, 32)``; they may be read-only broadcasts or
    views of live registers: copy what must outlast ``run``, and never write into them.
    """

    counter_class: ClassVar[str] = "other"
    """Key of the per-class warp-instruction count: ld_shared, st_global, barrier, mma, …"""

    ends_block: ClassVar[bool] = False
    """The instruction is the last of its block: polls, and whatever may call ``ctx.yield_``."""

    own_block: ClassVar[bool] = False
    """It is also the first of its block: needed to park lanes with ``retry=True``."""

    collective: ClassVar[bool] = False
    """``.sync``/``.aligned``: lanes of one warp execute it together. Lanes are held back until the
    members of their mask have come; what runs without them is reported."""

    member_source: ClassVar[int | None] = None
    """Which of ``sources`` is a collective's member mask; None: the whole warp. One in a register
    needs ``own_block``."""

    progress: ClassVar[bool] = True
    """False for what only looks (loads, polls): a spin loop of such instructions is a livelock."""

    dests: tuple[str | None, ...] = ()
    dest_dtypes: Sequence[Any] | None = None
    sources: tuple[ptx.Operand, ...] = ()
    source_dtypes: Sequence[Any] | None = None
    static_counts: dict[str, int]

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        self.instr = instr
        self.kernel = kernel
        self.static_counts = {}

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> Any:
        """Carry out the instruction for the lanes of ``mask`` in ``ctx.rect``.

        Never called when no lane is active; guards are folded into ``mask``. An effect returns a
        tuple with one array per destination, shaped ``(w, c, 32)`` or broadcastable (inactive lanes
        hold anything; the engine stores under the mask), or None if it has no destinations.

        A ``@blocking`` handler instead returns the lanes that may go on now: a ``LaneSet``, or None
        for all that arrived. It must have parked the others with ``ctx.park``.
        """
        raise NotImplementedError(type(self).__name__)

    def unsupported(self, why: str) -> UnsupportedInstruction:
        """The error to raise for a modifier or operand that is not implemented."""
        return UnsupportedInstruction(self.instr, why)

    def refuse_unknown(
        self, parts: Iterable[str], known: Collection[str], prefixes: tuple[str, ...] = ()
    ) -> None:
        """That no modifier is ignored: each is ``known``, or begins with one of ``prefixes``."""
        for part in parts:
            if part not in known and not part.startswith(prefixes):
                raise self.unsupported(f"modifier .{part}")

    def literal(self, operand: ptx.Operand, what: str) -> int:
        """The value of an operand that PTX wants to be an integer constant."""
        if not isinstance(operand, ptx.Imm):
            raise self.unsupported(f"{what} that is not a literal")
        return operand.value


class Emitter(Protocol):
    """What a pure instruction's emitter may ask of the code generator (``sim/codegen.py``)."""

    instr: ptx.Instr
    kernel: ptx.Kernel
    parts: tuple[str, ...]
    operands: tuple[ptx.Operand, ...]

    def src(self, index: int, dtype: str) -> str:
        """Expression of operand ``index``, viewed as ``dtype`` ("u4", "i4", "f4", "b1", …)."""

    def value(self, operand: ptx.Operand, dtype: str) -> str:
        """The same for an operand given directly (an item of a vector)."""

    def dst(self, expr: str, dtype: str, *, operand: ptx.Operand | None = None) -> None:
        """Assign ``expr`` (an array of ``dtype``) to a destination, by default operand 0."""

    def call(self, name: str, *args: str) -> str:
        """Expression that calls a semantics function of the registered library."""

    def unsupported(self, why: str) -> UnsupportedInstruction:
        """The error to raise for a form that is not implemented."""


EmitFunction = Callable[[Any], None]
DecodedType = TypeVar("DecodedType", bound=type[Decoded])


@dataclass(frozen=True)
class Handler:
    """One row of the registry: what serves the opcodes with this prefix."""

    prefix: str
    kind: str  # "pure", "effect" or "blocking"
    target: Any  # EmitFunction, or a class derived from Decoded
    counter_class: str = "alu"
    types: frozenset[str] | None = None  # the opcode's last part must be one of these
    modifiers: frozenset[str] | None = None  # what else may stand in it; None: anything


_HANDLERS: dict[str, list[Handler]] = {}
_SUBSYSTEMS: dict[str, type[Subsystem]] = {}
_LIBRARY: dict[str, Any] = {}


def _register(handler: Handler) -> None:
    rows = _HANDLERS.setdefault(handler.prefix, [])
    for row in rows:
        shared = row.types is None or handler.types is None or row.types & handler.types
        if shared and row.target is not handler.target:
            raise ValueError(f"two handlers for the PTX prefix {handler.prefix!r}")
    rows.append(handler)


def pure(
    *prefixes: str,
    types: Iterable[str] | None = None,
    modifiers: str | None = None,
    counter_class: str = "alu",
) -> Callable[[EmitFunction], EmitFunction]:
    """Register an emitter for the opcodes that begin with one of ``prefixes``.

    Args:
        types: if given, only opcodes whose last part is one of these ("s32", "f16x2", …).
        modifiers: if given, the words that may stand between prefix and type; an opcode with
            another one is refused. The emitter must heed them all.
    """
    of_types = None if types is None else frozenset(types)
    known = None if modifiers is None else frozenset(modifiers.split())

    def decorate(function: EmitFunction) -> EmitFunction:
        for prefix in prefixes:
            _register(Handler(prefix, "pure", function, counter_class, of_types, known))
        return function

    return decorate


def effect(*prefixes: str) -> Callable[[DecodedType], DecodedType]:
    """Register a :class:`Decoded` class for the opcodes that begin with one of ``prefixes``."""

    def decorate(cls: DecodedType) -> DecodedType:
        for prefix in prefixes:
            _register(Handler(prefix, "effect", cls, cls.counter_class))
        return cls

    return decorate


def blocking(*prefixes: str) -> Callable[[DecodedType], DecodedType]:
    """Register a :class:`Decoded` class whose ``run`` decides which lanes go on."""

    def decorate(cls: DecodedType) -> DecodedType:
        cls.ends_block = True
        for prefix in prefixes:
            _register(Handler(prefix, "blocking", cls, cls.counter_class))
        return cls

    return decorate


def library(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a semantics function callable from generated code under its own name."""
    name = function.__name__
    if _LIBRARY.get(name, function) is not function:
        raise ValueError(f"two semantics functions are called {name!r}")
    _LIBRARY[name] = function
    return function


def semantics() -> dict[str, Any]:
    """Every semantics function by name: the globals of generated code."""
    load_all()
    return dict(_LIBRARY)


def find_handler(opcode: str) -> Handler | None:
    """The handler with the longest prefix of ``opcode`` (cut at ``.`` or ``::``), or None."""
    load_all()
    end = len(opcode)
    last = opcode[opcode.rfind(".") + 1 :]
    while end > 0:
        for handler in _HANDLERS.get(opcode[:end], ()):
            if handler.types is None or last in handler.types:
                return handler
        end = max(opcode.rfind(".", 0, end), opcode.rfind("::", 0, end))
    return None


@dataclass
class WaitReason:
    """Why lanes are parked; the deadlock report prints it.

    ``expected`` and ``arrived`` are in the barrier's own unit (threads, arrivals, bytes); a
    callable ``arrived`` is asked at the time of the report.
    """

    text: str
    expected: int | None = None
    arrived: int | Callable[[], int] | None = None
    barrier: str | None = None

    def render(self) -> str:
        arrived = self.arrived() if callable(self.arrived) else self.arrived
        where = f" {self.barrier}" if self.barrier else ""
        count = f" ({arrived} of {self.expected} arrived)" if self.expected is not None else ""
        return f"{self.text}{where}{count}"


@dataclass(eq=False)
class Ticket:
    """Lanes held by a blocking instruction until somebody releases them."""

    lanes: LaneSet
    reason: WaitReason
    instr: ptx.Instr
    resume_block: int
    may_time_out: bool = False
    retry: bool = False
    released: bool = field(default=False)


class Subsystem:
    """State of one unit of the machine (barriers, shadow memory, TMA, …) for one wave.

    One instance is made per wave and kept as ``wave.shared_state[name]``.
    """

    name: ClassVar[str]

    def on_wave_start(self, wave: Wave) -> None:
        """Called once the wave's CTAs, shared memory and registers are set up."""

    def on_exit(self, ctx: BlockContext, lanes: LaneSet) -> None:
        """Called when ``lanes`` execute ``exit`` or ``ret``."""

    def on_idle(self, ctx: BlockContext) -> bool:
        """Called when no lane is ready: complete something asynchronous; True if it did."""
        return False

    def on_step(self, ctx: BlockContext) -> None:
        """Called before each step if completion is "random"; ``wave.rng`` decides."""

    def on_wave_end(self, wave: Wave) -> None:
        """Called after the last lane of the wave has exited."""

    def describe(self) -> list[str]:
        """Lines for the deadlock report: the state of barriers and queues."""
        return []


SubsystemType = TypeVar("SubsystemType", bound=type[Subsystem])


def subsystem(cls: SubsystemType) -> SubsystemType:
    """Register a :class:`Subsystem`; every wave gets an instance under ``cls.name``."""
    known = _SUBSYSTEMS.get(cls.name)
    if known is not None and known is not cls:
        raise ValueError(f"two subsystems are called {cls.name!r}")
    _SUBSYSTEMS[cls.name] = cls
    return cls


def subsystems() -> tuple[type[Subsystem], ...]:
    """The registered subsystems in the order of registration."""
    load_all()
    return tuple(_SUBSYSTEMS.values())


def register_names(operand: ptx.Operand) -> tuple[str | None, ...]:
    """Registers that a destination operand names, sinks as None, vectors and pairs flattened."""
    if isinstance(operand, ptx.Reg):
        return (operand.name,)
    if isinstance(operand, ptx.Sink):
        return (None,)
    if isinstance(operand, ptx.Vector):
        return tuple(name for item in operand.items for name in register_names(item))
    if isinstance(operand, ptx.Pair):
        return register_names(operand.first) + register_names(operand.second)
    raise TypeError(f"{operand!r} cannot be a destination")


_loaded = False


def load_all() -> None:
    """Import every chapter of this package, so that its handlers are registered."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
