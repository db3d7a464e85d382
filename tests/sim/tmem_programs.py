"""Pieces of PTX that tests of tensor memory share."""

from __future__ import annotations

SLOT = 2048
"""Offset in shared memory of the word that ``tcgen05.alloc`` writes."""


def alloc(columns: int = 64, group: int = 1, warp: int = 0) -> str:
    """One warp allocates; every warp then has the address in ``%taddr``, its own in ``%own``."""
    return f"""
.reg .b32 %taddr; .reg .b32 %own; .reg .pred %others; .reg .b32 %slot;
add.u32 %slot, %smem, {SLOT};
setp.ne.u32 %others, %warp, {warp};
@%others bra ALLOCATED;
tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%slot], {columns};
ALLOCATED:
bar.sync 0;
ld.shared.u32 %taddr, [%slot];
and.b32 %own, %warp, 3;
shl.b32 %own, %own, 21;
add.u32 %own, %own, %taddr;
"""


def dealloc(columns: int = 64, group: int = 1) -> str:
    """The same warp gives the columns back once all warps are here."""
    return f"""
bar.sync 0;
@%others bra FREED;
tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %taddr, {columns};
tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;
FREED:
"""


def vector(prefix: str, count: int, first: int = 0) -> str:
    """``{%a0, %a1, …}``."""
    return "{" + ", ".join(f"%{prefix}{first + i}" for i in range(count)) + "}"


def declare(prefix: str, count: int) -> str:
    return f".reg .b32 %{prefix}<{count}>;\n"


def store_out(prefix: str, count: int) -> str:
    """Registers to the thread's words of output."""
    return "".join(f"st.global.u32 [%out+{4 * i}], %{prefix}{i};\n" for i in range(count))


def load_in(prefix: str, count: int) -> str:
    """Registers from the thread's words of input."""
    return "".join(f"ld.global.u32 %{prefix}{i}, [%in+{4 * i}];\n" for i in range(count))
