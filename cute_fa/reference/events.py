"""Several roles' programs as one list of events: what the schedules of the references share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

E = TypeVar("E")


def interleave(
    programs: Mapping[object, deque[E]], may_run: Callable[[E, set[E]], bool]
) -> list[E]:
    """One legal order of everybody's events: round robin, each waiting for what it must.

    Args:
        programs: each role's events, in its order; emptied.
        may_run: whether an event may happen after a set of others. What has happened stays true:
            one event never takes back what lets another run.

    Raises:
        RuntimeError: nobody can go on.
    """
    order: list[E] = []
    done: set[E] = set()
    while any(programs.values()):
        ready = [program for program in programs.values() if program and may_run(program[0], done)]
        if not ready:
            heads = [program[0] for program in programs.values() if program]
            raise RuntimeError(f"nobody can go on: {heads}")
        for program in ready:
            event = program.popleft()
            done.add(event)
            order.append(event)
    return order
