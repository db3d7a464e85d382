"""Who takes part in a ``.sync`` or ``.aligned`` instruction, and who is still missing.

Such an instruction makes a thread wait until every thread of its member mask that has not exited
executes the same instruction (PTX ISA 9.7.9.6, 9.7.13.6 to 9.7.13.10); ``.aligned`` ones ask it of
the whole warp. The scheduler holds lanes back until then; what is carried out without a member is
undefined and reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.hazards import report_lanes

if TYPE_CHECKING:
    from cute_fa.sim.isa import Decoded
    from cute_fa.sim.wave import BlockContext

EVERYONE = 0xFFFF_FFFF


def lane_bits(lanes: np.ndarray) -> np.ndarray:
    """The lanes of each warp as a 32-bit mask: bool ``(w, c, 32)`` → uint32 ``(w, c, 1)``."""
    bits = np.packbits(lanes, axis=-1, bitorder="little")
    return np.ascontiguousarray(bits).view(np.uint32)  # packed in the order that lanes lie in


def bits_to_lanes(bits: np.ndarray) -> np.ndarray:
    """Inverse of :func:`lane_bits`: uint32 ``(…, 1)`` → bool ``(…, 32)``."""
    return (bits >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)


def members_of(handler: Decoded) -> int | str:
    """The member mask of a collective: its bits, or the name of the register that holds them."""
    if handler.member_source is None:
        return EVERYONE
    operand = handler.sources[handler.member_source]
    if isinstance(operand, ptx.Reg):
        return operand.name
    assert isinstance(operand, ptx.Imm), operand
    return operand.value & EVERYONE


def lacking(alive: np.ndarray, here: np.ndarray, members: np.ndarray | int) -> np.ndarray:
    """The lanes that a member of theirs has not come to: bool ``(w, c, 32)``.

    Args:
        alive, here: lanes that have not exited, and those that execute, bool ``(w, c, 32)``.
        members: member mask of each lane, broadcastable to ``(w, c, 32)``.
    """
    absent = lane_bits(alive) & ~lane_bits(here)
    out: np.ndarray = here & (absent & np.asarray(members).astype(np.uint32) != 0)
    return out


def check_members(
    handler: Decoded, ctx: BlockContext, mask: np.ndarray, sources: tuple[Any, ...]
) -> None:
    """Report lanes that execute a collective without all the members of their mask."""
    w0, w1, c0, c1 = ctx.rect
    alive = ctx.wave.alive[w0:w1, c0:c1]
    source = handler.member_source
    members = EVERYONE if source is None else sources[source]
    torn = lacking(alive, mask, members)
    if not torn.any():
        return
    w, c, _ = np.argwhere(torn)[0]
    text = (
        f"{np.count_nonzero(mask[w, c])} of a warp's {np.count_nonzero(alive[w, c])} threads "
        f"execute {handler.instr.opcode}; other members of their mask are elsewhere"
    )
    report_lanes(ctx, "divergent-collective", text, torn)
