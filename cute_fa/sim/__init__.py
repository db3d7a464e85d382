"""A simulator for CuTe DSL programs: runs their compiled PTX on numpy, no GPU needed.

``Device`` is the entry for programs; ``execute.execute`` runs one kernel of a parsed PTX module.
The parts:

* ``isa/``: what each PTX instruction means, one small function or class each;
* ``codegen``, ``render``, ``program``, ``machine``: basic blocks as Python functions over numpy
  arrays that hold many warps of several CTAs (``lanes``, ``wave``);
* ``schedule``, ``execute``, ``fork``: who runs when, CTAs into waves, waves over processes;
* ``memory``, ``shared_memory``, ``private_memory``, ``race``, ``shadow``, ``hazards``: state spaces
  and the checks on their use;
* ``device``, ``hosts``, ``runtime``, ``tensors``: the seam to the DSL's compiled host code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cute_fa.sim.counters import Counters
    from cute_fa.sim.device import Device, current_device
    from cute_fa.sim.execute import Launch
    from cute_fa.sim.hazards import Hazard, HazardError
    from cute_fa.sim.isa import UnsupportedInstruction
    from cute_fa.sim.memory import GlobalMemory
    from cute_fa.sim.wave import LaunchConfig, SimOptions

_HOMES = {
    "Counters": "counters",
    "Device": "device",
    "GlobalMemory": "memory",
    "Hazard": "hazards",
    "HazardError": "hazards",
    "Launch": "execute",
    "LaunchConfig": "wave",
    "SimOptions": "wave",
    "UnsupportedInstruction": "isa",
    "current_device": "device",
}

__all__ = [
    "Counters",
    "Device",
    "GlobalMemory",
    "Hazard",
    "HazardError",
    "Launch",
    "LaunchConfig",
    "SimOptions",
    "UnsupportedInstruction",
    "current_device",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first asked for."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
