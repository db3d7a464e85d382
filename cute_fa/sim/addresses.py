"""The simulator's address map: where each state space lies in the generic address space.

Generic addresses (PTX ISA 5.2, ``cvta``) are told apart by value alone, so that ``cvta`` and
``cvta.to`` are identities:

=====================  ==========================================================
below 2**32            shared memory: rank of the CTA in its cluster in bits 24 and up,
                       byte offset in bits 0 to 23
``PARAM_BASE`` …       the kernel's parameter block
``LOCAL_BASE`` …       local memory, the same addresses for every thread
everything else        global memory, at the address that the host knows it by
=====================  ==========================================================

Compilers rely on the place of the rank: the DSL clears bit 24 of a barrier's address to name the
even CTA of a pair.
"""

from __future__ import annotations

from cute_fa.ptx import Kernel

SHARED_BASE = 1024
"""Offset of the first shared byte: aligned for every swizzle, and address 0 stays invalid."""

RANK_SHIFT = 24
SHARED_OFFSET_MASK = (1 << RANK_SHIFT) - 1
SHARED_WINDOW_END = 1 << 32

PARAM_BASE = 0x7000_0000_0000_0000
LOCAL_BASE = 0x7100_0000_0000_0000
PRIVATE_WINDOW_BYTES = 1 << 48


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def shared_address(rank: int, offset: int) -> int:
    """The shared address of byte ``offset`` (``SHARED_BASE`` or above) in the CTA of ``rank``."""
    return rank << RANK_SHIFT | offset


def local_layout(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Place a kernel's ``.local`` variables and the parameters of the calls that it makes.

    Returns:
        address of each, and bytes per thread.
    """
    addresses: dict[str, int] = {}
    end = 0
    for name, variable in (*kernel.local_vars.items(), *kernel.param_vars.items()):
        end = round_up(end, max(variable.align, 1))
        addresses[name] = LOCAL_BASE + end
        end += variable.nbytes
    return addresses, round_up(end, 16)
