"""The asynchronous engines of a CTA, as agents of the race clocks, and the rules about them.

Behind a CTA's warps stand, as agent rows of :class:`cute_fa.sim.race.Clocks`:

* one row for each warpgroup's tensor core, which reads operands from shared memory; tcgen05 uses
  the first one only, since a CTA has one queue for it;
* ``LANDING_ROWS`` rows under which copies that signal an mbarrier write: a barrier uses one of
  them, so that waiting on one barrier does not order what another one announces;
* one row for the bulk copies that read shared memory;
* in kernels with ``st.async`` and ``red.async``, ``LANDING_ROWS`` more for those: they write by the
  generic proxy, unlike all other engines.
"""

from __future__ import annotations

from functools import lru_cache

from cute_fa.ptx import Instr, Kernel

LANDING_ROWS = 8
WARPGROUP = 4  # warps


def is_asynchronous(instr: Instr) -> bool:
    """Whether the instruction starts something that the engines finish."""
    if instr.op in ("wgmma", "mbarrier", "tcgen05"):
        return True
    return instr.op in ("cp", "st", "red") and (
        "bulk" in instr.parts or instr.parts[1:2] == ("async",)
    )


@lru_cache(maxsize=64)
def uses_engines(kernel: Kernel) -> bool:
    """Whether a kernel needs engine rows: bulk copies, mbarriers, wgmma or tcgen05.

    Kernels whose only asynchronous instructions are ``cp.async`` do without.
    """
    return any(
        (is_asynchronous(instr) and instr.parts[:2] != ("cp", "async"))
        or instr.opcode.startswith("cp.async.bulk")
        for instr in kernel.body
    )


@lru_cache(maxsize=64)
def uses_tensor_memory(kernel: Kernel) -> bool:
    """Whether a kernel has tcgen05 instructions."""
    return any(instr.op == "tcgen05" for instr in kernel.body)


def is_generic(instr: Instr) -> bool:
    """Whether it is ``st.async`` or ``red.async``, which do without the async proxy."""
    return instr.op in ("st", "red") and instr.parts[1] == "async"


@lru_cache(maxsize=64)
def generic_rows(kernel: Kernel) -> int:
    """The last agent rows of a CTA: those that write by the generic proxy."""
    return LANDING_ROWS if any(map(is_generic, kernel.body)) else 0


def engine_rows(kernel: Kernel, warps: int) -> int:
    """Agent rows per CTA behind those of its warps."""
    if not uses_engines(kernel):
        return 0
    return warpgroups(warps) + LANDING_ROWS + 1 + generic_rows(kernel)


def warpgroups(warps: int) -> int:
    """Warpgroups of a CTA; the last one may be short."""
    return -(-warps // WARPGROUP)


def tensor_row(warps: int, warpgroup: int) -> int:
    """Agent row of a warpgroup's tensor core."""
    return warps + warpgroup


def landing_row(warps: int, barrier: int, instr: Instr) -> int:
    """Agent row of the copies by ``instr`` that signal the CTA's barrier number ``barrier``."""
    first = bulk_row(warps) + 1 if is_generic(instr) else warps + warpgroups(warps)
    return first + barrier % LANDING_ROWS


def bulk_row(warps: int) -> int:
    """Agent row of the bulk copies that read shared memory."""
    return warps + warpgroups(warps) + LANDING_ROWS
