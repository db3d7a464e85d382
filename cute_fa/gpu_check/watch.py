"""A run in a process of its own, watched by this one.

A kernel that waits for a barrier that never comes holds its process for ever, and one that touches
memory that is not its own leaves it a GPU that refuses everything. So this process launches
nothing: it reads what the other one tells, ends it if something takes too long, blames what was
begun last, and starts another that goes on behind it. The report is whole whatever happens.
"""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from cute_fa.errors import CuteFAError
from cute_fa.gpu_check.events import (
    Begins,
    ChoiceMade,
    Finished,
    History,
    Lost,
    MatmulTimed,
    OutcomeFound,
    SectionDone,
    ShapeTimed,
)
from cute_fa.gpu_check.outcome import Outcome
from cute_fa.gpu_check.place import Place
from cute_fa.gpu_check.report import Report
from cute_fa.gpu_check.sections import SHARES, TUNING, DeviceLostError, Run, Settings
from cute_fa.ops.bundle import load_bundle

START_PATIENCE = 120.0
"""Seconds for torch, the bundle and the driver to load, and for TVM-FFI."""

IDLE_PATIENCE = 60.0
"""Seconds between two events where nothing is being waited for."""

DEATH_PATIENCE = 10.0
"""Seconds for a process that was killed to be gone; the driver may hold one for ever."""

GRACE = 15.0
"""Seconds that a run may go over its time, to finish what it has begun."""

RECOVERY = 3.0
"""Seconds of rest before a process follows one that did not get to begin anything."""

MAX_LOSSES = 12
"""Processes that may be lost before the run is given up."""

FAMILY_LOSSES = 2
"""Processes that one family of kernels may lose before all of it is given up: the others, and the
benchmark, shall have time left."""


@dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes:
        folder: the bundle.
        seconds: for all sections but tuning.
        since: from when the time counts, by ``time.monotonic``, which Linux has one of for all
            processes.
    """

    folder: Path
    place: Place
    settings: Settings
    history: History
    seconds: float
    tuning_seconds: float
    since: float = field(default_factory=time.monotonic)

    @property
    def is_tuning(self) -> bool:
        """Whether nothing but tuning is left."""
        is_checked = self.history.sections >= {name for name, _ in SHARES}
        return is_checked and self.settings.tuning

    def time_left(self) -> tuple[float, float]:
        """Seconds for all sections but tuning, and for tuning, which begins behind them."""
        spent = time.monotonic() - self.since
        if self.is_tuning:
            return self.seconds, self.tuning_seconds - spent
        return self.seconds - spent, self.tuning_seconds


def work(connection: Connection, job: Job) -> None:
    """A job, in the process of its own; tells the events through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the watching process ends this one
    try:
        bundle = load_bundle(job.folder)
        # With an older torch (2.6) loading it compiles an extension of torch, for a minute. What is
        # begun later has less time than that: a kernel would be taken for one that hangs.
        importlib.import_module("tvm_ffi")
        run = Run(bundle, job.place, job.settings, job.history, connection.send)
        run.all(*job.time_left())
    except Exception as error:
        is_known = isinstance(error, (DeviceLostError, CuteFAError))
        connection.send(Lost(str(error) if is_known else traceback.format_exc()))
    else:
        connection.send(Finished())


class Watch:
    """Runs a job to its end, in one process after the other as far as it takes more than one.

    Args:
        report: takes what is told.
        changed: called when the report has more in it.
        say: told in a line what comes now.
        target: what a process does; ``work``, but in tests.
        method: how it begins. Not as a copy of this one: what CUDA has set up does not work there.
    """

    def __init__(
        self,
        job: Job,
        report: Report,
        *,
        changed: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
        target: Callable[[Connection, Job], None] = work,
        method: Literal["spawn", "fork"] = "spawn",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._job = job
        self._report = report
        self._changed = changed
        self._say = say
        self._target = target
        self._sleep = sleep
        self._context: Any = multiprocessing.get_context(method)
        self._begun: Begins | None = None
        self._has_begun = False
        self._lost_by: Counter[str] = Counter()
        self._said = ""
        self._end = time.monotonic() + job.seconds
        # Begins anew when the sections before are done, if there are any.
        self._tuning_end = time.monotonic() + job.tuning_seconds

    def run(self) -> None:
        """All of it; ``report.is_complete`` tells whether the end was reached."""
        for _ in range(MAX_LOSSES):
            why = self._one_process()
            if why is None:
                self._report.is_complete = True
            elif not self._blame(why):
                why = None
            self._changed()
            if why is None:
                return
        reason = f"{MAX_LOSSES} processes were lost, no more is tried"
        self._report.take(OutcomeFound(Outcome("run", "as a whole", False, reason)))
        self._changed()

    def _one_process(self) -> str | None:
        """What ended a process before its work was done, or None."""
        now = time.monotonic()
        job = replace(self._job, seconds=max(0.0, self._end - now), since=now)
        if job.is_tuning:
            job = replace(job, tuning_seconds=max(0.0, self._tuning_end - now))
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=self._target, args=(theirs, job), daemon=True)
        process.start()
        theirs.close()
        self._begun = None
        try:
            return self._listen(ours, process)
        finally:
            process.kill()
            process.join(DEATH_PATIENCE)
            ours.close()

    def _listen(self, connection: Connection, process: Any) -> str | None:
        """Take events until there are no more, or none comes for too long."""
        patience = START_PATIENCE
        while True:
            patience = min(patience, self._time_left())
            if not connection.poll(max(0.0, patience)):
                return f"it did not come back within {patience:.0f} s"
            try:
                event = connection.recv()
            except EOFError:
                process.join(DEATH_PATIENCE)
                return f"the process ended with exit code {process.exitcode}"
            if isinstance(event, Finished):
                return None
            if isinstance(event, Lost):
                return event.why
            patience = IDLE_PATIENCE
            if isinstance(event, Begins):
                self._begun, patience = event, event.patience
                self._has_begun = True
                self._announce(event)
            else:
                self._begun = None
                self._remember(event)
                self._report.take(event)
                self._changed()

    def _time_left(self) -> float:
        end = self._tuning_end if self._job.is_tuning else self._end
        return end + GRACE - time.monotonic()

    def _announce(self, event: Begins) -> None:
        line = f"{TUNING}: {event.name}" if event.section == TUNING else event.section
        if line != self._said:
            self._said = line
            self._say(f"{line} …")

    def _remember(self, event: object) -> None:
        """What a process that follows this one need not do again."""
        history = self._job.history
        done: tuple[str, str] | None = None
        if isinstance(event, OutcomeFound):
            done = event.outcome.section, event.outcome.name
        elif isinstance(event, MatmulTimed):
            done = "benchmark", event.name
        elif isinstance(event, ShapeTimed):
            done = "benchmark", event.shape
        elif isinstance(event, ChoiceMade):
            done = TUNING, event.choice.label
        elif isinstance(event, SectionDone):
            history = replace(history, sections=history.sections | {event.section})
            if event.section == SHARES[-1][0]:
                self._tuning_end = time.monotonic() + self._job.tuning_seconds
        if done is not None:
            history = replace(history, done=history.done | {done})
        self._job = replace(self._job, history=history)

    def _blame(self, why: str) -> bool:
        """Keep what went wrong from happening again; False if nothing is left to be tried."""
        begun, history = self._begun, self._job.history
        if begun is None:
            self._report.take(OutcomeFound(Outcome("run", "as a whole", False, why)))
            # Where one process has begun something another may: a GPU whose process was ended
            # takes its time to be free again. Where none has, none will.
            if not self._has_begun or self._time_left() <= RECOVERY:
                return False
            self._sleep(RECOVERY)
            return True
        if self._time_left() <= 0:
            reason = "time was up before it came back"
            self._report.take(OutcomeFound(Outcome(begun.section, begun.name, None, reason)))
            return False
        history = self._without_family(begun, history)
        if begun.call is not None:  # the benchmark's row of it will tell
            refused = {**history.refused, begun.call: why}
            self._job = replace(self._job, history=replace(history, refused=refused))
            return True
        done = history.done
        if begun.kernel is None:
            done = done | {(begun.section, begun.name)}
        else:
            broken = {**history.broken, begun.kernel: why}
            history = replace(history, broken=broken)
            why += "; nothing more is asked of this kernel"
        self._job = replace(self._job, history=replace(history, done=done))
        self._report.take(OutcomeFound(Outcome(begun.section, begun.name, False, why)))
        return True

    def _without_family(self, begun: Begins, history: History) -> History:
        """Give up a family of kernels that has lost too many processes."""
        family = begun.family
        if family is None:
            return history
        self._lost_by[family] += 1
        if self._lost_by[family] != FAMILY_LOSSES:
            return history
        reason = f"{FAMILY_LOSSES} processes were lost to them; nothing more is asked of the others"
        self._report.take(OutcomeFound(Outcome("run", f"{family} kernels", False, reason)))
        return replace(history, given_up=history.given_up | {family})
