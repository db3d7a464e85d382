"""Replay of a trace in modelled time: CTAs that share one SM, warp by warp, unit by unit.

Each warp executes the instructions that its trace says, block by block, within a block in the order
of :mod:`cute_fa.sim.timeline.scheduling`. An instruction is issued when its operands are there, its
scheduler has a free slot and its unit is free; asynchronous work goes to the tensor core's and the
copy engine's queues. Barriers are counted again in modelled time, so that who waits for whom
follows from the model and not from the order in which the simulator ran.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.sim.program import Program
from cute_fa.sim.timeline.costs import Cost, cost_of
from cute_fa.sim.timeline.fusion import fused, reads_of
from cute_fa.sim.timeline.intervals import Interval, activity_of, merged
from cute_fa.sim.timeline.machines import SCHEDULERS, MachineModel
from cute_fa.sim.timeline.scheduling import scheduled
from cute_fa.sim.timeline.units import ModelBarrier, ModelMbarrier, Sm
from cute_fa.sim.trace import Step, Trace
from cute_fa.sim.trace_events import Event

Cta = tuple[int, int, int]

SHORT_CYCLES = 48.0
"""Pauses and stretches of "other" below this length are not shown as intervals of their own."""


class ReplayError(CuteFAError, RuntimeError):
    """The trace cannot be replayed: warps wait for what never comes in modelled time."""


@dataclass(eq=False)
class WarpState:
    """A warp in modelled time.

    Attributes:
        cta: number among the replayed CTAs; slot: its place in the wave.
        warp: of the CTA.
        steps: the blocks that it executes, one after the other.
        step, position: the block it is in, and the instruction of that.
        ready: when each register's value is there.
        open_ends: when what it has issued since its last commit is complete, by kind: products,
            copies by threads, bulk copies.
        groups: when each of its committed groups is complete, by kind.
        tmem: when its accesses to tensor memory are complete.
        cluster_use: of the cluster's barrier, at which it has arrived.
        parked: since when it waits, and what for.
        busy: cycles by activity.
        finished: when it has exited.
    """

    cta: int
    warp: int
    slot: int
    steps: list[Step]
    step: int = 0
    position: int = 0
    ready: dict[str, float] = field(default_factory=dict)
    open_ends: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[float]] = field(default_factory=dict)
    tmem: float = 0.0
    cluster_use: int = 0
    parked: tuple[float, str] | None = None
    busy: dict[str, float] = field(default_factory=dict)
    finished: float = 0.0

    @property
    def lane(self) -> str:
        return f"warp {self.warp}" if self.cta == 0 else f"warp {self.warp} of CTA {self.cta}"


@dataclass(frozen=True)
class Timeline:
    """What the model says.

    Attributes:
        cycles: from the first instruction to the last warp's end.
        intervals: of warps and engines, in cycles.
        units: share of the time in which each unit of the SM was in use, 0 to 1.
        warps: cycles of each warp by activity, "wait" included.
    """

    model: MachineModel
    cycles: float
    intervals: tuple[Interval, ...]
    units: Mapping[str, float]
    warps: Mapping[int, Mapping[str, float]]

    def roles(self, roles: Mapping[str, range]) -> dict[str, dict[str, float]]:
        """Mean share of the time that a role's warps spend on each activity; the rest: done."""
        out: dict[str, dict[str, float]] = {}
        for name, members in roles.items():
            shares: dict[str, float] = {}
            for warp in members:
                for what, cycles in self.warps.get(warp, {}).items():
                    shares[what] = shares.get(what, 0.0) + cycles / len(members) / self.cycles
            out[name] = shares
        return out


def replay(trace: Trace, ctas: Sequence[Cta], model: MachineModel) -> Timeline:
    """Model CTAs of a launch that run on one SM at the same time.

    Args:
        ctas: blockIdx of each; the CTAs of a cluster must be given together, and each of them then
            has an SM of its own.

    Raises:
        InvalidArgumentError: no CTA, or CTAs of different waves of the simulation.
        ReplayError: warps wait for ever, because control flow depends on timing.
    """
    return _Replay(trace, ctas, model).run()


class _Replay:
    """The state of one replay; ``run`` brings it to its end."""

    def __init__(self, trace: Trace, ctas: Sequence[Cta], model: MachineModel) -> None:
        if not ctas:
            raise InvalidArgumentError("no CTA to replay", got=ctas, expected="blockIdx of some")
        places = [trace.find(cta) for cta in ctas]
        self.wave = places[0][0]
        if any(wave is not self.wave for wave, _ in places):
            raise InvalidArgumentError(
                "the CTAs did not run in one wave of the simulation",
                got=ctas,
                expected="CTAs of one wave",
                fix="trace a smaller launch, or replay fewer CTAs",
            )
        self.model = model
        self.program: Program = trace.program
        self.in_clusters = self.wave.cluster_size > 1
        self.sms = {slot: Sm(model) for _, slot in places}
        if not self.in_clusters:
            shared = Sm(model)
            self.sms = dict.fromkeys(self.sms, shared)
        self.warps = [
            WarpState(number, warp, slot, trace.warp_steps(cta, warp))
            for number, (cta, (_, slot)) in enumerate(zip(ctas, places, strict=True))
            for warp in range(self.wave.num_warps)
        ]
        self.costs: dict[int, list[Cost]] = {}
        self.reads = reads_of(self.program)
        self.activities: dict[int, str] = {}
        self.mbarriers: dict[tuple[int, int], ModelMbarrier] = {}
        self.barriers: dict[tuple[int, int], ModelBarrier] = {}
        self.cluster = ModelBarrier()
        self.heap: list[tuple[float, int, Callable[[float], None]]] = []
        self.serial = count()
        self.intervals: list[Interval] = []

    # --- time -------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self.heap, (time, next(self.serial), action))

    def run(self) -> Timeline:
        for warp in self.warps:
            self._resume(warp, 0.0)
        while self.heap:
            time, _, action = heapq.heappop(self.heap)
            action(time)
        stuck = [warp for warp in self.warps if warp.step < len(warp.steps)]
        if stuck:
            first = stuck[0]
            raise ReplayError(
                "the trace cannot be replayed: warps wait for ever",
                got=f"{len(stuck)} warps, {first.lane} {first.parked and first.parked[1]}",
                expected="control flow that does not depend on timing",
            )
        return self._timeline()

    def _timeline(self) -> Timeline:
        cycles = max(warp.finished for warp in self.warps)
        sms = list({id(sm): sm for sm in self.sms.values()}.values())
        shares: dict[str, float] = {}
        for sm in sms:
            for name, busy in sm.busy.items():
                each = 1 if name in ("shared memory", "copies", "tmem") else SCHEDULERS
                shares[name] = shares.get(name, 0.0) + busy / each / cycles / len(sms)
        warps: dict[int, dict[str, float]] = {}
        ctas = 1 + max(warp.cta for warp in self.warps)
        for warp in self.warps:
            row = warps.setdefault(warp.warp, {})
            for what, busy in warp.busy.items():
                row[what] = row.get(what, 0.0) + busy / ctas
        mine = [one for one in self.intervals if one.lane.startswith("warp")]
        engines = [one for one in self.intervals if not one.lane.startswith("warp")]
        intervals = (*merged(mine, SHORT_CYCLES), *merged(engines))
        return Timeline(self.model, cycles, intervals, shares, warps)

    def _resume(self, warp: WarpState, time: float) -> None:
        self.at(time, lambda now: self._advance(warp, now))

    def _note(
        self, warp: WarpState, what: str, start: float, stop: float, detail: str = ""
    ) -> None:
        if stop > start:
            warp.busy[what] = warp.busy.get(what, 0.0) + stop - start
            self.intervals.append(Interval(warp.lane, start, stop, what, detail))

    # --- one warp ---------------------------------------------------------------------------------

    def _block(self, block: int) -> list[Cost]:
        costs = self.costs.get(block)
        if costs is None:
            program = self.program
            written = [
                cost_of(instr, program.counter_class(instr), program.decoded(instr), self.model)
                for instr in program.body_of(block)
            ]
            costs = self.costs[block] = scheduled(fused(program, block, written, self.reads))
            self.activities[block] = activity_of(program, block)
        return costs

    def _advance(self, warp: WarpState, now: float) -> None:
        """Issue a warp's instructions from ``now`` on, until something else comes first."""
        sm = self.sms[warp.slot]
        scheduler = warp.warp % SCHEDULERS
        since = now
        fresh = True
        while warp.step < len(warp.steps):
            step = warp.steps[warp.step]
            costs = self._block(step.block)
            what = self.activities[step.block]
            while warp.position < len(costs):
                cost = costs[warp.position]
                start = self._start(warp, sm, scheduler, cost, now)
                its_turn = fresh and start == now
                if not its_turn and self.heap and self.heap[0][0] <= start:
                    self._note(warp, what, since, start)
                    self._resume(warp, start)
                    return
                fresh = False
                self._issue(warp, sm, scheduler, cost, start)
                warp.position += 1
                now = start + (1.0 if cost.issues else 0.0)
                if cost.special:
                    self._note(warp, what, since, now)
                    goes_on = self._carry_out(warp, sm, cost, step, now)
                    if goes_on is None:
                        return
                    now = since = goes_on
            self._note(warp, what, since, now)
            since = now
            warp.step += 1
            warp.position = 0
        warp.finished = now

    def _start(self, warp: WarpState, sm: Sm, scheduler: int, cost: Cost, now: float) -> float:
        """When an instruction can be issued."""
        if not cost.issues:
            return now
        start = max(now, sm.issue[scheduler])
        ready = warp.ready
        for register in cost.reads:
            known = ready.get(register)
            if known is not None and known > start:
                start = known
        if cost.unit and cost.unit != "tmem":
            owner = -1 if cost.unit == "shared" else scheduler
            start = max(start, sm.units.get((owner, cost.unit), 0.0))
        return start

    @staticmethod
    def _issue(warp: WarpState, sm: Sm, scheduler: int, cost: Cost, start: float) -> None:
        ready = warp.ready
        if cost.issues:
            sm.issue[scheduler] = start + 1.0
            sm.use("issue slots", 1.0)
            if cost.unit:
                owner = -1 if cost.unit in ("shared", "tmem") else scheduler
                # Tensor memory is asynchronous: accesses queue, and the warp goes on.
                begin = max(start, sm.units.get((owner, cost.unit), 0.0))
                sm.units[owner, cost.unit] = begin + cost.cycles
                name = {"shared": "shared memory", "mma": "tensor core"}.get(cost.unit, cost.unit)
                sm.use(name, cost.cycles)
                start = begin
            for register in cost.writes:
                ready[register] = start + cost.latency
        else:
            there = max((ready.get(register, 0.0) for register in cost.reads), default=0.0)
            for register in cost.writes:
                ready[register] = there

    # --- what synchronises or runs beside the warp ------------------------------------------------

    def _carry_out(
        self, warp: WarpState, sm: Sm, cost: Cost, step: Step, now: float
    ) -> float | None:
        """Do what a special instruction does; when the warp goes on, None if it is parked."""
        if cost.instr.op == "wgmma" or cost.unit == "tmem" or cost.instr.op == "tcgen05":
            now = self._tensor(warp, sm, cost, now)
        elif cost.instr.op == "cp":
            now = self._groups(warp, sm, cost, step, now)
        for event in step.events.get(cost.instr.index, ()):
            if not self._event(warp, sm, event, now):
                return None
        return now

    def _until(self, warp: WarpState, now: float, end: float, detail: str) -> float:
        """The warp waits until ``end``, if that is still to come."""
        self._note(warp, "wait", now, end, detail)
        return max(now, end)

    def _tensor(self, warp: WarpState, sm: Sm, cost: Cost, now: float) -> float:
        verb = cost.instr.parts[1]
        if verb == "mma_async":
            start, end = sm.warp_product(
                now, warp.warp % SCHEDULERS, cost.flops, cost.bits, cost.nbytes
            )
            if warp.warp % SCHEDULERS == 0:
                self.intervals.append(Interval("tensor core", start, end, "product", warp.lane))
            warp.open_ends["product"] = end
        elif verb == "commit_group":
            self._close(warp, "product")
        elif verb == "wait_group":
            newest = int(cost.instr.text.rstrip("; ").split()[-1])
            end = self._end_of(warp, "product", newest)
            return self._until(warp, now, end + self.model.tensor_latency, "products")
        elif verb in ("ld", "st"):
            warp.tmem = max(warp.tmem, sm.units[-1, "tmem"] + self.model.tmem_latency)
        elif verb == "wait":
            return self._until(warp, now, warp.tmem, "tensor memory")
        return now

    def _groups(self, warp: WarpState, sm: Sm, cost: Cost, step: Step, now: float) -> float:
        """Copies by threads, and the groups of them and of bulk copies."""
        parts = cost.instr.parts
        kind = "bulk" if "bulk" in parts else "threads"
        if "commit_group" in parts:
            self._close(warp, kind)
        elif "wait_group" in parts or "wait_all" in parts:
            newest = 0 if "wait_all" in parts else int(cost.instr.text.rstrip("; ").split()[-1])
            return self._until(warp, now, self._end_of(warp, kind, newest), "copies")
        elif kind == "threads" and "mbarrier" not in parts:
            _, end = sm.copy(now, cost.nbytes)
            warp.open_ends[kind] = max(warp.open_ends.get(kind, 0.0), end)
        return now

    @staticmethod
    def _close(warp: WarpState, kind: str) -> None:
        groups = warp.groups.setdefault(kind, [])
        groups.append(max(warp.open_ends.pop(kind, 0.0), groups[-1] if groups else 0.0))

    @staticmethod
    def _end_of(warp: WarpState, kind: str, newest: int) -> float:
        """When all but the ``newest`` closed groups are complete."""
        groups = warp.groups.get(kind, [])
        return groups[len(groups) - newest - 1] if len(groups) > newest else 0.0

    def _event(self, warp: WarpState, sm: Sm, event: Event, now: float) -> bool:
        """Carry out one event; False if the warp has to wait."""
        if event.kind == "init":
            assert event.barrier is not None
            self.mbarriers[event.barrier] = ModelMbarrier(event.count)
        elif event.kind in ("arrive", "expect"):
            self._signal(event.barrier, now, event.count, event.nbytes)
        elif event.kind == "wait":
            assert event.barrier is not None
            bar = self.mbarriers[event.barrier]
            if not bar.passed(event.parity):
                bar.waiting.append((warp, event.parity))
                return self._park(warp, now, f"mbarrier {event.barrier[1]:#x}")
        elif event.kind in ("sync", "named arrive", "cluster arrive", "cluster wait"):
            return self._meet(warp, event, now)
        elif event.kind == "load":
            start, end = sm.copy(now, event.nbytes)
            self.intervals.append(Interval("copies", start, end, "copy", f"{event.nbytes} bytes"))
            self.at(end, lambda time: self._signal(event.barrier, time, 0, -event.nbytes))
        elif event.kind == "store":
            start, end = sm.copy(now, event.nbytes)
            self.intervals.append(Interval("copies", start, end, "copy", f"{event.nbytes} bytes"))
            warp.open_ends["bulk"] = max(warp.open_ends.get("bulk", 0.0), end)
        elif event.kind == "product":
            work = event.flops, event.bits, event.nbytes, event.ctas
            start, end = sm.sm_product(now, *work)
            # A cluster's CTAs stand side by side, and those of pairs are even in number.
            if event.ctas == 2 and warp.slot ^ 1 in self.sms:
                self.sms[warp.slot ^ 1].sm_product(start, *work)
            self.intervals.append(Interval("tensor core", start, end, "product", warp.lane))
        elif event.kind == "commit":
            end = max(now, sm.tensor_sm) + self.model.tensor_latency
            self.at(end, lambda time: self._signal(event.barrier, time, 1, 0))
        return True

    def _signal(
        self, barrier: tuple[int, int] | None, time: float, arrivals: int, nbytes: int
    ) -> None:
        assert barrier is not None
        if barrier in self.mbarriers:  # else of a CTA of the cluster that is not replayed
            self.mbarriers[barrier].change(time, arrivals, nbytes, self._wake_mbarrier)

    def _meet(self, warp: WarpState, event: Event, now: float) -> bool:
        """A named barrier, or the cluster's."""
        if event.barrier is None:
            if event.kind == "cluster arrive":
                warp.cluster_use = self.cluster.uses
                self.cluster.arrive(now, 1, len(self.warps), self._wake_barrier)
                return True
            if self.cluster.uses > warp.cluster_use:
                return True
            self.cluster.waiting.append(warp)
            return self._park(warp, now, "the cluster")
        bar = self.barriers.setdefault(event.barrier, ModelBarrier())
        complete = bar.arrive(now, 32, event.count, self._wake_barrier)
        if event.kind == "named arrive" or complete:
            return True
        bar.waiting.append(warp)
        return self._park(warp, now, f"barrier {event.barrier[1]}")

    def _park(self, warp: WarpState, now: float, detail: str) -> bool:
        """The warp waits until it is woken: what ``_event`` returns then."""
        warp.parked = now, detail
        return False

    def _wake_mbarrier(self, warp: WarpState, time: float) -> None:
        self._wake(warp, time + self.model.mbarrier_latency)

    def _wake_barrier(self, warp: WarpState, time: float) -> None:
        self._wake(warp, time + self.model.barrier_latency)

    def _wake(self, warp: WarpState, time: float) -> None:
        assert warp.parked is not None
        start, detail = warp.parked
        warp.parked = None
        self._note(warp, "wait", start, time, detail)
        self._resume(warp, time)
