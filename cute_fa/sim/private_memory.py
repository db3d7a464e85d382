"""Memory that is not shared: each thread's local memory, and the kernel's read-only parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim.addresses import PRIVATE_WINDOW_BYTES, local_layout
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.memory import WORDS, fill_poison, poison

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

Mask = np.ndarray | None


def _offsets(addresses: np.ndarray) -> np.ndarray:
    """Byte offsets in a private window, from generic addresses or from plain offsets."""
    if addresses.dtype.itemsize < 8:
        return addresses.astype(np.int64)
    return (addresses & np.uint64(PRIVATE_WINDOW_BYTES - 1)).astype(np.int64)


@subsystem
class LocalMemory(Subsystem):
    """The local memory of every thread of a wave: ``bytes_per_thread`` each, poison at first."""

    name = "local"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        _, self.bytes_per_thread = local_layout(wave.kernel)
        threads = wave.num_warps * wave.num_ctas * 32
        self._row = -(-self.bytes_per_thread // 32) * 32
        self._data = np.zeros(threads * self._row, np.uint8)
        fill_poison(self._data)
        self._written: np.ndarray | None = None
        if wave.options.checks_rule("uninitialised-local-read"):
            self._written = np.zeros_like(self._data)
        self._rows = np.arange(threads).reshape(wave.num_warps, wave.num_ctas, 32) * self._row

    def _locate(
        self, ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask
    ) -> tuple[np.ndarray, np.ndarray]:
        """Element numbers in ``_data``, and the active lanes whose access is good."""
        offsets = _offsets(addresses)
        active = np.ones(offsets.shape, bool) if mask is None else mask
        outside = active & ((offsets < 0) | (offsets + nbytes > self.bytes_per_thread))
        if outside.any():
            text = (
                f"{nbytes}-byte access at offset {int(offsets[outside][0])} of the thread's "
                f"{self.bytes_per_thread} bytes of local memory"
            )
            report_lanes(ctx, "local-out-of-bounds", text, outside, addresses)
        skewed = active & ~outside & (offsets % nbytes != 0)
        if skewed.any():
            text = f"{nbytes}-byte access at an offset that is no multiple of {nbytes}"
            report_lanes(ctx, "local-misaligned", text, skewed, addresses)
        good = active & ~outside & ~skewed
        w0, w1, c0, c1 = ctx.rect
        return np.where(good, (self._rows[w0:w1, c0:c1] + offsets) // nbytes, 0), good

    def load(self, ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask) -> np.ndarray:
        """Read ``nbytes`` of each lane's own memory."""
        index, good = self._locate(ctx, addresses, nbytes, mask)
        if not good.any():
            return poison(index.shape, nbytes)
        if self._written is not None:
            flags = self._written.reshape(-1, nbytes)[index].all(axis=-1)
            missing = good & ~flags
            if missing.any():
                text = f"a {nbytes}-byte read of local memory that the thread has not written"
                report_lanes(ctx, "uninitialised-local-read", text, missing, addresses)
        values = self._data.view(WORDS[nbytes]).take(index)
        values[~good] = poison((1,), nbytes)[0]
        return values

    def store(
        self,
        ctx: BlockContext,
        addresses: np.ndarray,
        nbytes: int,
        values: np.ndarray,
        mask: Mask,
    ) -> None:
        """Write to each lane's own memory."""
        index, good = self._locate(ctx, addresses, nbytes, mask)
        if good.any():
            index = index[good]
            self._data.view(WORDS[nbytes])[index] = np.broadcast_to(values, good.shape)[good]
            if self._written is not None:
                self._written.reshape(-1, nbytes)[index] = 1


def load_param(ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask) -> np.ndarray:
    """Read the launch's parameter bytes at ``PARAM_BASE`` plus an offset."""
    offsets = _offsets(addresses)
    block = np.frombuffer(ctx.wave.params, np.uint8)
    active = np.ones(offsets.shape, bool) if mask is None else mask
    outside = active & (offsets + nbytes > len(block))
    if outside.any():
        offset = int(offsets[outside][0])
        text = f"{nbytes}-byte read at byte {offset} of {len(block)} bytes of parameters"
        report_lanes(ctx, "param-out-of-bounds", text, outside, addresses)
    good = active & ~outside
    values = poison(offsets.shape, nbytes)
    if good.any():
        picked = block[offsets[good][:, None] + np.arange(nbytes)]
        values[good] = picked.view(WORDS[nbytes])[:, 0]
    return values


def store_param(ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask) -> None:
    """Refuse a store to the parameters."""
    lanes = np.ones(addresses.shape, bool) if mask is None else mask
    text = f"{nbytes}-byte store to the kernel's parameters"
    report_lanes(ctx, "param-write", text, lanes, addresses)
