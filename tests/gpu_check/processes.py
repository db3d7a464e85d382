"""What a watched process does in tests: it tells what the script of its attempt says. And what any
process can be sent."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection

from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Action
from cute_fa.gpu_check.events import (
    Begins,
    ChoiceMade,
    DeviceFound,
    Finished,
    Lost,
    OutcomeFound,
    SectionDone,
    ShapeTimed,
)
from cute_fa.gpu_check.outcome import Outcome
from cute_fa.gpu_check.tune import Choice
from cute_fa.gpu_check.watch import Job
from cute_fa.problem import AttentionProblem

SHAPE = Shape("papers", AttentionProblem(1, 32, 32, 2, 2, 64, 64, "bfloat16", causal=True))
CALL = ("cute_fa-fa2", SHAPE.problem.variant)


class Clock:
    """A timer that runs the call and says that it took 1 ms."""

    def sample(self, action: Action, *, flush: bool) -> float:
        action()
        return 1e-3


def begin(name: str, kernel: str, patience: float = 60.0) -> Begins:
    return Begins("correctness", name, patience, kernel=kernel)


def found(name: str, ok: bool = True) -> OutcomeFound:
    return OutcomeFound(Outcome("correctness", name, ok))


def hangs(connection: Connection, job: Job) -> None:
    """Its second kernel never comes back; whoever knows that goes on to the third."""
    connection.send(DeviceFound({"name": "a GPU"}))
    done = {name for _, name in job.history.done}
    if "first" not in done:
        connection.send(begin("first", "k1"))
        connection.send(found("first"))
    if "k2" not in job.history.broken:
        connection.send(begin("second", "k2", patience=0.3))
        time.sleep(600)
    connection.send(begin("third", "k3"))
    connection.send(found("third"))
    connection.send(SectionDone("correctness", 4, 1.5))
    connection.send(Finished())


def dies(connection: Connection, job: Job) -> None:
    """One kernel ends the process, one loses the GPU, one call of the benchmark does too, and so
    does what nobody in particular is to blame for."""
    if "k1" not in job.history.broken:
        connection.send(begin("first", "k1"))
        os._exit(9)
    if "k2" not in job.history.broken:
        connection.send(begin("second", "k2"))
        connection.send(Lost("CUDA error: an illegal memory access was encountered"))
        return
    if not job.history.refused:
        connection.send(Begins("benchmark", "a call", 60.0, call=CALL))
        connection.send(Lost("CUDA error: unspecified launch failure"))
        return
    if ("benchmark", SHAPE.name) not in job.history.done:
        connection.send(Begins("benchmark", SHAPE.name, 60.0))
        os._exit(1)
    connection.send(ShapeTimed("another", [], {"sm_mhz": 1980}))
    connection.send(found("third"))
    connection.send(Finished())


def never_starts(connection: Connection, job: Job) -> None:
    os._exit(1)


attempts = multiprocessing.get_context("fork").Value("i", 0)


def starts_again_later(connection: Connection, job: Job) -> None:
    """A kernel ends the first process; the second finds the GPU not free yet."""
    with attempts:
        attempts.value += 1
    if attempts.value == 1:
        connection.send(begin("first", "k1"))
        os._exit(9)
    if attempts.value == 2:
        connection.send(Lost("CUDA error: out of memory"))
        return
    connection.send(found("second"))
    connection.send(Finished())


def always_hangs(connection: Connection, job: Job) -> None:
    """There is always another kernel that loses the GPU."""
    connection.send(begin("one more", f"k{len(job.history.broken)}"))
    connection.send(Lost("CUDA error: misaligned address"))


def loses_a_family(connection: Connection, job: Job) -> None:
    """Each of its kernels ends the process; another one is well."""
    number = len(job.history.broken)
    if "fa3 fp16 dense" not in job.history.given_up:
        family = "fa3 fp16 dense"
        connection.send(Begins("correctness", f"no. {number}", 60.0, f"k{number}", None, family))
        os._exit(9)
    connection.send(found("another"))
    connection.send(Finished())


def runs_out_of_time(connection: Connection, job: Job) -> None:
    connection.send(begin("first", "k1"))
    time.sleep(600)


def tunes(connection: Connection, job: Job) -> None:
    """Sections are done; a candidate hangs, and the next process has time for tuning only."""
    if "benchmark" not in job.history.sections:
        for name in ("agreement", "correctness", "repeats", "benchmark"):
            connection.send(SectionDone(name, 0, 0.0))
        connection.send(found("first"))
        connection.send(Begins("tuning", "fa3", 0.2, kernel="k7"))
        time.sleep(600)
    assert job.seconds <= 60.0 < job.tuning_seconds
    connection.send(ChoiceMade(Choice("fa3", "k8", 1.25, ())))
    connection.send(Finished())
