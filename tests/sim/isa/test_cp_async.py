"""cp.async: sizes, zero fill, groups per thread, completion policies, and misuse."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.tiny import run

POLICIES = ["eager", "late", "random"]

COPY = """
    mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
    cp.async.cg.shared.global [%r3], [%in], 16;
"""
READ = """
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
    st.global.v4.b32 [%out], {%r4, %r5, %r6, %r7};
"""


def words(threads=32, per_thread=4):
    return np.arange(threads * per_thread, dtype=np.uint32) + 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"]
)
def test_data_is_there_after_the_wait(policy, wait):
    result = run(COPY + wait + READ, words(64), words=4, threads=64, completion=policy)
    assert result.rules == []
    assert (result.out.reshape(-1) == words(64)).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "wait",
    [
        "",
        "cp.async.commit_group;",
        "cp.async.wait_group 0;",  # nothing was committed
        "cp.async.commit_group; cp.async.wait_group 1;",
        "bar.sync 0;",
    ],
)
def test_reading_before_the_wait_is_found_under_every_policy(policy, wait):
    result = run(COPY + wait + READ, words(), words=4, completion=policy)
    assert result.rules == ["read-before-arrival"]
    hazard = result.launch.hazards[0]
    assert hazard.ptx_line == result.line("ld.shared.v4")
    assert hazard.other.ptx_line == result.line("cp.async.cg")
    if policy == "late":
        assert np.isnan(result.out.view(np.float32)).all()


@pytest.mark.parametrize(
    "write", ["st.shared.b32 [%r3], 0;", "cp.async.ca.shared.global [%r3], [%in], 8;"]
)
def test_writing_while_a_copy_is_in_flight(write):
    done = "cp.async.commit_group; cp.async.wait_group 0;"
    racing = run(COPY + write + done + "bar.sync 0;" + READ, words(), words=4)
    assert racing.rules == ["write-while-copy-in-flight"]
    assert racing.launch.hazards[0].other.ptx_line == racing.line("cp.async.cg")
    ordered = run(COPY + done + write + done + "bar.sync 0;" + READ, words(), words=4)
    assert ordered.rules == []


@pytest.mark.parametrize("policy", POLICIES)
def test_wait_group_leaves_the_newest_groups_pending(policy):
    body = """
        mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
        cp.async.ca.shared.global [%r3], [%in], 4;       cp.async.commit_group;
        cp.async.ca.shared.global [%r3+4], [%in+4], 4;   cp.async.commit_group;
        cp.async.ca.shared.global [%r3+8], [%in+8], 4;   cp.async.commit_group;
        cp.async.wait_group {pending};
        ld.shared.b32 %r4, [%r3+{offset}];
        st.global.b32 [%out], %r4;
    """
    for pending in range(4):
        for group in range(3):
            result = run(body.format(pending=pending, offset=4 * group), words(), completion=policy)
            if group < 3 - pending:
                assert result.rules == []
                assert (result.out[:, 0] == words()[group::4]).all()
            else:
                assert result.rules == ["read-before-arrival"]


def test_groups_belong_to_threads():
    body = """
        mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
        setp.lt.u32 %p1, %lane, 10;
        cp.async.ca.shared.global [%r3], [%in], 4;
        cp.async.commit_group;
        @%p1 cp.async.ca.shared.global [%r3+4], [%in+4], 4;
        @%p1 cp.async.commit_group;
        cp.async.wait_group 1;
        mov.b32 %r4, 0;
        {guard} ld.shared.b32 %r4, [%r3];
        st.global.b32 [%out], %r4;
    """
    some = run(body.format(guard="@%p1"), words())
    assert some.rules == [] and (some.out[:10, 0] == words()[:40:4]).all()
    everyone = run(body.format(guard=""), words())
    assert everyone.rules == ["read-before-arrival"]
    assert everyone.launch.hazards[0].count == 22 and everyone.launch.hazards[0].lane == 10


@pytest.mark.parametrize("policy", POLICIES)
def test_source_sizes_zero_fill_and_leave_memory_alone(policy):
    result = run(
        """
        mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
        and.b32 %r8, %lane, 3; shl.b32 %r8, %r8, 2;
        setp.eq.u32 %p1, %r8, 0; mov.b64 %rd3, 0;
        selp.b64 %rd4, %rd3, %in, %p1;
        cp.async.ca.shared.global.L2::128B [%r3], [%rd4], 16, %r8;
        cp.async.wait_all;
        """
        + READ,
        words(),
        words=4,
        completion=policy,
    )
    assert result.rules == []
    expected = words().reshape(32, 4).copy()
    for lane in range(32):
        expected[lane, lane % 4 :] = 0
    assert (result.out == expected).all()
    assert result.launch.counters["global_bytes_read"] == 8 * (4 + 8 + 12)
    assert result.launch.counters["shared_bytes_written"] == 32 * 16


def test_ignore_source_predicate_zero_fills():
    result = run(
        """
        mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
        setp.lt.u32 %p1, %lane, 4;
        mov.b64 %rd3, 64; selp.b64 %rd4, %rd3, %in, %p1;
        cp.async.cg.shared.global [%r3], [%rd4], 16, %p1;
        cp.async.wait_all;
        """
        + READ,
        words(),
        words=4,
    )
    assert result.rules == []
    assert not result.out[:4].any() and (result.out[4:].reshape(-1) == words()[16:]).all()


def test_misuse_is_reported():
    body = (
        "mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;"
        "cp.async.cg.shared.global [%r3+{to}], [%in+{source}], 16{size}; cp.async.wait_all;"
    )
    cases = {
        "": {"to": 0, "source": 0, "size": ""},
        "copy-size": {"to": 0, "source": 0, "size": ", 32"},
        "shared-misaligned": {"to": 4, "source": 0, "size": ""},
        "shared-out-of-bounds": {"to": 4096, "source": 0, "size": ""},
        "global-misaligned": {"to": 0, "source": 4, "size": ""},
        "global-out-of-bounds": {"to": 0, "source": 1 << 20, "size": ""},
    }
    for policy in POLICIES:
        for rule, values in cases.items():
            result = run(body.format(**values), words(), completion=policy)
            assert result.rules == ([rule] if rule else []), policy
    late_size = run(body.format(to=0, source=4, size=", 8"), words(), completion="late")
    assert late_size.rules == ["global-misaligned"]


@pytest.mark.parametrize("form", ["cp.async.cg.shared.global [%r3], [%in], 8", "cp.async.bogus"])
def test_forms_that_do_not_exist_are_refused(form):
    with pytest.raises(UnsupportedError):
        run(f"mov.b32 %r3, 1024; {form};")


PIPELINE = """
    mul.lo.u32 %r3, %tid, 16; add.u32 %r3, %r3, %smem;
    xor.b32 %r9, %tid, 32; mul.lo.u32 %r9, %r9, 16; add.u32 %r9, %r9, %smem;
    mov.b32 %r8, 0; mov.b32 %r7, 0;
    loop:
    cp.async.cg.shared.global [%r3], [%in], 16;
    cp.async.commit_group;
    {wait}
    {arrived}
    ld.shared.b32 %r4, [%r9];
    add.u32 %r7, %r7, %r4;
    {consumed}
    add.u32 %r8, %r8, 1; setp.lt.u32 %p1, %r8, 3; @%p1 bra loop;
    st.global.b32 [%out], %r7;
"""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pipelined_loop_is_clean_and_each_missing_wait_is_found(policy):
    good = {"wait": "cp.async.wait_group 0;", "arrived": "bar.sync 0;", "consumed": "bar.sync 0;"}

    def rules(**change):
        return set(
            run(
                PIPELINE.format(**{**good, **change}), words(64), threads=64, completion=policy
            ).rules
        )

    assert rules() == set()
    assert "read-before-arrival" in rules(wait="")
    assert "shared-race" in rules(arrived="") or "read-before-arrival" in rules(arrived="")
    assert "shared-race" in rules(consumed="") or "read-before-arrival" in rules(consumed="")
