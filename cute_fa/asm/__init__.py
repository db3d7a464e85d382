"""What the compiler made of a kernel: resources, SASS, instruction mix, loops, red flags.

Standard library only; SASS needs NVIDIA's nvdisasm, which the extra ``inspect`` installs.
"""

from cute_fa.asm.inspect import Inspection, inspect_kernel
from cute_fa.asm.occupancy import Occupancy, ctas_per_sm, occupancy
from cute_fa.asm.resources import Resources, resources
from cute_fa.asm.sass import SassInstr, SassKernel, disassemble, sass

__all__ = [
    "Inspection",
    "Occupancy",
    "Resources",
    "SassInstr",
    "SassKernel",
    "ctas_per_sm",
    "disassemble",
    "inspect_kernel",
    "occupancy",
    "resources",
    "sass",
]
