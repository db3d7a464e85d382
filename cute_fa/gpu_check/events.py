"""What the process that checks tells the one that watches it; all of it can be pickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cute_fa.bench.benchmark import Row
from cute_fa.gpu_check.outcome import Outcome
from cute_fa.gpu_check.tune import Choice
from cute_fa.problem import KernelVariant

# A provider of the benchmark, and what its kernel is specialised for.
Call = tuple[str, KernelVariant]


@dataclass(frozen=True)
class Begins:
    """Something that may hang, or end the process.

    Attributes:
        patience: seconds after which it counts as hanging.
        kernel: name of the kernel that would be to blame.
        call: or the provider, and for what variant.
        family: the kernels that are given up together, if too many of them are to blame.
    """

    section: str
    name: str
    patience: float
    kernel: str | None = None
    call: Call | None = None
    family: str | None = None


@dataclass(frozen=True)
class DeviceFound:
    document: Mapping[str, Any]


@dataclass(frozen=True)
class OutcomeFound:
    outcome: Outcome


@dataclass(frozen=True)
class MatmulTimed:
    name: str
    dtype: str
    tflops: float


@dataclass(frozen=True)
class ShapeTimed:
    shape: str
    rows: Sequence[Row]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class ChoiceMade:
    choice: Choice


@dataclass(frozen=True)
class SectionDone:
    section: str
    left_out: int
    seconds: float


@dataclass(frozen=True)
class Lost:
    """The device does not answer this process any more; what was begun last is to blame."""

    why: str


@dataclass(frozen=True)
class Finished:
    """There is nothing left to do."""


@dataclass(frozen=True)
class History:
    """What earlier processes of the same run did: a new one goes on from there.

    Attributes:
        sections: that are done.
        done: (section, name) of checks, shapes and choices that need not be made again.
        broken: names of kernels that hung or ended a process, and how.
        refused: the same of the benchmark's calls.
        given_up: families of kernels of which none is asked for anything any more.
    """

    sections: frozenset[str] = frozenset()
    done: frozenset[tuple[str, str]] = frozenset()
    broken: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[Call, str] = field(default_factory=dict)
    given_up: frozenset[str] = frozenset()
