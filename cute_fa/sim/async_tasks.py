"""When asynchronous work completes: the policy behind ``SimOptions.completion``.

``eager``: as soon as it is issued. ``late``: only when nothing else in the wave can run, oldest
first. ``random``: at a moment that the wave's generator chooses between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cute_fa.ptx import Instr
from cute_fa.sim.isa import Subsystem, subsystem

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

_CHANCE = 0.25  # of each step to complete something


@dataclass(eq=False)
class Task:
    """Something that an engine will have done.

    Attributes:
        instr: the instruction that issued it; hazards found at completion are reported there.
        complete: does it.
        what: for the deadlock report.
    """

    instr: Instr
    complete: Callable[[BlockContext], None]
    what: str


@subsystem
class AsyncTasks(Subsystem):
    """The pending tasks of one wave, oldest first."""

    name = "async-tasks"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        self.tasks: list[Task] = []

    @property
    def eager(self) -> bool:
        return self.wave.options.completion == "eager"

    def submit(self, ctx: BlockContext, task: Task) -> None:
        """Start a task; it may complete at once."""
        if self.eager:
            task.complete(ctx)
        else:
            self.tasks.append(task)

    def on_idle(self, ctx: BlockContext) -> bool:
        if not self.tasks:
            return False
        late = self.wave.options.completion == "late"
        self._complete(ctx, 0 if late else int(self.wave.rng.integers(len(self.tasks))))
        return True

    def on_step(self, ctx: BlockContext) -> None:
        while self.tasks and self.wave.rng.random() < _CHANCE:
            self._complete(ctx, int(self.wave.rng.integers(len(self.tasks))))

    def _complete(self, ctx: BlockContext, index: int) -> None:
        task = self.tasks.pop(index)
        ctx.instr = task.instr
        task.complete(ctx)

    def describe(self) -> list[str]:
        return [f"pending: {task.what} (PTX line {task.instr.line})" for task in self.tasks]
