"""The state of one wave: co-resident CTAs, their registers and shared memory, their waiting lanes.

A wave is what runs at one time: ``num_ctas`` CTAs (whole clusters) of ``num_warps`` warps each.
:class:`BlockContext` is the face that instruction handlers see of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError, InvalidTypeError
from cute_fa.sim import isa, shared_layout
from cute_fa.sim.counters import Counters
from cute_fa.sim.hazards import RULES, cta_in, selected_rules
from cute_fa.sim.isa import Mask, Ticket, WaitReason
from cute_fa.sim.lanes import WARP_LANES, LaneSet, LaneSpace, Rect

if TYPE_CHECKING:
    from cute_fa.sim.hazards import Hazard
    from cute_fa.sim.memory import GlobalMemory
    from cute_fa.sim.pending_grid import PendingGrid
    from cute_fa.sim.program import Program
    from cute_fa.sim.trace import WaveTrace


@dataclass(frozen=True)
class LaunchConfig:
    """What the host asked for: kernel name, extents, dynamic shared memory, parameter bytes.

    ``attributes`` holds launch attributes by their CUDA id (6: programmatic serialisation, 2:
    cooperative); the cluster extent has its own field.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    smem_bytes: int = 0
    params: bytes = b""
    attributes: dict[int, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Threads per CTA."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def cluster_ctas(self) -> int:
        """CTAs per cluster."""
        return self.cluster[0] * self.cluster[1] * self.cluster[2]


COMPLETIONS = ("eager", "late", "random")


@dataclass(frozen=True)
class SimOptions:
    """How to simulate.

    Attributes:
        arch: the architecture that special registers and limits speak for, as "sm_80".
        completion: when asynchronous work completes: "eager" at issue, "late" as late as legal,
            "random" seeded, with warps unbundled and time-sliced.
        seed: of every random choice.
        strict: raise ``HazardError`` at the first error-severity hazard.
        checks: True for every hazard rule, False for none, or the names of the rules.
        workers: processes that the launch may use.
        max_resident_ctas: upper limit of the CTAs that run at one time.
        max_block_steps: block executions in one wave before it is given up as endless.
        trace: keep a record of what every warp did (``Launch.trace``); needs one worker.
    """

    arch: str = "sm_80"
    completion: str = "eager"
    seed: int = 0
    strict: bool = True
    checks: bool | frozenset[str] = True
    workers: int = 1
    max_resident_ctas: int | None = None
    max_block_steps: int = 50_000_000
    trace: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidTypeError or InvalidArgumentError for a field that means nothing."""
        if self.completion not in COMPLETIONS:
            raise InvalidArgumentError(
                "unknown completion policy",
                got=repr(self.completion),
                expected=" | ".join(COMPLETIONS),
            )
        for name, least in (("seed", 0), ("workers", 1), ("max_block_steps", 1)):
            _check_count(name, getattr(self, name), least)
        if self.max_resident_ctas is not None:
            _check_count("max_resident_ctas", self.max_resident_ctas, 1)
        for name in ("strict", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(
                    f"{name} is not a bool", got=repr(getattr(self, name)), expected="True or False"
                )
        selected_rules(self.checks)

    def checks_rule(self, rule: str) -> bool:
        """Whether hazards of this rule are looked for."""
        if isinstance(self.checks, bool):
            return self.checks and not RULES[rule].strict
        return rule in self.checks


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(
            f"{name} is not an integer",
            got=f"{value!r} ({type(value).__name__})",
            expected=f"an integer of at least {least}",
        )
    if int(value) < least:
        raise InvalidArgumentError(
            f"{name} is too small", got=value, expected=f"an integer of at least {least}"
        )


class Wave:
    """CTAs that run together, and everything that belongs to them.

    Attributes:
        module, kernel, config, options, memory, params: as given to ``execute``.
        num_warps: warps per CTA, W.
        num_ctas: CTAs in the wave, R; whole clusters, CTAs of one cluster in neighbouring slots.
        cta_ids: int ``(R, 3)``: blockIdx of each slot.
        cta_rank: uint32 ``(R,)``: rank of each slot's CTA in its cluster. A shared address with
            rank ``r`` seen by slot ``s`` means slot ``s - cta_rank[s] + r``.
        cluster_size: CTAs per cluster.
        smem: uint8 ``(R, bytes)``, indexed by the address bits 0-23 directly; bytes below
            ``addresses.SHARED_BASE`` and from ``smem_end`` on belong to nobody.
        smem_end: first offset past static and dynamic shared memory.
        shared_symbols: offset of every shared variable by name (the dynamic one included).
        regs: register files ``[n, W, R, 32]`` by class: "p" bool, "h" uint16, "r" uint32, "d"
            uint64.
        alive: bool ``(W, R, 32)``: threads that exist and have not exited.
        shared_state: the subsystems' state for this wave, by name.
        counters, hazards: filled as the wave runs.
        rng: the wave's own seeded generator, for random completion.
        program: the prepared kernel; :meth:`register` looks registers up in it.
        steps: block executions so far.
        pending: the grid's clusters that have not been started; None where nobody asks for them.
        trace: the record being kept, or None.
    """

    def __init__(
        self,
        *,
        module: ptx.Module,
        kernel: ptx.Kernel,
        config: LaunchConfig,
        options: SimOptions,
        memory: GlobalMemory,
        cta_ids: np.ndarray,
        program: Program,
        index: int = 0,
    ) -> None:
        self.module = module
        self.kernel = kernel
        self.config: LaunchConfig = config
        self.options = options
        self.memory = memory
        self.params = config.params
        self.index = index
        self.cta_ids = cta_ids
        self.num_ctas: int = len(cta_ids)
        self.num_warps: int = -(-config.threads // WARP_LANES)
        self.cluster_size: int = config.cluster_ctas
        self.cta_rank: np.ndarray = np.arange(self.num_ctas, dtype=np.uint32) % np.uint32(
            self.cluster_size
        )
        self.smem_end: int
        self.shared_symbols, self.smem_end = shared_layout.place(module, kernel, config.smem_bytes)
        self.smem = np.zeros((self.num_ctas, shared_layout.padded(self.smem_end)), np.uint8)
        self.space = LaneSpace(self.num_warps, self.num_ctas)
        thread = np.arange(self.num_warps * WARP_LANES).reshape(-1, 1, WARP_LANES)
        self.alive = np.repeat(thread < config.threads, self.num_ctas, axis=1)
        self.counters = Counters()
        self.hazards: list[Hazard] = []
        self.rng = np.random.default_rng((options.seed, index))
        self.shared_state: dict[str, Any] = {}
        self.regs: dict[str, np.ndarray] = {}
        self.program = program
        self.steps = 0
        self.pending: PendingGrid | None = None
        self.trace: WaveTrace | None = None

    def register(self, name: str) -> np.ndarray:
        """The register file's row for a register: ``(W, R, 32)``, unsigned or bool."""
        place = self.program.location(name)
        return self.regs[place.file][place.row]


class BlockContext:
    """What an instruction handler sees: the lanes that execute it, and the means to hold them.

    One context serves a wave; the scheduler points it at the block and lanes being run.

    Attributes:
        wave: the wave.
        rect: ``(w0, w1, c0, c1)`` of the lanes being run.
        lanes: the lane set being run (guards of the instruction not applied).
        instr: the instruction being run.
        counters: ``wave.counters``; trace: ``wave.trace``.
        timed_out: lanes (mask over ``rect``) whose wait timed out and that execute the instruction
            again, or None.
    """

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.counters = wave.counters
        self.trace = wave.trace
        self.lanes: LaneSet
        self.rect: Rect
        self.instr: ptx.Instr
        self.timed_out: np.ndarray | None = None
        self.tickets: dict[Ticket, None] = {}
        self.block_index = 0
        self.yielded: LaneSet | None = None
        self.freed: list[tuple[int, LaneSet]] = []
        self.parked: list[Ticket] = []  # by the block being run

    def park(
        self,
        lanes: np.ndarray | LaneSet | None,
        reason: WaitReason,
        *,
        may_time_out: bool = False,
        retry: bool = False,
    ) -> Ticket:
        """Hold lanes until :meth:`release`; for blocking instructions and ``own_block`` effects.

        Released lanes go on behind the instruction; with ``retry`` (needs ``own_block``) they
        execute it again. Lanes that ``may_time_out`` are let go when nothing else in the wave can
        run; with ``retry`` the handler then finds them in ``ctx.timed_out``.

        Args:
            lanes: a lane set, or a mask over ``rect``, or None for every lane being run.
        """
        held = lanes if isinstance(lanes, LaneSet) else self.lanes.within(lanes)
        if held is None:
            raise ValueError("park() was given no lane")
        resume = self.block_index if retry else self.block_index + 1
        ticket = Ticket(held, reason, self.instr, resume, may_time_out, retry)
        self.tickets[ticket] = None
        self.parked.append(ticket)
        return ticket

    def not_parked(self, lanes: LaneSet) -> LaneSet | None:
        """What is left of ``lanes`` without those that the running block parked."""
        left: LaneSet | None = lanes
        for ticket in self.parked:
            if left is not None:
                left = left.minus(ticket.lanes)
        return left

    def store_results(self, handler: isa.Decoded, lanes: LaneSet, results: Iterable[Any]) -> None:
        """Write the destinations of a blocking instruction for the lanes that go on."""
        w0, w1, c0, c1 = self.rect
        where = lanes.full_mask()[w0:w1, c0:c1]
        for name, result in zip(handler.dests, results, strict=True):
            if name is not None:
                view = self.wave.register(name)[w0:w1, c0:c1]
                np.copyto(view, np.asarray(result).view(view.dtype), where=where)

    def release(self, *tickets: Ticket) -> None:
        """Make the lanes of tickets ready again. Lanes that are being run may be among them."""
        for ticket in tickets:
            if ticket.released:
                continue
            ticket.released = True
            del self.tickets[ticket]
            self.freed.append((ticket.resume_block, ticket.lanes))

    def yield_(self, mask: Mask) -> None:
        """Put lanes of the running block behind all other ready ones (after a failed poll)."""
        lanes = self.lanes.within(mask)
        if lanes is not None:
            self.yielded = lanes if self.yielded is None else self.yielded.union(lanes)

    def cta_of(self, slot: int) -> tuple[int, int, int]:
        """blockIdx of the CTA in a slot of the wave."""
        return cta_in(self.wave, slot)

    def subsystem(self, name: str) -> Any:
        """The state of a subsystem for this wave."""
        return self.wave.shared_state[name]


def attach_subsystems(wave: Wave, classes: Iterable[type[isa.Subsystem]]) -> None:
    """Make one instance of every subsystem for the wave and start it."""
    for cls in classes:
        wave.shared_state[cls.name] = cls()
    for unit in wave.shared_state.values():
        unit.on_wave_start(wave)
