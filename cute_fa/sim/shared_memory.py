"""Shared memory: lane-wide loads and stores on the rows of ``wave.smem``, checked.

Addresses are as in :mod:`cute_fa.sim.addresses`: the CTA's rank in the cluster above the byte
offset. An access by all lanes of a rectangle of warps and CTAs is one fancy index into the bytes of
all CTAs of the wave. Where several lanes of one store write the same address, the last one in the
order warp, CTA, lane wins (PTX leaves the winner open).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cute_fa.sim.addresses import RANK_SHIFT, SHARED_BASE, SHARED_OFFSET_MASK
from cute_fa.sim.hazards import report_lanes
from cute_fa.sim.isa import Subsystem, subsystem
from cute_fa.sim.lifetimes import Lifetimes
from cute_fa.sim.memory import WORDS, fill_poison, poison
from cute_fa.sim.shadow import SharedShadow

if TYPE_CHECKING:
    from cute_fa.sim.wave import BlockContext, Wave

Mask = np.ndarray | None


@subsystem
class SharedMemory(Subsystem):
    """The shared memory of one wave. It starts out as poison (NaN in every float type)."""

    name = "shared"

    def on_wave_start(self, wave: Wave) -> None:
        self.wave = wave
        fill_poison(wave.smem)
        self.flat = wave.smem.reshape(-1)
        self.row_bytes = wave.smem.shape[1]
        self.end = wave.smem_end
        self._views = {nbytes: self._view(nbytes) for nbytes in WORDS}
        slots = np.arange(wave.num_ctas)
        self._slots = slots.reshape(1, -1, 1)
        self._rows = (slots * self.row_bytes).reshape(1, -1, 1)
        self._cluster_first = (slots - wave.cta_rank.astype(np.int64)).reshape(1, -1, 1)

    def _view(self, nbytes: int) -> np.ndarray:
        usable = self.flat.nbytes // nbytes * nbytes
        return self.flat[:usable].view(WORDS[nbytes])

    @property
    def shadow(self) -> SharedShadow:
        """The wave's shadow memory (which may be inactive)."""
        return self.wave.shared_state[SharedShadow.name]

    def locate(
        self, ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask
    ) -> tuple[np.ndarray, Mask, np.ndarray | None]:
        """Turn addresses into element numbers, reporting what is wrong with them.

        Args:
            addresses: uint32 or uint64 ``(w, c, 32)`` over ``ctx.rect``.
            nbytes: size and alignment of each access, a key of ``WORDS``.
            mask: active lanes.

        Returns:
            ``(index, mask, faulty)``: int64 element numbers in the wave's shared memory as elements
            of ``nbytes``; the lanes whose access is good (None: all); and the active lanes whose is
            not (None: none). Index is harmless in lanes that are not good.
        """
        if mask is not None:
            addresses = np.where(mask, addresses, self._own_base(ctx, addresses.dtype))
        _, _, c0, c1 = ctx.rect
        offsets = addresses
        rows = self._rows[:, c0:c1]
        faulty = None
        if self.wave.cluster_size > 1:
            offsets = addresses & addresses.dtype.type(SHARED_OFFSET_MASK)
            ranks = (addresses >> addresses.dtype.type(RANK_SHIFT)).astype(np.int64)
            if int(ranks.max()) >= self.wave.cluster_size:
                faulty = ranks >= self.wave.cluster_size
            slots = self._cluster_first[:, c0:c1] + ranks
            if faulty is not None:  # there is no such CTA: as if it were the own one
                slots = np.where(faulty, self._slots[:, c0:c1], slots)
            self._check_peers(ctx, slots, addresses)
            rows = slots * self.row_bytes
        low, high = int(offsets.min()), int(offsets.max())
        bits = int(np.bitwise_or.reduce(offsets, axis=None))
        good = low >= SHARED_BASE and high + nbytes <= self.end and not bits & (nbytes - 1)
        if good and faulty is None:
            index = offsets.astype(np.int64) + rows
            return (index if nbytes == 1 else index >> (nbytes.bit_length() - 1)), mask, None
        return self._fault(ctx, addresses, offsets, nbytes, mask)

    def _check_peers(self, ctx: BlockContext, slots: np.ndarray, addresses: np.ndarray) -> None:
        """Note accesses to other CTAs of the cluster; report them if all threads have exited."""
        foreign = slots != self._slots[:, ctx.rect[2] : ctx.rect[3]]
        if foreign.any():
            unit: Lifetimes = ctx.subsystem(Lifetimes.name)
            unit.visit_lanes(ctx, np.broadcast_to(slots, addresses.shape), foreign, addresses)
        gone = np.logical_not(self.wave.alive.any(axis=(0, 2)))
        if gone.any() and gone[slots].any():
            text = "shared memory of a CTA of the cluster that has exited"
            lanes = np.broadcast_to(gone[slots], addresses.shape)
            report_lanes(ctx, "exited-cta-access", text, lanes, addresses)

    def _own_base(self, ctx: BlockContext, dtype: np.dtype) -> np.ndarray:
        """The first shared address of each lane's own CTA, ``(1, c, 1)``."""
        _, _, c0, c1 = ctx.rect
        ranks = self.wave.cta_rank[c0:c1].astype(dtype)
        return ((ranks << dtype.type(RANK_SHIFT)) | dtype.type(SHARED_BASE)).reshape(1, -1, 1)

    def _fault(
        self,
        ctx: BlockContext,
        addresses: np.ndarray,
        offsets: np.ndarray,
        nbytes: int,
        mask: Mask,
    ) -> tuple[np.ndarray, Mask, np.ndarray]:
        """Report each kind of bad address; the slow part of :meth:`locate`."""
        active = np.ones(addresses.shape, bool) if mask is None else mask
        offsets = offsets.astype(np.int64)
        ranks = addresses.astype(np.int64) >> RANK_SHIFT
        size = self.end - SHARED_BASE
        stranger = active & (ranks >= self.wave.cluster_size)
        outside = (offsets < SHARED_BASE) | (offsets + nbytes > self.end)
        outside = outside & active & ~stranger
        skewed = active & ~stranger & ~outside & (offsets % nbytes != 0)
        if stranger.any() and self.wave.cluster_size > 1:
            text = f"rank {int(ranks[stranger][0])} in a cluster of {self.wave.cluster_size} CTAs"
            report_lanes(ctx, "shared-bad-rank", text, stranger, addresses)
        elif stranger.any():
            outside |= stranger
        if outside.any():
            offset = int(offsets[outside][0])
            side = (
                f"{SHARED_BASE - offset} bytes before the start"
                if offset < SHARED_BASE
                else f"{offset + nbytes - self.end} bytes past the end"
            )
            text = f"{nbytes}-byte access {side} of the CTA's {size} bytes of shared memory"
            report_lanes(ctx, "shared-out-of-bounds", text, outside, addresses)
        if skewed.any():
            text = f"{nbytes}-byte access at an offset that is no multiple of {nbytes}"
            report_lanes(ctx, "shared-misaligned", text, skewed, addresses)
        faulty = stranger | outside | skewed
        good = active & ~faulty
        _, _, c0, c1 = ctx.rect
        slots = self._cluster_first[:, c0:c1] + ranks
        index = np.where(good, (slots * self.row_bytes + offsets) // nbytes, 0)
        return index, good, faulty

    def load(self, ctx: BlockContext, addresses: np.ndarray, nbytes: int, mask: Mask) -> np.ndarray:
        """Read each lane's ``nbytes``; ``WORDS[nbytes]`` shaped as the addresses, poison if bad."""
        index, good, faulty = self.locate(ctx, addresses, nbytes, mask)
        shadow = self.shadow
        if shadow.active and (good is None or good.any()):
            shadow.read(ctx, index, nbytes, good)
        values = self._views[nbytes].take(index)
        if faulty is not None:
            values[faulty] = poison((1,), nbytes)[0]
        return values

    def store(
        self,
        ctx: BlockContext,
        addresses: np.ndarray,
        nbytes: int,
        values: np.ndarray,
        mask: Mask,
    ) -> None:
        """Write each lane's element of ``WORDS[nbytes]``; bad lanes write nothing."""
        index, good, _ = self.locate(ctx, addresses, nbytes, mask)
        if good is not None and not good.any():
            return
        shadow = self.shadow
        if shadow.active:
            shadow.write(ctx, index, nbytes, good)
        self.put(index, nbytes, values, good)

    def put(self, index: np.ndarray, nbytes: int, values: np.ndarray, mask: Mask) -> None:
        """Write elements at known element numbers, unchecked."""
        if mask is None:
            self._views[nbytes][index] = values
        else:
            self._views[nbytes][index[mask]] = np.broadcast_to(values, index.shape)[mask]

    def take(self, index: np.ndarray, nbytes: int) -> np.ndarray:
        """Read elements at known element numbers, unchecked."""
        return self._views[nbytes].take(index)


def fault_of(ctx: BlockContext) -> partial:
    """The callback by which :class:`GlobalMemory` reports faults of the running instruction."""
    return partial(report_lanes, ctx)
