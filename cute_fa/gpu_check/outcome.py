"""What is checked, what a check found, and how much time there is for the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cute_fa.build.bundle import BundleKernel
from cute_fa.errors import CuteFAError
from cute_fa.problem import DTYPE_BYTES, KernelVariant

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """One check.

    Attributes:
        section: "agreement", "correctness", "repeats", or what else the check was part of.
        name: the kernel and the problem.
        ok: None if it could not be made; ``detail`` says why.
        figures: numbers for the JSON.
    """

    section: str
    name: str
    ok: bool | None
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A check of one kernel that is still to be made.

    Attributes:
        section, name: as of its outcome; the name is unique in its section.
        make: makes it: ok, detail and figures of the outcome.
    """

    section: str
    name: str
    kernel: BundleKernel
    make: Callable[[], tuple[bool | None, str, dict[str, Any]]]

    def outcome(self) -> Outcome:
        """What making it gives; whatever goes wrong is a failure of this check only."""
        try:
            ok, detail, figures = self.make()
        except Exception as error:
            message = str(error) if isinstance(error, CuteFAError) else first_lines(error)
            return Outcome(self.section, self.name, False, f"{type(error).__name__}: {message}")
        return Outcome(self.section, self.name, ok, detail, figures)


def first_lines(error: Exception) -> str:
    """What an error says, without the advice that torch adds to CUDA's errors."""
    return "\n".join(str(error).strip().splitlines()[:3])


def title(kernel: BundleKernel) -> str:
    """What a kernel is called in reports: its label, which candidates share with their default."""
    return kernel.label if kernel.role == "default" else f"{kernel.label} [{kernel.name}]"


def family_of(kernel: BundleKernel) -> str:
    """The kernels that a kernel has most of its code in common with: what makes one hang may well
    make the others hang."""
    return family_name(kernel.generation, kernel.variant)


def family_name(generation: str, variant: KernelVariant) -> str:
    """``family_of`` a generation's kernels for a variant, e.g. "fa3 fp8 packed"."""
    bits = 8 * DTYPE_BYTES[variant.dtype]
    return f"{generation} fp{bits} {'packed' if variant.is_varlen else 'dense'}"


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
