"""Register files and bound blocks: what is made once for all waves of one shape.

A block's function is bound to a rectangle of lanes: the register rows it touches become numpy views
of that rectangle, held as closure variables. Register files stay where they are from wave to
wave, so that a bound block serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cute_fa.sim import addresses
from cute_fa.sim.isa.move import SPECIALS
from cute_fa.sim.lanes import Rect
from cute_fa.sim.program import Program
from cute_fa.sim.wave import Wave

BlockFunction = Callable[[Any, Any], Any]

_POISON: dict[str, Any] = {
    "p": False,
    "h": np.uint16(0x7FC0),
    "r": np.uint32(0x7FC0DEAD),
    "d": np.uint64(0x7FC0DEAD7FC0DEAD),
}
"""What a register holds that the kernel reads before it writes it: NaN in every float type."""

_FILES = {"p": np.dtype(bool), "h": np.dtype("u2"), "r": np.dtype("u4"), "d": np.dtype("u8")}


class Machine:
    """Register files for waves of one shape, and the blocks bound to them."""

    def __init__(self, program: Program, num_warps: int, num_ctas: int, params: bytes) -> None:
        self.program = program
        self.shape = (num_warps, num_ctas, 32)
        self.regs = {
            file: np.zeros((program.rows[file], *self.shape), dtype)
            for file, dtype in _FILES.items()
        }
        self.params = np.frombuffer(params + bytes(16), np.uint8)
        self.specials: dict[str, np.ndarray] = {}
        self.shared: dict[str, np.ndarray] = {}
        self.variables: dict[str, np.ndarray] = {}
        self.blocks: list[dict[tuple[Rect, bool], BlockFunction]] = [{} for _ in program.blocks]
        self._wave: Wave | None = None

    def load(self, wave: Wave, variables: dict[str, int]) -> None:
        """Point the machine at a new wave: fill special registers, poison undefined ones.

        Args:
            variables: addresses of the module's global variables.
        """
        self._wave = wave
        wave.regs = self.regs
        for name, array in self.specials.items():
            array[...] = SPECIALS[name][1](wave)
        for name, array in self.shared.items():
            array[...] = self._shared_address(name)
        for name, array in self.variables.items():
            array[...] = variables[name]
        self._variable_addresses = variables
        for register in self.program.undefined:
            if register in self.program.locations:
                place = self.program.location(register)
                self.regs[place.file][place.row] = _POISON[place.file]

    def bind(self, index: int, rect: Rect, masked: bool) -> BlockFunction:
        """The block's function for a rectangle, made at first use."""
        function = self.program.maker(index, masked)(Binding(self, rect))
        self.blocks[index][rect, masked] = function
        return function

    def special(self, name: str) -> np.ndarray:
        array = self.specials.get(name)
        if array is None:
            assert self._wave is not None
            array = self.specials[name] = np.array(SPECIALS[name][1](self._wave))
        return array

    def shared_symbol(self, name: str) -> np.ndarray:
        array = self.shared.get(name)
        if array is None:
            array = self.shared[name] = self._shared_address(name)
        return array

    def variable(self, name: str) -> np.ndarray:
        array = self.variables.get(name)
        if array is None:
            array = self.variables[name] = np.array(self._variable_addresses[name], np.uint64)
        return array

    def _shared_address(self, name: str) -> np.ndarray:
        """Address of a shared variable as each CTA sees its own, uint32 ``(1, R, 1)``."""
        assert self._wave is not None
        rank = self._wave.cta_rank.astype(np.uint32).reshape(1, -1, 1)
        offset = np.uint32(self._wave.shared_symbols[name])
        return (rank << np.uint32(addresses.RANK_SHIFT)) | offset


class Binding:
    """Resolves the names of a block's source for one rectangle; generated ``make`` calls it."""

    def __init__(self, machine: Machine, rect: Rect) -> None:
        self.machine = machine
        self.rect = rect
        w0, w1, c0, c1 = rect
        self.shape = (w1 - w0, c1 - c0, 32)

    def reg(self, file: str, row: int, dtype: np.dtype) -> np.ndarray:
        """A register row over the rectangle."""
        w0, w1, c0, c1 = self.rect
        return self.machine.regs[file][row, w0:w1, c0:c1].view(dtype)

    def special(self, name: str) -> np.ndarray:
        """A special register over the rectangle, with extent 1 along axes it does not vary on."""
        return self._cut(self.machine.special(name))

    def shared(self, name: str) -> np.ndarray:
        """Address of a shared variable, uint32 ``(1, c, 1)``."""
        return self._cut(self.machine.shared_symbol(name))

    def variable(self, name: str) -> np.ndarray:
        """Address of a global variable, 0-d uint64."""
        return self.machine.variable(name)

    def param(self, offset: int, nbytes: int) -> np.ndarray:
        """Parameter bytes, 0-d unsigned."""
        return self.machine.params[offset : offset + nbytes].copy().view(f"u{nbytes}").reshape(())

    def full(self, constant: np.ndarray) -> np.ndarray:
        """A constant over the rectangle (a read-only broadcast)."""
        return np.broadcast_to(constant, self.shape)

    def zeros(self, dtype: np.dtype) -> np.ndarray:
        """Zeros over the rectangle."""
        return np.zeros(self.shape, dtype)

    def params(self) -> np.ndarray:
        """The whole parameter block, uint8."""
        return self.machine.params

    def _cut(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 0:
            return array
        w0, w1, c0, c1 = self.rect
        warps = slice(w0, w1) if array.shape[0] > 1 or self.machine.shape[0] == 1 else slice(None)
        ctas = slice(c0, c1) if array.shape[1] > 1 or self.machine.shape[1] == 1 else slice(None)
        return array[warps, ctas]
