"""What ``trace=True`` keeps, and instruction counts by warp and role."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.trace_events import Event
from tests.sim.tiny import run

# Warp 0 initialises a barrier for one arrival and announces 64 bytes; warp 1 waits for them. All
# meet at the named barrier 3 at the end.
HANDOVER = """
setp.ne.u32 %p1, %tid, 0;
@%p1 bra READY;
mbarrier.init.shared.b64 [smem], 1;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
setp.eq.u32 %p2, %warp, 0;
@!%p2 bra WAIT;
@%p1 bra MEET;
mbarrier.arrive.expect_tx.shared.b64 _, [smem], 64;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem+64], [%in0], 64, [%smem];
bra MEET;
WAIT:
mbarrier.try_wait.parity.shared.b64 %p3, [smem], 0;
@!%p3 bra WAIT;
fma.rn.f32 %r3, %r4, %r5, %r6;
MEET:
bar.sync 3, 64;
"""
BARRIER = (0, 1024)  # slot 0, the first byte of shared memory


def handover(**options):
    data = np.arange(64, dtype=np.uint8)
    return run(HANDOVER, data, threads=64, arch="sm_90a", **options).launch


def events(launch, warp):
    steps = launch.trace.warp_steps((0, 0, 0), warp)
    return [event for step in steps for found in step.events.values() for event in found]


def test_events_of_each_warp_in_order():
    launch = handover(trace=True)
    assert launch.hazards == []
    sync = Event("sync", (0, 0), count=64)
    meet = Event("sync", (0, 3), count=64)
    assert events(launch, 0) == [
        Event("init", BARRIER, count=1),
        sync,
        Event("arrive", BARRIER, count=1, nbytes=64),
        Event("load", BARRIER, nbytes=64, tile=1024 + 64),
        meet,
    ]
    assert events(launch, 1) == [sync, Event("wait", BARRIER, parity=0), meet]


@pytest.mark.parametrize("completion", ["late", "random"])
def test_tries_that_fail_are_left_out(completion):
    """Whatever the order, a wait counts once: when it succeeds."""
    for seed in range(4):
        launch = handover(trace=True, completion=completion, seed=seed)
        assert [event.kind for event in events(launch, 1)] == ["sync", "wait", "sync"]


def test_steps_are_the_warps_own_path():
    launch = handover(trace=True)
    trace = launch.trace
    body = trace.kernel.body
    first = [0, *(block.last + 1 for block in trace.program.blocks)]

    def texts(warp):
        steps = trace.warp_steps((0, 0, 0), warp)
        clocks = [step.clock for step in steps]
        assert clocks == sorted(set(clocks))
        spans = [(first[step.block], trace.program.blocks[step.block].last + 1) for step in steps]
        return [body[i].op for start, stop in spans for i in range(start, stop)]

    assert "fma" in texts(1) and "cp" not in texts(1)
    assert "cp" in texts(0) and "fma" not in texts(0)
    assert trace.ctas() == [(0, 0, 0)]
    with pytest.raises(KeyError):
        trace.find((1, 0, 0))


def test_executed_and_addresses():
    launch = handover(trace=True)
    trace = launch.trace
    body = trace.kernel.body
    unreached = [instr.opcode for instr in body if instr.index not in trace.executed()]
    assert unreached == []
    places = {body[index].opcode: found for index, found in trace.shared_addresses().items()}
    assert places["mbarrier.try_wait.parity.shared.b64"] == {"barrier": (1024,)}
    copy = next(name for name in places if name.startswith("cp.async.bulk"))
    assert places[copy] == {"barrier": (1024,), "tile": (1088,)}


def test_nothing_is_kept_unless_asked():
    assert handover().trace is None


def test_a_skipped_instruction_has_no_event():
    """A guard that fails means that nothing was done."""
    launch = run("setp.eq.u32 %p1, %tid, 99;\n@%p1 bar.arrive 1, 64;", trace=True).launch
    assert events(launch, 0) == []


def test_counters_of_the_warps_add_up():
    launch = handover()
    by_warp = launch.warps
    assert len(by_warp) == 2
    for name in ("warp_instructions", "warp_instructions.mbarrier", "barrier_waits", "fmas"):
        assert sum(warp[name] for warp in by_warp) == launch.counters[name]
    assert [warp.fmas for warp in by_warp] == [0, 32]


def test_counters_are_summed_over_ctas_and_roles():
    body = "setp.eq.u32 %p1, %warp, 2;\n@!%p1 bra OUT;\nfma.rn.f32 %r3, %r4, %r5, %r6;\nOUT:"
    launch = run(body, threads=96, ctas=5).launch
    roles = launch.by_role({"others": range(2), "worker": range(2, 3)})
    assert roles["worker"].fmas == 5 * 32
    assert roles["others"].fmas == 0
    total = sum(counters.warp_instructions for counters in roles.values())
    assert total == launch.counters.warp_instructions
    with pytest.raises(InvalidArgumentError, match="role late names warps"):
        launch.by_role({"late": range(2, 4)})
