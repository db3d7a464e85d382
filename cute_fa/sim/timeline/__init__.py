"""A modelled timeline: what a trace would take on a GPU, by documented constants.

It is a model, never a measurement: instructions are PTX, not machine code, and every constant of
:mod:`cute_fa.sim.timeline.machines` says where it is from. What it shows is who waits for whom,
and which unit of the SM sets the pace.
"""

from cute_fa.sim.timeline.chrome import chrome_trace
from cute_fa.sim.timeline.intervals import Interval, logical_intervals, overlap
from cute_fa.sim.timeline.machines import MACHINES, MachineModel, machine_of
from cute_fa.sim.timeline.picture import draw
from cute_fa.sim.timeline.replay import Timeline, replay

__all__ = [
    "MACHINES",
    "Interval",
    "MachineModel",
    "Timeline",
    "chrome_trace",
    "draw",
    "logical_intervals",
    "machine_of",
    "overlap",
    "replay",
]
