"""Byte transposition in shared memory, run in the simulator."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cuda.bindings import driver
from cutlass.cute.runtime import from_dlpack

from cute_fa import sim
from cute_fa.blocks.tma import shared_tiles
from cute_fa.blocks.transpose import key_order, transpose_bytes


@cute.kernel
def turn(mV: cute.Tensor, mVt: cute.Tensor, parts: cutlass.Constexpr):
    """mVt (Dv, N / 2) of mV (N, Dv / 2), both pairs of bytes, by way of shared memory."""
    thread, _, _ = cute.arch.thread_idx()
    rows, pairs = mV.shape
    storage = cutlass.memory.SmemAllocator()
    tiles = [
        shared_tiles(
            storage.allocate_array(cutlass.Int16, cute.size(x), byte_alignment=1024), *x.shape, 1, 0
        )[None, None, 0]
        for x in (mV, mVt)
    ]
    for i in range(thread, cute.size(mV), 32 * parts):
        tiles[0][i // pairs, i % pairs] = mV[i // pairs, i % pairs]
    cute.arch.sync_threads()
    transpose_bytes(tiles[0], tiles[1], thread // 32, parts)
    cute.arch.sync_threads()
    for i in range(thread, cute.size(mVt), 32 * parts):
        mVt[i // (rows // 2), i % (rows // 2)] = tiles[1][i // (rows // 2), i % (rows // 2)]


@cute.jit
def launch(mV: cute.Tensor, mVt: cute.Tensor, parts: cutlass.Constexpr, stream: driver.CUstream):
    turn(mV, mVt, parts).launch(grid=(1, 1, 1), block=(32 * parts, 1, 1), stream=stream)


def test_the_order_of_keys_is_what_a_quad_holds_of_an_accumulator() -> None:
    assert sorted(key_order(32)) == list(range(32))
    for t in range(4):
        columns = [8 * j + 2 * t + bit for j in range(4) for bit in range(2)]
        positions = [*range(4 * t, 4 * t + 4), *range(16 + 4 * t, 20 + 4 * t)]
        assert [key_order(32)[k] for k in positions] == columns


@pytest.mark.parametrize(("keys", "dims", "parts"), [(128, 128, 2), (64, 64, 1), (32, 256, 4)])
def test_bytes_are_transposed_in_that_order(keys: int, dims: int, parts: int) -> None:
    v = torch.randint(-128, 128, (keys, dims), dtype=torch.int8)
    out = torch.zeros(dims, keys, dtype=torch.int8)
    with sim.Device("sm_90a") as device:
        arguments = [from_dlpack(x.view(torch.int16)) for x in (v, out)]
        run = cute.compile(launch, *arguments, parts, driver.CUstream(0))
        run(*arguments, driver.CUstream(0))
    assert torch.equal(out, v[key_order(keys)].T)
    assert device.launches[-1].hazards == []
