"""Shadow of tensor memory: who wrote and read each cell last, and what is still on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim.async_shadow import Issuer

if TYPE_CHECKING:
    from cute_fa.sim.tensor_memory import Area
    from cute_fa.sim.wave import BlockContext, Wave


class TensorShadow:
    """The shadow of one wave's tensor memory."""

    def __init__(self, wave: Wave, used: bool) -> None:
        self.wave = wave
        self.active = False

    def begin_read(self, ctx: BlockContext, issuer: Issuer, area: Area, row: int) -> None: ...
    def begin_write(
        self, ctx: BlockContext, issuer: Issuer, area: Area, row: int, *, accumulates: bool
    ) -> None: ...
    def finish_read(self, area: Area, row: int, slot: int, event: np.uint32) -> None: ...
    def finish_write(self, area: Area, row: int, slot: int, event: np.uint32) -> None: ...
