"""Calls of device functions that a program without a linker has: ``vprintf`` (PTX ISA 9.7.12.5).

CUDA's device ``printf`` calls ``vprintf(format, arguments)``, both generic addresses. The arguments
lie in the thread's local memory, each aligned to its size as C's varargs are. A thread's text goes
to Python's standard output when it makes the call.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from cute_fa import ptx
from cute_fa.sim.addresses import local_layout, round_up
from cute_fa.sim.isa import Decoded, Mask, effect
from cute_fa.sim.shared_memory import fault_of

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext

_LONGEST = 4096  # bytes of a format or of a string argument
_SPECIFICATION = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?"
    r"(?P<length>hh|h|ll|l|L|j|z|t)?(?P<kind>[diouxXeEfFgGaAcsp%])"
)
_SIZES = {"ll": 8, "l": 8, "j": 8, "z": 8, "t": 8}


class Arguments:
    """The variable arguments of one thread, read in order."""

    def __init__(self, ctx: BlockContext, mask: np.ndarray, start: np.ndarray) -> None:
        self._ctx, self._mask, self._start = ctx, mask, start
        self._at = tuple(int(x) for x in np.argwhere(mask)[0])
        self._offset = 0

    def _next(self, nbytes: int) -> np.ndarray:
        self._offset = round_up(self._offset, nbytes)
        addresses = self._start + np.uint64(self._offset)
        self._offset += nbytes
        local = self._ctx.subsystem("local")
        return np.asarray(local.load(self._ctx, addresses, nbytes, self._mask)[self._at])

    def integer(self, nbytes: int, *, signed: bool) -> int:
        return int(self._next(nbytes).view(f"{'i' if signed else 'u'}{nbytes}"))

    def double(self) -> float:
        return float(self._next(8).view(np.float64))

    def string(self) -> str:
        return read_string(self._ctx, self.integer(8, signed=False))


def read_string(ctx: BlockContext, address: int) -> str:
    """The zero-terminated string at a global address."""
    region = ctx.wave.memory.find(address)
    if region is None:
        ctx.wave.memory.gather(np.array([address], np.uint64), 1, None, fault_of(ctx))
        return ""
    start = address - region.base
    data = region.data.reshape(-1).view(np.uint8)[start : start + _LONGEST].tobytes()
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def render(text: str, arguments: Arguments) -> str:
    """What C's ``printf`` makes of a format; a specification it does not know stays as it is."""

    def replace(match: re.Match[str]) -> str:
        flags, width, precision, length, kind = match.groups()
        if kind == "%":
            return "%"
        if width == "*":
            width = str(arguments.integer(4, signed=True))
        if precision == "*":
            precision = str(max(arguments.integer(4, signed=True), 0))
        form = f"%{flags}{width or ''}" + (f".{precision}" if precision is not None else "")
        if kind == "s":
            return f"{form}s" % arguments.string()
        if kind == "c":
            return f"{form}s" % chr(arguments.integer(4, signed=False) & 0xFF)
        if kind == "p":
            return f"{form}s" % hex(arguments.integer(8, signed=False))
        if kind in "aA":
            value = arguments.double().hex()
            return f"{form}s" % (value if kind == "a" else value.upper())
        if kind in "eEfFgG":
            return f"{form}{kind}" % arguments.double()
        nbytes = _SIZES.get(length or "", 4)
        number = arguments.integer(nbytes, signed=kind in "di")
        if length in ("h", "hh"):
            number = _narrow(number, 2 if length == "h" else 1, signed=kind in "di")
        return f"{form}{'d' if kind in 'iu' else kind}" % number

    return _SPECIFICATION.sub(replace, text)


def _narrow(number: int, nbytes: int, *, signed: bool) -> int:
    return int.from_bytes(
        (number & (1 << 8 * nbytes) - 1).to_bytes(nbytes, "little"), "little", signed=signed
    )


@effect("call")
class Call(Decoded):
    """``call{.uni} (result), vprintf, (format, arguments)``; no other function is known.

    Parameters and result lie in the thread's local memory, beside its ``.local`` variables.
    """

    counter_class = "call"

    def __init__(self, instr: ptx.Instr, kernel: ptx.Kernel) -> None:
        super().__init__(instr, kernel)
        names = [o.name for o in instr.operands if isinstance(o, ptx.Symbol)]
        if names != ["vprintf"]:
            raise self.unsupported(f"a call of {names[0] if names else 'an unknown function'}")
        result, _, given = instr.operands
        assert isinstance(result, ptx.Vector) and isinstance(given, ptx.Vector)
        places, _ = local_layout(kernel)
        operands = (*given.items, *result.items)
        if not all(isinstance(o, ptx.Symbol) and o.name in places for o in operands):
            raise self.unsupported("parameters of a call that are not variables")
        self._places = [places[o.name] for o in operands if isinstance(o, ptx.Symbol)]
        if len(self._places) != 3:
            raise self.unsupported("vprintf takes a format and arguments, and has a result")

    def run(self, ctx: BlockContext, mask: Mask, *sources: Any) -> None:
        active = ctx.lanes.dense_mask() if mask is None else mask
        local = ctx.subsystem("local")
        addresses = [np.full(active.shape, place, np.uint64) for place in self._places]
        formats, arguments = (local.load(ctx, where, 8, active) for where in addresses[:2])
        for w, c, lane in np.argwhere(active):
            one = np.zeros_like(active)
            one[w, c, lane] = True
            text = read_string(ctx, int(formats[w, c, lane]))
            sys.stdout.write(render(text, Arguments(ctx, one, arguments)))
        local.store(ctx, addresses[2], 4, np.zeros(active.shape, np.uint32), active)
