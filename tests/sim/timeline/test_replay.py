"""The replay of tiny kernels, whose modelled time can be said in advance from the constants."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.timeline import MACHINES, machine_of, replay
from cute_fa.sim.timeline.intervals import logical_intervals
from cute_fa.sim.timeline.replay import SHORT_CYCLES
from tests.sim.test_trace import HANDOVER
from tests.sim.tiny import run

H100 = machine_of("sm_90a")
COUNT = 200


def timeline(body, *, threads=32, ctas=1, replayed=((0, 0, 0),), data=None, **more):
    launch = run(body, data, threads=threads, ctas=ctas, arch="sm_90a", trace=True, **more).launch
    assert launch.hazards == []
    return replay(launch.trace, replayed, H100)


def repeated(line):
    return "\n".join(line.format(d=10 + i % 64) for i in range(COUNT))


def about(cycles):
    """The frame around a body is a dozen instructions and their latencies."""
    return pytest.approx(cycles, abs=100)


@pytest.mark.parametrize(
    ("line", "cycles"),
    [
        ("fma.rn.f32 %r{d}, %r3, %r4, %r5;", 1),  # one issue slot each
        ("max.f32 %r{d}, %r3, %r4;", 2),  # 64 results per cycle and SM
        ("ex2.approx.ftz.f32 %r{d}, %r3;", 8),  # 16
        ("mov.b32 %r{d}, %r3;", 0),
        ("fma.rn.f32 %r6, %r6, %r4, %r5;", H100.latency["fma"]),  # each waits for the one before
    ],
)
def test_one_warp_takes_what_the_unit_takes(line, cycles):
    assert timeline(repeated(line)).cycles == about(cycles * COUNT)


@pytest.mark.parametrize(("warps", "share"), [(1, 1), (4, 1), (8, 2), (16, 4)])
def test_warps_share_their_scheduler(warps, share):
    """Warp w belongs to scheduler w % 4, which issues one instruction per cycle."""
    got = timeline(repeated("fma.rn.f32 %r{d}, %r3, %r4, %r5;"), threads=32 * warps)
    assert got.cycles == pytest.approx(share * COUNT, abs=150 * share)


def test_ctas_share_the_sm():
    body = repeated("ex2.approx.ftz.f32 %r{d}, %r3;")
    alone = timeline(body, ctas=2)
    both = timeline(body, ctas=2, replayed=((0, 0, 0), (1, 0, 0)))
    assert both.cycles == pytest.approx(2 * alone.cycles, rel=0.1)
    assert alone.units["mufu"] == pytest.approx(0.25, abs=0.02)  # of four schedulers, one works


def test_a_wait_ends_when_the_copy_has_landed():
    got = timeline(HANDOVER, threads=64, data=np.arange(64, dtype=np.uint8))
    (copy,) = [one for one in got.intervals if one.lane == "copies"]
    assert copy.length == H100.copy_latency + 64 / H100.copy_bytes
    waits = [one for one in got.intervals if one.lane == "warp 1" and "mbarrier" in one.detail]
    landed = copy.stop + H100.mbarrier_latency
    assert [one.stop for one in waits] == [pytest.approx(landed, abs=SHORT_CYCLES)]
    assert all(one.stop >= landed for one in waits)
    (meet,) = [one for one in got.intervals if one.lane == "warp 0" and one.detail == "barrier 3"]
    assert meet.stop > waits[0].stop


def test_named_barriers_wait_for_the_last_warp():
    slow = repeated("ex2.approx.ftz.f32 %r{d}, %r3;")
    body = f"setp.eq.u32 %p1, %warp, 0;\n@!%p1 bra MEET;\n{slow}\nMEET:\nbar.sync 1, 64;"
    got = timeline(body, threads=64)
    (wait,) = [one for one in got.intervals if one.what == "wait" and one.lane == "warp 1"]
    assert wait.length == about(8 * COUNT)
    assert not [one for one in got.intervals if one.what == "wait" and one.lane == "warp 0"]


def products(groups):
    """Groups of four wgmma m64n8k16 on one accumulator, each waited for."""
    d = "{%r10, %r11, %r12, %r13}"
    one = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {d}, %rd1, %rd2, 1, 1, 1, 0, 0;"
    lines = ["cvt.u64.u32 %rd1, %smem;", "shr.u64 %rd1, %rd1, 4;", "or.b64 %rd1, %rd1, 65536;"]
    lines += ["mov.b64 %rd2, %rd1;", *(f"mov.b32 %r{i}, 0;" for i in range(10, 14))]
    lines += ["mov.b32 %r20, 0;", "LOOP:", "wgmma.fence.sync.aligned;", *[one] * 4]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    lines += ["add.u32 %r20, %r20, 1;", f"setp.lt.u32 %p1, %r20, {groups};", "@%p1 bra LOOP;"]
    return "\n".join(lines)


def test_products_take_the_tensor_core_one_after_another():
    """64 x 8 x 16 multiply-adds; B's 8 rows and A's 64 of 32 bytes bound it: 2304 bytes."""
    groups = 50
    product = max(2 * 64 * 8 * 16 / 4096, (8 + 64) * 32 / 128)
    one = timeline(products(groups), threads=128, checks=False)
    tensor = [i for i in one.intervals if i.lane == "tensor core"]
    assert sum(i.length for i in tensor) == pytest.approx(4 * groups * product, rel=0.05)
    assert one.cycles > groups * (4 * product + H100.tensor_latency)
    two = timeline(products(groups), threads=256, checks=False)
    assert two.cycles < 1.9 * one.cycles  # one waits while the other's products run
    assert two.units["tensor core"] > 1.3 * one.units["tensor core"]


def test_roles_share_out_the_time():
    slow = repeated("ex2.approx.ftz.f32 %r{d}, %r3;")
    body = f"setp.eq.u32 %p1, %warp, 0;\n@!%p1 bra MEET;\n{slow}\nMEET:\nbar.sync 1, 64;"
    roles = timeline(body, threads=64).roles({"maths": range(1), "idle": range(1, 2)})
    assert roles["maths"]["softmax"] > 0.9
    assert roles["idle"]["wait"] > 0.9
    for shares in roles.values():
        assert sum(shares.values()) <= 1.0 + 1e-9


def test_what_cannot_be_replayed_is_refused():
    launch = run("", ctas=2, trace=True, arch="sm_90a", max_resident_ctas=1).launch
    with pytest.raises(InvalidArgumentError, match="did not run in one wave"):
        replay(launch.trace, [(0, 0, 0), (1, 0, 0)], H100)
    with pytest.raises(InvalidArgumentError, match="no CTA"):
        replay(launch.trace, [], H100)
    with pytest.raises(KeyError):
        replay(launch.trace, [(5, 0, 0)], H100)
    with pytest.raises(InvalidArgumentError, match="no machine model"):
        machine_of("sm_86")


def test_peaks_are_the_data_sheets():
    peaks = {"sm_80": 312, "sm_90a": 989.4, "sm_100a": 2250}
    for arch, tflops in peaks.items():
        assert MACHINES[arch].peak_tflops == pytest.approx(tflops, rel=0.01)


def test_the_logical_clock_orders_and_does_not_measure():
    data = np.arange(64, dtype=np.uint8)
    launch = run(HANDOVER, data, threads=64, arch="sm_90a", trace=True, completion="late").launch
    intervals = logical_intervals(launch.trace, (0, 0, 0))
    (copy,) = [one for one in intervals if one.lane == "copies"]
    waits = [one for one in intervals if one.lane == "warp 1" and one.what == "wait"]
    assert any(one.start <= copy.stop <= one.stop for one in waits)
    assert all(one.stop > one.start for one in intervals)
