"""Branches, exits, hints and traps."""

import numpy as np
import pytest

from cute_fa.sim.hazards import HazardError
from tests.sim.isa.evaluate import evaluate
from tests.sim.tiny import run


def test_divergent_branches_meet_again():
    a = np.arange(64, dtype=np.uint32)
    body = """
        .reg .pred %q; and.b32 %x, %a, 1; setp.eq.b32 %q, %x, 0; @%q bra EVEN;
        mul.lo.s32 %y, %a, 3; bra.uni JOIN;
        EVEN: add.s32 %y, %a, 1000;
        JOIN: add.s32 %y, %y, 1;
    """
    got = evaluate(body, {"a": ("b32", a)}, {"y": "b32", "x": "b32"})
    assert (got["y"] == np.where(a % 2, 3 * a + 1, a + 1001)).all()


def test_loops_with_a_trip_count_per_lane():
    a = np.arange(96, dtype=np.uint32)
    body = """
        .reg .pred %q; .reg .b32 %i; mov.b32 %x, 0; mov.b32 %i, 0;
        LOOP: setp.ge.u32 %q, %i, %a; @%q bra DONE;
        add.s32 %x, %x, %i; add.s32 %i, %i, 1; bra LOOP;
        DONE:
    """
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32"})
    assert (got["x"] == a * (a - 1) // 2).all()


def test_indirect_branches():
    a = np.arange(33, dtype=np.uint32) % 3
    body = """
        .reg .b32 %i; mov.b32 %i, %a;
        targets: .branchtargets ZERO, ONE, TWO;
        brx.idx %i, targets;
        ZERO: mov.b32 %x, 100; bra END;
        ONE: mov.b32 %x, 200; bra END;
        TWO: mov.b32 %x, 300;
        END:
    """
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32"})
    assert (got["x"] == (a + 1) * 100).all()


@pytest.mark.parametrize("leave", ["exit", "ret"])
def test_lanes_that_leave_write_nothing_more(leave):
    body = f"""
        st.global.b32 [%out], %tid; setp.ge.u32 %p1, %tid, 20; @%p1 {leave};
        mov.b32 %r5, 77; st.global.b32 [%out], %r5;
    """
    result = run(body, threads=64)
    expected = np.where(np.arange(64) >= 20, np.arange(64), 77)
    assert (result.out[:, 0] == expected).all()
    assert result.rules == []


def test_exit_in_a_branch_leaves_the_others_running():
    body = """
        setp.lt.u32 %p1, %tid, 5; @%p1 bra OUT; mov.b32 %r5, 1; st.global.b32 [%out], %r5; bra END;
        OUT: exit;
        END:
    """
    result = run(body)
    assert (result.out[5:, 0] == 1).all()
    assert (result.out[:5, 0] == 0xEEEEEEEE).all()


def test_hints_do_nothing():
    body = """
        .pragma "nounroll";
        prefetch.global.L2 [%in]; griddepcontrol.wait; griddepcontrol.launch_dependents;
        nanosleep.u32 100; createpolicy.fractional.L2::evict_first.b64 %rd5, 0f3F800000;
        st.global.b32 [%out], %tid;
    """
    result = run(body, arch="sm_90a")
    assert (result.out[:, 0] == np.arange(32)).all()
    assert result.rules == []


def test_activemask_is_the_lanes_that_run_together():
    body = """
        activemask.b32 %r5; st.global.b32 [%out], %r5;
        setp.lt.u32 %p1, %lane, 12; @%p1 bra FEW; bra END;
        FEW: activemask.b32 %r5; st.global.b32 [%out], %r5;
        END:
    """
    result = run(body, threads=64)
    lane = np.arange(64) % 32
    assert (result.out[:, 0] == np.where(lane < 12, 0xFFF, 0xFFFFFFFF)).all()


def test_a_trap_is_an_error_that_names_the_thread():
    body = "setp.eq.u32 %p1, %tid, 37; @%p1 trap; st.global.b32 [%out], %tid;"
    with pytest.raises(HazardError) as caught:
        run(body, threads=64, strict=True)
    hazard = caught.value.hazard
    assert (hazard.rule, hazard.warp, hazard.lane) == ("trap", 1, 5)
    assert "trap" in hazard.ptx_text
    lenient = run(body, threads=64)
    assert lenient.rules == ["trap"]
    assert lenient.out[37, 0] == 0xEEEEEEEE  # the thread stopped
    assert lenient.out[38, 0] == 38
