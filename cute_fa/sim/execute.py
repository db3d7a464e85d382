"""Running a launch: CTAs into waves, waves one after another or over forked processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim import hazards, isa
from cute_fa.sim.blas import one_blas_thread
from cute_fa.sim.counters import Counters
from cute_fa.sim.fork import run_forked
from cute_fa.sim.hazards import Hazard, HazardError
from cute_fa.sim.lanes import WARP_LANES
from cute_fa.sim.machine import Machine
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.pending_grid import PendingGrid, cancels
from cute_fa.sim.program import CompiledBlock, Program, prepare
from cute_fa.sim.schedule import Scheduler
from cute_fa.sim.trace import Trace, WaveTrace
from cute_fa.sim.wave import LaunchConfig, SimOptions, Wave, attach_subsystems

WAVE_LANES = 2048
"""Lanes that run together where there are enough CTAs: below, numpy is call overhead."""

WAVE_BYTES = 256 << 20
"""Most bytes of registers and shared memory that one wave may take."""

MAX_THREADS_PER_CTA = 1024

FORK_SECONDS = 0.25
"""Remaining work, guessed from the first wave, above which forking processes pays."""


@dataclass
class Launch:
    """What a kernel launch did.

    Attributes:
        kernel, grid, block, cluster, smem_bytes: as launched; smem_bytes is the dynamic part.
        counters: totals over all CTAs.
        hazards: findings in the order of the waves, equal ones merged; empty when clean.
        seconds: wall time of the simulation.
        ctas: CTAs of the grid; waves: groups in which they ran; processes: at most at one time.
        activity: executions of each block by each warp of a CTA, and by its lanes, over all CTAs:
            two int64 arrays ``(blocks, W)``.
        trace: what every warp did, if the options asked for it.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem_bytes: int
    counters: Counters = field(default_factory=Counters)
    hazards: list[Hazard] = field(default_factory=list)
    seconds: float = 0.0
    ctas: int = 0
    waves: int = 0
    processes: int = 1
    activity: tuple[np.ndarray, np.ndarray] | None = None
    trace: Trace | None = None
    _blocks: Sequence[CompiledBlock] = ()

    @property
    def warps(self) -> list[Counters]:
        """What each warp of a CTA executed, summed over the CTAs: instructions, exponentials, MMA.

        Bytes are counted for the launch as a whole only.
        """
        if self.activity is None:
            return []
        warps_run, lanes_run = self.activity
        return [
            _static_counters(self._blocks, warps_run[:, warp], lanes_run[:, warp])
            for warp in range(warps_run.shape[1])
        ]

    def by_role(self, roles: Mapping[str, range]) -> dict[str, Counters]:
        """The counters of :attr:`warps`, added up for each role.

        Args:
            roles: warps of a CTA by name, as the kernels' configs have them (``config.roles``).

        Raises:
            InvalidArgumentError: a role names a warp that the CTAs do not have.
        """
        warps = self.warps
        out = {}
        for name, members in roles.items():
            if members and not 0 <= min(members) <= max(members) < len(warps):
                raise InvalidArgumentError(
                    f"role {name} names warps that the CTAs do not have",
                    got=members,
                    expected=f"warps of range(0, {len(warps)})",
                )
            out[name] = Counters()
            for warp in members:
                out[name].merge(warps[warp])
        return out


@dataclass
class WaveResult:
    """What one wave contributed; small enough to send between processes."""

    index: int
    counters: Counters
    hazards: list[Hazard]
    activity: tuple[np.ndarray, np.ndarray]
    trace: WaveTrace | None = None
    error: HazardError | None = None


def execute(
    module: ptx.Module, config: LaunchConfig, memory: GlobalMemory, options: SimOptions
) -> Launch:
    """Run one kernel launch to its end.

    Args:
        module: the PTX that holds ``config.kernel``.
        memory: the device's global memory; the kernel's stores land in it.

    Raises:
        UnsupportedInstruction: before anything runs, listing what the kernel needs and lacks.
        InvalidArgumentError: for a launch that the device would refuse.
        HazardError: at the first error-severity hazard if ``options.strict``; its ``launch``
            attribute holds what was counted and found until then.
    """
    started = time.perf_counter()
    program = prepare(module, config.kernel)
    _check_launch(program.kernel, config)
    waves = plan_waves(program, config, options)
    launch = Launch(config.kernel, config.grid, config.block, config.cluster, config.smem_bytes)
    launch.ctas = sum(len(ids) for ids in waves)
    variables = {
        name: memory.register(data, name=f"variable {name}").base
        for name, data in program.variables.items()
    }
    runner = _Runner(program, module, config, memory, options, variables)
    # Overflow, division by zero and NaN are ordinary results in PTX.
    with np.errstate(all="ignore"), one_blas_thread():
        results = _run_waves(runner, waves, launch)
    launch.waves = len(results)
    program.save()
    _collect(launch, program, results)
    launch.seconds = time.perf_counter() - started
    for result in results:
        if result.error is not None:
            result.error.launch = launch
            raise result.error
    return launch


def _check_launch(kernel: ptx.Kernel, config: LaunchConfig) -> None:
    def refuse(what: str, got: object, expected: object) -> None:
        raise InvalidArgumentError(f"kernel {kernel.name}: {what}", got=got, expected=expected)

    if min(*config.grid, *config.block, *config.cluster) < 1:
        refuse("empty launch", f"grid {config.grid}, block {config.block}", "extents of 1 and up")
    if config.threads > MAX_THREADS_PER_CTA:
        refuse("too many threads per CTA", config.threads, f"at most {MAX_THREADS_PER_CTA}")
    if kernel.reqntid is not None and kernel.reqntid != config.block:
        refuse("the block is not the one compiled for", config.block, kernel.reqntid)
    if any(g % c for g, c in zip(config.grid, config.cluster, strict=True)):
        refuse("the grid is not whole clusters", config.grid, f"multiples of {config.cluster}")
    if len(config.params) < kernel.param_bytes:
        refuse("too few parameter bytes", len(config.params), kernel.param_bytes)


# --- waves ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def is_ordered(kernel: ptx.Kernel) -> bool:
    """Whether CTAs may depend on one another through global memory.

    Such kernels run in grid order and in one process.
    """
    for instr in kernel.body:
        if instr.op in ("atom", "red", "multimem") and "shared" not in instr.opcode:
            return True
        waits = "acquire" in instr.parts or "volatile" in instr.parts
        if instr.op == "ld" and waits and "shared" not in instr.opcode:
            return True
        if instr.opcode.startswith(("cp.reduce", "clusterlaunchcontrol")):
            return True
    return False


def plan_waves(program: Program, config: LaunchConfig, options: SimOptions) -> list[np.ndarray]:
    """blockIdx of each CTA of each wave, int ``(R, 3)``; clusters stay together, in rank order.

    CTAs that share blockIdx.x are neighbours: they are the likely ones to take equally long.
    """
    cluster = config.cluster
    counts = [g // c for g, c in zip(config.grid, cluster, strict=True)]
    if is_ordered(program.kernel):
        z, y, x = np.indices((counts[2], counts[1], counts[0])).reshape(3, -1)
    else:
        x, z, y = np.indices((counts[0], counts[2], counts[1])).reshape(3, -1)
    corners = np.stack([x, y, z], axis=1) * np.array(cluster)
    rz, ry, rx = np.indices((cluster[2], cluster[1], cluster[0])).reshape(3, -1)
    ids = (corners[:, None, :] + np.stack([rx, ry, rz], axis=1)[None]).reshape(-1, 3)
    size = _wave_ctas(program, config, options)
    if cancels(program.kernel):  # leave some clusters to be cancelled
        clusters = len(ids) // config.cluster_ctas
        size = min(size, -(-clusters // 2) * config.cluster_ctas)
    pieces = -(-len(ids) // size)
    clusters_per_wave = -(-(len(ids) // config.cluster_ctas) // pieces)
    step = clusters_per_wave * config.cluster_ctas
    return [ids[start : start + step] for start in range(0, len(ids), step)]


def _wave_ctas(program: Program, config: LaunchConfig, options: SimOptions) -> int:
    """CTAs per wave: whole clusters, about ``WAVE_LANES`` lanes, within ``WAVE_BYTES``."""
    lanes = -(-config.threads // WARP_LANES) * WARP_LANES
    widths = {"p": 1, "h": 2, "r": 4, "d": 8}
    register_bytes = sum(program.rows[file] * size for file, size in widths.items())
    bytes_per_cta = lanes * register_bytes + 3 * config.smem_bytes + 4096
    ctas = min(WAVE_LANES // lanes, WAVE_BYTES // bytes_per_cta)
    if options.completion == "random":
        ctas = config.cluster_ctas
    if options.max_resident_ctas is not None:
        ctas = min(ctas, options.max_resident_ctas)
    return max(ctas // config.cluster_ctas, 1) * config.cluster_ctas


# --- running --------------------------------------------------------------------------------------


class _Runner:
    """Runs waves of one launch; keeps a machine for each wave size."""

    def __init__(
        self,
        program: Program,
        module: ptx.Module,
        config: LaunchConfig,
        memory: GlobalMemory,
        options: SimOptions,
        variables: dict[str, int],
    ) -> None:
        self.program = program
        self.module = module
        self.config = config
        self.memory = memory
        self.options = options
        self.variables = variables
        self.machines: dict[int, Machine] = {}
        self.subsystems = isa.subsystems()
        self.pending: PendingGrid | None = None

    def run(self, index: int, cta_ids: np.ndarray) -> WaveResult:
        """Run one wave; a strict hazard ends it and is returned, not raised."""
        wave = Wave(
            module=self.module,
            kernel=self.program.kernel,
            config=self.config,
            options=self.options,
            memory=self.memory,
            cta_ids=cta_ids,
            program=self.program,
            index=index,
        )
        wave.pending = self.pending
        machine = self.machines.get(wave.num_ctas)
        if machine is None:
            machine = Machine(self.program, wave.num_warps, wave.num_ctas, self.config.params)
            self.machines[wave.num_ctas] = machine
        machine.load(wave, self.variables)
        if self.options.trace:
            wave.trace = WaveTrace(cta_ids, wave.num_warps, wave.cluster_size)
        attach_subsystems(wave, self.subsystems)
        scheduler = Scheduler(wave, machine)
        error = None
        try:
            scheduler.run()
            for unit in wave.shared_state.values():
                unit.on_wave_end(wave)
        except HazardError as found:
            error = found.with_traceback(None)
        return WaveResult(
            index, wave.counters, wave.hazards, scheduler.activity(), wave.trace, error
        )


def _run_waves(runner: _Runner, waves: Sequence[np.ndarray], launch: Launch) -> list[WaveResult]:
    results: list[WaveResult] = []
    options = runner.options
    alone = options.workers <= 1 or options.trace or is_ordered(runner.program.kernel)
    if cancels(runner.program.kernel):
        runner.pending = PendingGrid(waves, runner.config.cluster_ctas)
    for index, ids in enumerate(waves):
        started = time.perf_counter()
        if runner.pending is not None:
            ids = runner.pending.start(ids)
            if not len(ids):
                continue
        results.append(runner.run(index, ids))
        if results[-1].error is not None:
            break
        left = len(waves) - index - 1
        if not alone and left > 1 and left * (time.perf_counter() - started) > FORK_SECONDS:
            rest = [(number, waves[number]) for number in range(index + 1, len(waves))]
            launch.processes = min(runner.options.workers, len(rest))
            results += run_forked(runner.run, rest, runner.memory, launch.processes)
            break
    results.sort(key=lambda result: result.index)
    return results


def _collect(launch: Launch, program: Program, results: Sequence[WaveResult]) -> None:
    """Counters and hazards of the waves into the launch's."""
    warps_run, lanes_run = (
        np.sum([result.activity[part] for result in results], axis=0) for part in (0, 1)
    )
    trace = Trace(program)
    for result in results:
        launch.counters.merge(result.counters)
        for hazard in result.hazards:
            hazards.add(launch.hazards, hazard)
        if result.trace is not None:
            trace.waves.append(result.trace)
    launch.trace = trace if trace.waves else None
    launch.activity = warps_run, lanes_run
    launch._blocks = program.blocks
    whole = _static_counters(program.blocks, warps_run.sum(axis=1), lanes_run.sum(axis=1))
    launch.counters.merge(whole)


def _static_counters(
    blocks: Sequence[CompiledBlock], warps_run: np.ndarray, lanes_run: np.ndarray
) -> Counters:
    """What blocks add to the counters that were executed so often, ``(blocks,)`` each."""
    counters = Counters()
    for block in blocks:
        for counts, times in ((block.warp_counts, warps_run), (block.lane_counts, lanes_run)):
            executed = int(times[block.index])
            if executed:
                for name, count in counts.items():
                    counters.add(name, count * executed)
    return counters
