"""Where a kernel's shared variables lie: static ones first, the dynamic array behind them."""

from __future__ import annotations

from cute_fa import ptx
from cute_fa.sim.addresses import SHARED_BASE

DYNAMIC_ALIGNMENT = 1024
"""The dynamic array's alignment: swizzles work on absolute address bits, so it is generous."""

_TAIL_BYTES = 16  # past the end, so that a widest access at the last byte stays inside the array


def place(module: ptx.Module, kernel: ptx.Kernel, dynamic_bytes: int) -> tuple[dict[str, int], int]:
    """Offsets of the shared variables and the first offset past them.

    The extern array of PTX has no size of its own: the launch's ``dynamic_bytes`` is its size.
    """
    offset = SHARED_BASE
    symbols: dict[str, int] = {}
    variables = (*module.shared_vars.values(), *kernel.shared_vars.values())
    for variable in variables:
        if variable.nbytes:
            offset = _align(offset, variable.align)
            symbols[variable.name] = offset
            offset += variable.nbytes
    dynamic = _align(offset, DYNAMIC_ALIGNMENT)
    extern = [variable for variable in variables if not variable.nbytes]
    for variable in extern:
        symbols[variable.name] = dynamic
    end = dynamic + dynamic_bytes if extern or dynamic_bytes else offset
    return symbols, end


def padded(end: int) -> int:
    """Bytes to allocate per CTA for offsets below ``end``."""
    return _align(end + _TAIL_BYTES, 128)


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
