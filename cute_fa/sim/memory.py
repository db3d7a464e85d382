"""Global memory: the allocations that a program may touch, and lane-wide access to them.

Registers hold the host's real addresses, so an allocation is a :class:`Region`: a base address and
the bytes behind it. Whatever lies in no region is out of bounds. The accesses of all lanes of an
instruction are one fancy index into a typed view of the region; the usual case, all lanes in one
region, needs one look at the smallest and the largest address.
"""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.sim.addresses import LOCAL_BASE, PARAM_BASE, SHARED_WINDOW_END

WORDS: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
    16: np.dtype("V16"),
    32: np.dtype("V32"),
}
"""One element for each access size in bytes; sizes beyond 8 are moved as opaque bytes."""

SECTOR_BYTES = 32

POISON_HALF = 0x7FC0
"""Repeated over the bytes of what must not be used: NaN as float16, bfloat16 and float32."""

Fault = Callable[[str, str, np.ndarray, np.ndarray], None]
"""``fault(rule, message, lanes, addresses)``: told which lanes (bool array) go wrong."""


def poison(shape: tuple[int, ...], nbytes: int) -> np.ndarray:
    """An array of ``WORDS[nbytes]`` full of poison."""
    if nbytes == 1:
        return np.full(shape, POISON_HALF >> 8, np.uint8)
    halves = np.full((*shape, nbytes // 2), POISON_HALF, np.uint16)
    return halves.view(WORDS[nbytes]).reshape(shape)


def fill_poison(array: np.ndarray) -> None:
    """Overwrite a contiguous uint8 array of even size with poison."""
    array.reshape(-1).view(np.uint16)[...] = POISON_HALF


@dataclass(eq=False)
class Region:
    """One allocation.

    Attributes:
        base: its first address.
        data: its bytes, uint8, one-dimensional; simulated stores land in it.
        name: for reports.
        writable: stores are allowed.
        initialised: uint8 per byte, 1 once written, or None where that is not tracked.
        private: a worker process found it after it began: the others would not see its stores.
    """

    base: int
    data: np.ndarray
    name: str
    writable: bool = True
    initialised: np.ndarray | None = None
    private: bool = False
    _views: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict, repr=False)
    _shadows: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _original: np.ndarray | None = field(default=None, repr=False)
    _original_initialised: np.ndarray | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def end(self) -> int:
        """The first address past the region."""
        return self.base + self.data.nbytes

    def words(self, nbytes: int) -> tuple[np.ndarray, int]:
        """The region as elements of ``nbytes``, and the address of the first aligned one."""
        known = self._views.get(nbytes)
        if known is None:
            known = self._typed(self.data, nbytes), self.base + -self.base % nbytes
            self._views[nbytes] = known
        return known

    def shadow(self, nbytes: int) -> np.ndarray:
        """``initialised`` in the geometry of :meth:`words`."""
        known = self._shadows.get(nbytes)
        if known is None:
            assert self.initialised is not None
            known = self._shadows[nbytes] = self._typed(self.initialised, nbytes)
        return known

    def _typed(self, array: np.ndarray, nbytes: int) -> np.ndarray:
        skip = -self.base % nbytes
        count = max(array.nbytes - skip, 0) // nbytes
        return array[skip : skip + count * nbytes].view(WORDS[nbytes])

    def replace_data(self, data: np.ndarray, initialised: np.ndarray | None) -> None:
        """Put other arrays of the same size behind the region's addresses."""
        self.data = data
        self.initialised = initialised
        self._views.clear()
        self._shadows.clear()


class GlobalMemory:
    """The regions of the simulated device.

    Args:
        resolver: called with an address that lies in no region; it may :meth:`register` one that
            holds the address and return it, or return None. Asked once per unknown address.
    """

    def __init__(self, resolver: Callable[[int], Region | None] | None = None) -> None:
        self.resolver = resolver
        self._bases: list[int] = []
        self._regions: list[Region] = []
        self._last: Region | None = None
        self._unknown: set[int] = set()
        self._shared_by: int | None = None

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions by rising address."""
        return tuple(self._regions)

    def register(
        self,
        data: np.ndarray,
        *,
        base: int | None = None,
        name: str = "allocation",
        writable: bool = True,
        track_initialised: bool = False,
    ) -> Region:
        """Make an allocation known.

        A range inside a known region returns that region: views of one storage share it. A range
        that overlaps known ones otherwise replaces them: the host has freed them since.

        Args:
            data: contiguous array; its bytes are the allocation's.
            base: the address that programs know it by (default: where the array lies).
            writable: whether stores are allowed.
            track_initialised: report reads of bytes that no simulated store has written.

        Raises:
            InvalidArgumentError: ``data`` is not contiguous, or the address is in another space.
        """
        if not data.flags.c_contiguous:
            raise InvalidArgumentError(
                "a memory region must be contiguous", got=f"strides {data.strides}"
            )
        flat = data.reshape(-1).view(np.uint8)
        base = int(flat.ctypes.data if base is None else base)
        if base < SHARED_WINDOW_END or base + flat.nbytes > min(PARAM_BASE, LOCAL_BASE):
            raise InvalidArgumentError(
                "a memory region lies in another state space's addresses",
                got=f"{flat.nbytes} bytes at {base:#x}",
                expected=f"addresses from {SHARED_WINDOW_END:#x} to {PARAM_BASE:#x}",
            )
        known = self.find(base, flat.nbytes)
        if known is not None:
            known.writable = known.writable or writable
            return known
        for stale in [r for r in self._regions if r.base < base + flat.nbytes and base < r.end]:
            self.unregister(stale)
        shadow = np.zeros(flat.nbytes, np.uint8) if track_initialised else None
        region = Region(base, flat, name, writable, shadow)
        region.private = self._shared_by is not None
        index = bisect.bisect(self._bases, base)
        self._bases.insert(index, base)
        self._regions.insert(index, region)
        self._unknown.clear()
        return region

    def unregister(self, region: Region) -> None:
        """Forget a region; later accesses to it are out of bounds."""
        index = self._regions.index(region)
        del self._regions[index], self._bases[index]
        if self._last is region:
            self._last = None

    def find(self, address: int, nbytes: int = 1) -> Region | None:
        """The region that holds all of ``[address, address + nbytes)``; asks no resolver."""
        last = self._last
        if last is not None and last.base <= address and address + nbytes <= last.end:
            return last
        index = bisect.bisect(self._bases, address) - 1
        if index >= 0:
            region = self._regions[index]
            if address + nbytes <= region.end:
                self._last = region
                return region
        return None

    def resolve(self, address: int, nbytes: int = 1) -> Region | None:
        """As :meth:`find`, and ask the resolver about an address in no region."""
        region = self.find(address, nbytes)
        if region is not None or self.resolver is None or address in self._unknown:
            return region
        if self.find(address) is None and self.resolver(address) is not None:
            return self.find(address, nbytes)
        if len(self._unknown) > 4096:
            self._unknown.clear()
        self._unknown.add(address)
        return None

    def gather(
        self, addresses: np.ndarray, nbytes: int, mask: np.ndarray | None, fault: Fault
    ) -> np.ndarray:
        """Read ``nbytes`` at each lane's address.

        Args:
            addresses: uint64, any shape.
            nbytes: 1, 2, 4, 8, 16 or 32; addresses must be multiples of it.
            mask: the lanes that read; None: all.
            fault: told about lanes that read out of bounds, misaligned or uninitialised.

        Returns:
            array of ``WORDS[nbytes]`` shaped as ``addresses``; poison in faulty lanes, anything in
            inactive ones.
        """
        where = addresses if mask is None else _fill_inactive(addresses, mask)
        region = self._single(where, nbytes)
        if region is None:
            return self._gather_split(addresses, nbytes, mask, fault)
        view, origin = region.words(nbytes)
        index = _index(where, origin, nbytes)
        if region.initialised is not None:
            _check_initialised(region, index, nbytes, mask, addresses, fault)
        return view.take(index)

    def scatter(
        self,
        addresses: np.ndarray,
        nbytes: int,
        values: np.ndarray,
        mask: np.ndarray | None,
        fault: Fault,
    ) -> None:
        """Write each lane's element; of lanes that write the same address the last one wins.

        Args are as for :meth:`gather`; ``values`` has dtype ``WORDS[nbytes]``. Stores of faulty
        lanes are dropped.
        """
        where = addresses
        if mask is not None:
            where, values = addresses[mask], values[mask]
        region = self._single(where, nbytes)
        if region is None or not region.writable or region.private:
            self._scatter_split(addresses, nbytes, values, mask, fault)
            return
        view, origin = region.words(nbytes)
        index = _index(where, origin, nbytes)
        view[index] = values
        if region.initialised is not None:
            region.shadow(nbytes)[index] = _ones(nbytes)

    def _single(self, addresses: np.ndarray, nbytes: int) -> Region | None:
        """The region that holds every access, all of them aligned; None otherwise."""
        if nbytes > 1 and int(np.bitwise_or.reduce(addresses, axis=None)) & (nbytes - 1):
            return None
        low = int(addresses.min())
        return self.resolve(low, int(addresses.max()) + nbytes - low)

    def locate(
        self, addresses: np.ndarray, nbytes: int, mask: np.ndarray | None, fault: Fault
    ) -> list[tuple[Region, np.ndarray]]:
        """Sort lanes by region, reporting those that are misaligned or in none.

        Returns:
            (region, lanes) pairs; ``lanes`` is a bool array shaped as ``addresses``.
        """
        left = np.ones(addresses.shape, bool) if mask is None else mask.copy()
        wrong = left & (addresses % np.uint64(nbytes) != 0)
        if wrong.any():
            bad = int(addresses[wrong][0])
            text = f"{nbytes}-byte access at {bad:#x}, {bad % nbytes} bytes past a multiple"
            fault("global-misaligned", text, wrong, addresses)
            left &= ~wrong
        parts: list[tuple[Region, np.ndarray]] = []
        lost = np.zeros_like(left)
        while left.any():
            address = int(addresses[left].min())
            region = self.resolve(address, nbytes)
            if region is None:
                lanes = left & (addresses == np.uint64(address))
                lost |= lanes
            else:
                last = np.uint64(region.end - nbytes)
                lanes = left & (addresses >= np.uint64(region.base)) & (addresses <= last)
                parts.append((region, lanes))
            left &= ~lanes
        if lost.any():
            text = self.describe(int(addresses[lost][0]), nbytes)
            fault("global-out-of-bounds", text, lost, addresses)
        return parts

    def writable_words(
        self, addresses: np.ndarray, nbytes: int, mask: np.ndarray | None, fault: Fault
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Where each lane is about to write, region by region; reports those that may not.

        Returns:
            (view, index, lanes): elements of ``nbytes``, the element number of each lane of
            ``lanes`` (bool, shaped as ``addresses``), in lane order.
        """
        out = []
        for region, lanes in self.locate(addresses, nbytes, mask, fault):
            if self._may_write(region, nbytes, lanes, addresses, fault):
                view, origin = region.words(nbytes)
                index = _index(addresses[lanes], origin, nbytes)
                if region.initialised is not None:
                    region.shadow(nbytes)[index] = _ones(nbytes)
                out.append((view, index, lanes))
        return out

    def describe(self, address: int, nbytes: int) -> str:
        """A sentence on an access outside every region: the nearest region and the distance."""
        text = f"{nbytes}-byte access at {address:#x}"
        if not self._regions:
            return f"{text}; no global memory is known"

        def distance(region: Region) -> int:
            return max(region.base - address, address + nbytes - region.end, 0)

        near = min(self._regions, key=distance)
        if address < near.base:
            side = f"{near.base - address} bytes before the start"
        else:
            side = f"{address + nbytes - near.end} bytes past the end"
        return f"{text}: {side} of {near.name} ({near.nbytes} bytes at {near.base:#x})"

    def _gather_split(
        self, addresses: np.ndarray, nbytes: int, mask: np.ndarray | None, fault: Fault
    ) -> np.ndarray:
        out = poison(addresses.shape, nbytes)
        for region, lanes in self.locate(addresses, nbytes, mask, fault):
            view, origin = region.words(nbytes)
            index = _index(addresses[lanes], origin, nbytes)
            if region.initialised is not None:
                safe = np.where(lanes, addresses, addresses[lanes][0])
                _check_initialised(
                    region, _index(safe, origin, nbytes), nbytes, lanes, addresses, fault
                )
            out[lanes] = view.take(index)
        return out

    def _scatter_split(
        self,
        addresses: np.ndarray,
        nbytes: int,
        values: np.ndarray,
        mask: np.ndarray | None,
        fault: Fault,
    ) -> None:
        full = values
        if mask is not None:
            full = np.zeros(addresses.shape, WORDS[nbytes])
            full[mask] = values
        for view, index, lanes in self.writable_words(addresses, nbytes, mask, fault):
            view[index] = full[lanes]

    @staticmethod
    def _may_write(
        region: Region, nbytes: int, lanes: np.ndarray, addresses: np.ndarray, fault: Fault
    ) -> bool:
        """Whether stores to the region are allowed; reports those that are not."""
        if not region.writable:
            text = f"{nbytes}-byte store to {region.name}, which is read-only"
            fault("global-read-only-write", text, lanes, addresses)
            return False
        if region.private:
            raise CuteFAError(
                "a worker process wrote to memory that was found only after it began",
                got=f"a store to {region.name} ({region.nbytes} bytes at {region.base:#x})",
                fix="run with workers=1, or register the memory before the launch",
            )
        return True

    def share(self) -> None:
        """Move every writable region into memory that forked processes share.

        Addresses stay as they are; :meth:`copy_back` ends it. Regions registered in between belong
        to the process that registers them, and stores to them are refused.
        """
        if self._shared_by is not None:
            raise RuntimeError("the memory is shared already")
        self._shared_by = os.getpid()
        for region in self._regions:
            if not region.writable or region.nbytes == 0:
                continue
            region._original = region.data
            region._original_initialised = region.initialised
            shadow = region.initialised
            region.replace_data(
                _shared_copy(region.data, region.base),
                None if shadow is None else _shared_copy(shadow, region.base),
            )

    def copy_back(self) -> None:
        """Bring what was written since :meth:`share` back into the regions' own arrays."""
        if self._shared_by is None:
            raise RuntimeError("the memory is not shared")
        self._shared_by = None
        for region in self._regions:
            region.private = False
            if region._original is None:
                continue
            region._original[...] = region.data
            if region._original_initialised is not None:
                region._original_initialised[...] = region.initialised
            region.replace_data(region._original, region._original_initialised)
            region._original = region._original_initialised = None


def _shared_copy(array: np.ndarray, base: int) -> np.ndarray:
    """A copy in an anonymous shared mapping, aligned as the addresses are."""
    skip = base % SECTOR_BYTES
    mapping = mmap.mmap(-1, array.nbytes + skip)
    out = np.frombuffer(mapping, np.uint8)[skip : skip + array.nbytes]
    out[...] = array
    return out


def _index(addresses: np.ndarray, origin: int, nbytes: int) -> np.ndarray:
    """Element numbers of aligned addresses, as intp."""
    offset = np.subtract(addresses, np.uint64(origin)).view(np.int64)
    return offset if nbytes == 1 else offset >> (nbytes.bit_length() - 1)


def _fill_inactive(addresses: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Addresses with those of inactive lanes replaced by an active lane's."""
    return np.where(mask, addresses, addresses[np.unravel_index(mask.argmax(), mask.shape)])


def _ones(nbytes: int) -> np.ndarray | np.void | np.generic:
    """An element of ``WORDS[nbytes]`` with 1 in each byte."""
    return np.ones(nbytes, np.uint8).view(WORDS[nbytes])[0]


def _check_initialised(
    region: Region,
    index: np.ndarray,
    nbytes: int,
    mask: np.ndarray | None,
    addresses: np.ndarray,
    fault: Fault,
) -> None:
    """Report lanes that read bytes of ``region`` which no store has written."""
    flags = region.shadow(nbytes).take(index)
    good = np.asarray(flags.view(np.uint8).reshape(*index.shape, nbytes).all(axis=-1))
    if mask is not None:
        good |= ~mask
    if not good.all():
        text = f"{nbytes}-byte read of {region.name}, which was not written there"
        fault("uninitialised-global-read", text, np.logical_not(good), addresses)


def count_sectors(addresses: np.ndarray, mask: np.ndarray | None) -> int:
    """Distinct 32-byte sectors per warp, summed over the warps of aligned ``(w, c, 32)``."""
    sectors = addresses >> np.uint64(5)
    if mask is not None:
        sectors = np.where(mask, sectors, np.uint64(0xFFFF_FFFF_FFFF_FFFF))
    steps = sectors[..., 1:] != sectors[..., :-1]
    if (sectors[..., 1:] < sectors[..., :-1]).any():
        sectors = np.sort(sectors, axis=-1)
        steps = sectors[..., 1:] != sectors[..., :-1]
    total = int(np.count_nonzero(steps)) + sectors[..., 0].size
    if mask is not None:
        total -= int(np.count_nonzero(~mask.all(axis=-1)))
    return total
