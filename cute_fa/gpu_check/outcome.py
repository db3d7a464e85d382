"""What a check found, and how much time there is for the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """One check.

    Attributes:
        section: "agreement", "correctness" or "repeats".
        name: the kernel and the problem.
        ok: None if it could not be made; ``detail`` says why.
        figures: numbers for the JSON.
    """

    section: str
    name: str
    ok: bool | None
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Deadline:
    """A share of the time that a run has.

    Attributes:
        left_out: how many items were not reached.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.left_out = 0
        self._clock = clock
        self._end = clock() + seconds

    def has_time(self) -> bool:
        return self._clock() < self._end

    def while_time(self, items: Iterable[T]) -> Iterator[T]:
        """The items until time is up; the others are counted."""
        for item in items:
            if self.has_time():
                yield item
            else:
                self.left_out += 1
