"""Launches: waves, order, processes, counters, refusals."""

import os

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.errors import InvalidArgumentError
from cute_fa.sim import execute as execute_module
from cute_fa.sim.execute import execute, is_ordered, plan_waves
from cute_fa.sim.hazards import HazardError
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.program import prepare
from cute_fa.sim.wave import LaunchConfig, SimOptions
from tests.sim.tiny import run

HEADER = """
.version 8.8
.target sm_90a
.address_size 64
"""


def module(body, params=".param .u64 out", directives=""):
    return ptx.parse(
        f"""{HEADER}
        .visible .entry k({params}) {directives}
        {{
        .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>;
        {body}
        ret;
        }}
        """
    )


def config(grid, block=(32, 1, 1), cluster=(1, 1, 1), **rest):
    return LaunchConfig("k", grid, block, cluster, **rest)


def waves(grid, block=(32, 1, 1), cluster=(1, 1, 1), body="", smem_bytes=0, **options):
    parsed = module(body)
    launch = config(grid, block, cluster, smem_bytes=smem_bytes)
    return plan_waves(prepare(parsed, "k"), launch, SimOptions(**options))


# --- waves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 3, 2), (1, 100, 1), (300, 1, 1)])
@pytest.mark.parametrize("threads", [32, 100, 128, 1024])
def test_every_cta_runs_once(grid, threads):
    planned = waves(grid, (threads, 1, 1))
    everything = np.concatenate(planned)
    assert sorted(map(tuple, everything)) == sorted(np.ndindex(*grid))
    warps = -(-threads // 32)
    assert all(len(ids) * warps * 32 <= 2048 for ids in planned)
    assert max(map(len, planned)) - min(map(len, planned)) <= len(planned)


def test_ctas_of_one_column_are_neighbours():
    planned = waves((4, 4, 4), (128, 1, 1))
    assert [sorted({int(x) for x, _, _ in ids}) for ids in planned] == [[0], [1], [2], [3]]


def test_clusters_stay_together_in_rank_order():
    planned = waves((4, 6, 2), (512, 1, 1), cluster=(2, 3, 1))
    for ids in planned:
        assert len(ids) % 6 == 0
        for cluster in ids.reshape(-1, 6, 3):
            corner = cluster[0]
            assert (corner % (2, 3, 1) == 0).all()
            offsets = [(x, y, 0) for y in range(3) for x in range(2)]
            assert (cluster - corner == offsets).all()


def test_the_number_of_resident_ctas_is_limited_on_request_and_by_memory():
    assert all(len(ids) <= 3 for ids in waves((20, 1, 1), max_resident_ctas=3))
    assert len(waves((20, 1, 1), max_resident_ctas=1, cluster=(2, 1, 1))) == 10
    few = waves((64, 1, 1), (32, 1, 1), smem_bytes=200 << 10)
    assert all(len(ids) * (200 << 10) * 3 <= execute_module.WAVE_BYTES for ids in few)


@pytest.mark.parametrize(
    "instruction, ordered",
    [
        ("add.s32 %r1, %r1, 1;", False),
        ("atom.shared.add.u32 %r1, [%r2], 1;", False),
        ("ld.global.b32 %r1, [%rd1];", False),
        ("atom.global.add.u32 %r1, [%rd1], 1;", True),
        ("red.release.gpu.global.add.s32 [%rd1], %r1;", True),
        ("ld.acquire.gpu.global.b32 %r1, [%rd1];", True),
    ],
)
def test_kernels_whose_ctas_may_meet_in_global_memory_run_in_grid_order(instruction, ordered):
    kernel = module(instruction).kernels["k"]
    assert is_ordered(kernel) is ordered
    planned = waves((2, 3, 1), (1024, 1, 1), body=instruction, max_resident_ctas=1)
    first_column = [tuple(int(i) for i in ids[0]) for ids in planned[:2]]
    assert first_column == ([(0, 0, 0), (1, 0, 0)] if ordered else [(0, 0, 0), (0, 1, 0)])


def test_a_semaphore_between_ctas_is_passed_on_in_grid_order():
    """Each CTA waits until the one before it has added its number."""
    body = """
        mov.u32 %r3, %ctaid.x; setp.ne.b32 %p1, %tid, 0; @%p1 bra DONE;
        SPIN: ld.acquire.gpu.global.b32 %r4, [%in0]; setp.ne.b32 %p2, %r4, %r3; @%p2 bra SPIN;
        red.release.gpu.global.add.u32 [%in0], 1;
        DONE: st.global.b32 [%out], %r3;
    """
    for resident in (1, 4, None):
        result = run(body, threads=64, ctas=12, max_resident_ctas=resident, strict=True)
        assert (result.out[:, 0] == np.arange(12 * 64) // 64).all()


# --- results do not depend on how a launch is cut up ----------------------------------------------

WORK = """
    ld.global.b32 %r3, [%in]; mov.b32 %r4, 0; and.b32 %r6, %index, 15;
    LOOP: mad.lo.s32 %r3, %r3, 1664525, 1013904223; add.s32 %r4, %r4, 1;
    setp.le.u32 %p1, %r4, %r6; @%p1 bra LOOP;
    cvt.rn.f32.u32 %r7, %r3; mul.f32 %r7, %r7, 0f2F800000; ex2.approx.ftz.f32 %r7, %r7;
    shl.b32 %r8, %tid, 2; add.s32 %r8, %r8, %smem; st.shared.b32 [%r8], %r7;
    bar.sync 0;
    xor.b32 %r9, %tid, 33; shl.b32 %r9, %r9, 2; add.s32 %r9, %r9, %smem; ld.shared.b32 %r5, [%r9];
    st.global.b32 [%out], %r5;
"""


def work(**options):
    data = np.arange(24 * 64, dtype=np.uint32)
    return run(WORK, data, threads=64, ctas=24, strict=True, **options)


def test_results_and_counters_do_not_depend_on_the_wave_size():
    whole = work()
    assert whole.launch.waves == 1
    for resident in (1, 3, 7):
        part = work(max_resident_ctas=resident)
        assert part.launch.waves == -(-24 // resident)
        assert (part.out == whole.out).all()
        assert part.launch.counters == whole.launch.counters


@pytest.mark.parametrize("workers", [2, 3])
def test_results_and_counters_do_not_depend_on_the_processes(workers, monkeypatch):
    alone = work(max_resident_ctas=2)
    monkeypatch.setattr(execute_module, "FORK_SECONDS", 0.0)
    forked = work(max_resident_ctas=2, workers=workers)
    assert (alone.launch.processes, forked.launch.processes) == (1, workers)
    assert (forked.out == alone.out).all()
    assert forked.launch.counters == alone.launch.counters


def test_random_completion_does_not_depend_on_the_processes(monkeypatch):
    alone = work(completion="random", seed=3)
    monkeypatch.setattr(execute_module, "FORK_SECONDS", 0.0)
    assert (work(completion="random", seed=3, workers=2).out == alone.out).all()


def test_hazards_of_other_processes_arrive(monkeypatch):
    body = """
        mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 7; @%p1 trap; st.global.b32 [%out], %r3;
    """
    monkeypatch.setattr(execute_module, "FORK_SECONDS", 0.0)
    options = {"threads": 64, "ctas": 12, "max_resident_ctas": 1, "workers": 2}
    lenient = run(body, **options)
    assert lenient.launch.processes == 2
    assert lenient.rules == ["trap"]
    assert lenient.launch.hazards[0].cta == (7, 0, 0)
    with pytest.raises(HazardError) as caught:
        run(body, strict=True, **options)
    assert caught.value.hazard.cta == (7, 0, 0)
    assert caught.value.launch.ctas == 12


def test_a_process_that_dies_is_reported(monkeypatch):
    parent = os.getpid()
    original = execute_module._Runner.run

    def fail_elsewhere(self, index, ids):
        if os.getpid() != parent:
            raise RuntimeError("out of luck")
        return original(self, index, ids)

    monkeypatch.setattr(execute_module, "FORK_SECONDS", 0.0)
    monkeypatch.setattr(execute_module._Runner, "run", fail_elsewhere)
    with pytest.raises(Exception, match="out of luck"):
        work(max_resident_ctas=2, workers=2)
    monkeypatch.undo()
    assert work(max_resident_ctas=2).launch.ctas == 24  # and the next launch is fine


# --- counters -------------------------------------------------------------------------------------


def test_counters_are_the_closed_forms():
    body = """
        mov.b32 %r4, 0; ld.global.b32 %r3, [%in];
        LOOP: ex2.approx.ftz.f32 %r3, %r3; fma.rn.f32 %r3, %r3, %r3, %r3;
        add.s32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 10; @%p1 bra LOOP;
        setp.lt.u32 %p2, %lane, 8; @%p2 bra MORE; bra DONE;
        MORE: ex2.approx.ftz.f32 %r3, %r3;
        DONE: st.global.b32 [%out], %r3; bar.sync 0;
    """
    threads, ctas = 96, 5
    counters = run(body, threads=threads, ctas=ctas, strict=True).launch.counters
    lanes, warps = threads * ctas, threads // 32 * ctas
    assert counters.exponentials == 10 * lanes + 8 * warps
    assert counters.fmas == 10 * lanes
    classes = counters.by_class("warp_instructions")
    assert classes["fma"] == 10 * warps
    assert classes["mufu"] == 11 * warps
    assert classes["st_global"] == warps
    assert sum(classes.values()) == counters.warp_instructions
    assert counters.global_bytes_read == counters.global_bytes_written == 4 * lanes
    assert counters.barrier_waits == warps
    assert counters.as_dict()["exponentials"] == counters.exponentials


def test_counters_add_up():
    one = run("st.global.b32 [%out], %tid;").launch.counters
    two = run("st.global.b32 [%out], %tid;", ctas=2).launch.counters
    one.merge(one)
    assert one == two


# --- what a launch says of itself, and what it refuses --------------------------------------------


def test_a_launch_describes_itself():
    launch = run("st.global.b32 [%out], %tid;", threads=64, ctas=3, smem_bytes=2048).launch
    assert (launch.kernel, launch.grid, launch.block) == ("tiny", (3, 1, 1), (64, 1, 1))
    assert (launch.cluster, launch.smem_bytes, launch.ctas) == ((1, 1, 1), 2048, 3)
    assert launch.hazards == []
    assert launch.seconds > 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"grid": (0, 1, 1)}, "empty launch"),
        ({"block": (1025, 1, 1)}, "too many threads"),
        ({"block": (64, 1, 1)}, "compiled for"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "whole clusters"),
        ({"params": b"1234"}, "parameter bytes"),
    ],
)
def test_impossible_launches_are_refused(changes, complaint):
    parsed = module("", directives=".reqntid 32, 1, 1")
    settings = {"grid": (2, 1, 1), "params": bytes(8)} | changes
    with pytest.raises(InvalidArgumentError, match=complaint):
        execute(parsed, config(**settings), GlobalMemory(), SimOptions())


def test_unknown_kernels_and_policies_are_refused():
    parsed = module("")
    with pytest.raises(InvalidArgumentError, match="no such kernel"):
        execute(parsed, LaunchConfig("other", (1, 1, 1), (1, 1, 1)), GlobalMemory(), SimOptions())
    with pytest.raises(InvalidArgumentError, match="completion"):
        policy = SimOptions(completion="soon")
        execute(parsed, config((1, 1, 1), params=bytes(8)), GlobalMemory(), policy)


def test_registers_that_were_never_written_are_nan():
    result = run("add.f32 %r5, %r90, 0f3F800000; st.global.b32 [%out], %r5;")
    assert np.isnan(result.out.view(np.float32)).all()
