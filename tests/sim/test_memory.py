"""Global memory: regions, lane-wide access, faults, sharing with worker processes."""

import os

import numpy as np
import pytest

from cute_fa.errors import CuteFAError, InvalidArgumentError
from cute_fa.sim.memory import POISON_HALF, GlobalMemory, count_sectors, poison

SHAPE = (2, 3, 32)


class Faults(list):
    def __call__(self, rule, message, lanes, addresses):
        self.append((rule, message, lanes.copy(), addresses.copy()))


def never(rule, message, lanes, addresses):
    raise AssertionError(f"{rule}: {message}")


def lanes(values):
    return np.asarray(values, np.uint64).reshape(SHAPE)


@pytest.mark.parametrize("nbytes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("skew", [0, 4, 12])
def test_gather_and_scatter_of_every_width(nbytes, skew):
    rng = np.random.default_rng(nbytes)
    backing = rng.integers(0, 256, 32 * 200 + 64, dtype=np.uint8)
    start = -backing.ctypes.data % 64 + skew
    data = backing[start : start + 32 * 196]
    before = data.copy()
    memory = GlobalMemory()
    region = memory.register(data, name="x")
    assert region.base == data.ctypes.data
    first = region.base + -region.base % nbytes
    addresses = lanes(first + nbytes * rng.permutation(192))
    got = memory.gather(addresses, nbytes, None, never)
    raw = got.reshape(-1).view(np.uint8).reshape(192, nbytes)
    for address, value in zip(addresses.reshape(-1), raw, strict=True):
        offset = int(address) - region.base
        assert (before[offset : offset + nbytes] == value).all()
    fresh = rng.integers(0, 256, got.nbytes, dtype=np.uint8).view(got.dtype).reshape(SHAPE)
    mask = rng.random(SHAPE) < 0.5
    memory.scatter(addresses, nbytes, fresh, mask, never)
    after = memory.gather(addresses, nbytes, None, never)
    assert (after[mask] == fresh[mask]).all()
    assert (after[~mask] == got[~mask]).all()


def test_last_lane_wins_when_lanes_write_the_same_address():
    data = np.zeros(8, np.uint32)
    memory = GlobalMemory()
    base = memory.register(data).base
    values = np.arange(192, dtype=np.uint32).reshape(SHAPE)
    memory.scatter(np.full(SHAPE, base + 8, np.uint64), 4, values, None, never)
    assert data.tolist() == [0, 0, 191, 0, 0, 0, 0, 0]


def test_lanes_in_several_regions():
    a, b = np.arange(192, dtype=np.uint32), np.arange(1000, 1192, dtype=np.uint32)
    memory = GlobalMemory()
    bases = [memory.register(x).base for x in (a, b)]
    which = np.arange(192) % 2
    addresses = lanes([bases[w] + 4 * i for i, w in enumerate(which)])
    got = memory.gather(addresses, 4, None, never).reshape(-1)
    assert (got == np.where(which, b, a)).all()
    memory.scatter(addresses, 4, np.full(SHAPE, 7777, np.uint32), None, never)
    assert ((a == 7777) == (which == 0)).all() and ((b == 7777) == (which == 1)).all()


def test_out_of_bounds_names_the_nearest_region_and_reads_poison():
    data = np.arange(16, dtype=np.uint32)
    memory = GlobalMemory()
    base = memory.register(data, base=1 << 40, name="tensor q").base
    addresses = np.full(SHAPE, base, np.uint64)
    addresses[1, 2, 5] = base + 64
    addresses[0, 0, 3] = base - 4
    faults = Faults()
    got = memory.gather(addresses, 4, None, faults)
    ((rule, message, bad, _),) = faults
    assert rule == "global-out-of-bounds"
    assert "4 bytes before the start of tensor q" in message
    assert np.argwhere(bad).tolist() == [[0, 0, 3], [1, 2, 5]]
    assert got[1, 2, 5] == POISON_HALF * 0x10001 and got[0, 0, 0] == 0
    assert np.isnan(got[1, 2, 5].view(np.float32))
    faults.clear()
    memory.scatter(addresses, 4, np.full(SHAPE, 9, np.uint32), ~bad, never)
    memory.scatter(addresses, 4, np.full(SHAPE, 8, np.uint32), bad, faults)
    assert data.tolist() == [9, *range(1, 16)] and len(faults) == 1


def test_an_access_that_straddles_the_end_is_out_of_bounds():
    memory = GlobalMemory()
    base = memory.register(np.zeros(24, np.uint8), base=1 << 40, name="odd").base
    faults = Faults()
    memory.gather(np.full(SHAPE, base + 16, np.uint64), 16, None, faults)
    assert faults[0][0] == "global-out-of-bounds"
    assert "8 bytes past the end of odd" in faults[0][1]


def test_inactive_lanes_may_hold_wild_addresses():
    data = np.arange(192, dtype=np.uint32)
    memory = GlobalMemory()
    base = memory.register(data).base
    mask = np.zeros(SHAPE, bool)
    mask[1, 0, :4] = True
    addresses = np.full(SHAPE, 3, np.uint64)
    addresses[mask] = base + 4 * np.arange(4, dtype=np.uint64)
    assert memory.gather(addresses, 4, mask, never)[mask].tolist() == [0, 1, 2, 3]


def test_misaligned_access_is_a_fault():
    memory = GlobalMemory()
    base = memory.register(np.zeros(64, np.uint32), base=1 << 40).base
    faults = Faults()
    addresses = np.full(SHAPE, base, np.uint64)
    addresses[0, 1, 2] += np.uint64(8)
    memory.gather(addresses, 16, None, faults)
    assert [f[0] for f in faults] == ["global-misaligned"]
    assert np.argwhere(faults[0][2]).tolist() == [[0, 1, 2]]
    memory.gather(addresses, 8, None, never)


def test_read_only_regions_refuse_stores():
    data = np.zeros(4, np.uint32)
    memory = GlobalMemory()
    base = memory.register(data, writable=False, name="weights").base
    faults = Faults()
    memory.scatter(np.full(SHAPE, base, np.uint64), 4, np.ones(SHAPE, np.uint32), None, faults)
    assert faults[0][0] == "global-read-only-write" and "weights" in faults[0][1]
    assert not data.any()


def test_uninitialised_reads_are_found_and_stores_clear_them():
    memory = GlobalMemory()
    data = np.zeros(256, np.uint32)
    base = memory.register(data, track_initialised=True, name="workspace").base
    addresses = lanes(base + 4 * np.arange(192))
    mask = np.zeros(SHAPE, bool)
    mask[0] = True
    memory.scatter(addresses, 4, np.ones(SHAPE, np.uint32), mask, never)
    memory.gather(addresses, 4, mask, never)
    faults = Faults()
    memory.gather(addresses, 4, None, faults)
    assert faults[0][0] == "uninitialised-global-read"
    assert (faults[0][2] == ~mask).all()


def test_the_resolver_is_asked_about_unknown_addresses_once():
    late = np.arange(192, dtype=np.uint32)
    asked = []

    def resolver(address):
        asked.append(address)
        if address >= late.ctypes.data:
            return memory.register(late, name="late")
        return None

    memory = GlobalMemory(resolver)
    addresses = lanes(late.ctypes.data + 4 * np.arange(192))
    assert (memory.gather(addresses, 4, None, never).reshape(-1) == late).all()
    assert (memory.gather(addresses, 4, None, never).reshape(-1) == late).all()
    assert asked == [late.ctypes.data]
    faults = Faults()
    for _ in range(3):
        memory.gather(np.full(SHAPE, 1 << 33, np.uint64), 4, None, faults)
    assert asked == [late.ctypes.data, 1 << 33] and len(faults) == 3


def test_registering_a_part_of_a_region_returns_the_region_and_stale_ones_go():
    data = np.zeros(1024, np.uint8)
    memory = GlobalMemory()
    whole = memory.register(data, base=1 << 40)
    assert memory.register(data[64:128], base=(1 << 40) + 64) is whole
    other = memory.register(np.zeros(1024, np.uint8), base=(1 << 40) + 512)
    assert memory.regions == (other,)
    with pytest.raises(InvalidArgumentError, match="another state space"):
        memory.register(data, base=1 << 20)
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        memory.register(data[::2])


def test_shared_memory_reaches_the_parent_process():
    data, constant = np.zeros(192, np.uint32), np.arange(4, dtype=np.uint32)
    memory = GlobalMemory()
    base = memory.register(data, track_initialised=True).base
    memory.register(constant, writable=False)
    addresses = lanes(base + 4 * np.arange(192))
    memory.share()
    pid = os.fork()
    if pid == 0:
        memory.scatter(addresses, 4, np.full(SHAPE, 5, np.uint32), None, never)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert not data.any()
    memory.copy_back()
    assert (data == 5).all()
    memory.gather(addresses, 4, None, never)
    memory.scatter(addresses, 4, np.full(SHAPE, 6, np.uint32), None, never)
    assert (data == 6).all()


def test_memory_found_while_shared_cannot_be_written():
    memory = GlobalMemory()
    memory.share()
    base = memory.register(np.zeros(4, np.uint32)).base
    with pytest.raises(CuteFAError, match="workers=1"):
        memory.scatter(np.full(SHAPE, base, np.uint64), 4, np.ones(SHAPE, np.uint32), None, never)
    memory.copy_back()


def test_sector_counts():
    base = np.uint64(1 << 40)
    lane = np.arange(32, dtype=np.uint64)
    warps = np.zeros((1, 4, 32), np.uint64)
    warps[0, 0] = base + lane * np.uint64(4)  # 128 bytes: 4 sectors
    warps[0, 1] = base + lane * np.uint64(64)  # one each
    warps[0, 2] = base  # one
    warps[0, 3] = base + (lane[::-1] % np.uint64(8)) * np.uint64(16)  # 4, not monotonic
    assert count_sectors(warps, None) == 4 + 32 + 1 + 4
    mask = np.ones((1, 4, 32), bool)
    mask[0, 0, 8:] = False
    mask[0, 1, ::2] = False
    mask[0, 2] = False
    assert count_sectors(warps, mask) == 1 + 16 + 0 + 4


def test_poison_is_a_nan_in_every_float_type():
    assert np.isnan(poison((3,), 4).view(np.float32)).all()
    assert np.isnan(poison((3,), 2).view(np.float16)).all()
    bf16 = poison((3,), 2).astype(np.uint32) << 16
    assert np.isnan(bf16.view(np.float32)).all()
