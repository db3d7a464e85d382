"""Waves over forked processes that share global memory."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cute_fa.errors import CuteFAError
from cute_fa.sim.memory import GlobalMemory

Job = tuple[int, Any]


class WorkerError(CuteFAError, RuntimeError):
    """A simulation process died or raised something that is not a hazard."""


def run_forked(
    run: Callable[[int, Any], Any], jobs: Sequence[Job], memory: GlobalMemory, processes: int
) -> list[Any]:
    """``run(*job)`` for every job, spread over this process and forked ones.

    Global memory is moved to shared mappings meanwhile, so that every store arrives. Each process
    takes every ``processes``-th job and stops at the first whose result has an ``error``.

    Raises:
        WorkerError: with the other process's traceback.
    """
    memory.share()
    children: list[tuple[int, int]] = []
    try:
        for number in range(1, processes):
            children.append(_fork(run, jobs[number::processes]))
        results = _run_share(run, jobs[::processes])
        failures = []
        while children:
            outcome = _receive(*children[0])
            children.pop(0)
            if isinstance(outcome, str):
                failures.append(outcome)
            else:
                results += outcome
        if failures:
            raise WorkerError("a simulation process failed", got=failures[0])
    finally:
        for pid, pipe in children:  # left over only if this process failed itself
            os.kill(pid, signal.SIGKILL)
            os.close(pipe)
            os.waitpid(pid, 0)
        memory.copy_back()
    return results


def _run_share(run: Callable[[int, Any], Any], jobs: Sequence[Job]) -> list[Any]:
    results = []
    for index, job in jobs:
        results.append(run(index, job))
        if results[-1].error is not None:
            break
    return results


def _fork(run: Callable[[int, Any], Any], jobs: Sequence[Job]) -> tuple[int, int]:
    """Start a process that runs ``jobs``; (its id, the pipe that brings its results)."""
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # The child only runs numpy on this thread; it needs none of the parent's other threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(sender)
        return pid, receiver
    status = 1
    try:
        os.close(receiver)
        try:
            payload = pickle.dumps(_run_share(run, jobs))
        except BaseException:
            payload = pickle.dumps(traceback.format_exc())
        with os.fdopen(sender, "wb") as stream:
            stream.write(payload)
        status = 0
    finally:
        os._exit(status)  # no clean-up of the parent's: its buffers and handlers are not ours
    raise AssertionError("unreachable")


def _receive(pid: int, pipe: int) -> Any:
    """A child's results, or a text that says how it failed."""
    with os.fdopen(pipe, "rb") as stream:
        payload = stream.read()
    _, status = os.waitpid(pid, 0)
    if status or not payload:
        return f"process {pid} ended with status {status}"
    return pickle.loads(payload)
