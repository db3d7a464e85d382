"""Hazards: every rule with a seeded bug and a clean twin, and how findings read.

Rules of single instructions are tested with their instruction in ``tests/sim/isa``; here are the
rules that relate two accesses, and the reports themselves.
"""

import pickle

import numpy as np
import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim import hazards
from cute_fa.sim.hazards import RULES, AccessSite, Hazard, HazardError
from cute_fa.sim.memory import GlobalMemory
from tests.sim.tiny import run

ADDRESSES = """
    shl.b32 %r3, %tid, 2; add.u32 %r3, %r3, %smem;
    xor.b32 %r4, %tid, 32; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %smem;
"""

RACES = {
    "read after write": ("st.shared.b32 [%r3], %tid;", "ld.shared.b32 %r5, [%r4];"),
    "write after write": ("st.shared.b32 [%r3], %tid;", "st.shared.b32 [%r4], %tid;"),
    "write after read": (
        "st.shared.b32 [%r3], 1; bar.sync 0; ld.shared.b32 %r5, [%r3];",
        "st.shared.b32 [%r4], %tid;",
    ),
    "ldmatrix after write": (
        "st.shared.b32 [%r3], %tid; st.shared.b32 [%r3+256], %tid;"
        "and.b32 %r6, %lane, 7; shl.b32 %r6, %r6, 4; add.u32 %r6, %r6, %smem;"
        "xor.b32 %r7, %warp, 1; mad.lo.u32 %r6, %r7, 128, %r6;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r6];",
    ),
    "copy after read": (
        "st.shared.b32 [%r3], 1; bar.sync 0; ld.shared.b32 %r5, [%r3];",
        "cp.async.ca.shared.global [%r4], [%in], 4; cp.async.wait_all;",
    ),
    "generic read after write": (
        "st.shared.b32 [%r3], %tid; cvt.u64.u32 %rd3, %r4;",
        "ld.b32 %r5, [%rd3];",
    ),
    "atomic after write": ("st.shared.b32 [%r3], %tid;", "red.shared.add.u32 [%r4], 1;"),
}


@pytest.mark.parametrize("name", RACES)
@pytest.mark.parametrize("policy", ["eager", "late"])
def test_races_between_warps_and_their_ordered_twins(name, policy):
    first, second = RACES[name]
    racy = run(ADDRESSES + first + second, threads=64, ctas=2, completion=policy)
    assert "shared-race" in racy.rules
    clean = run(ADDRESSES + first + "bar.sync 0;" + second, threads=64, ctas=2, completion=policy)
    assert clean.rules == []


@pytest.mark.parametrize("name", ["read after write", "write after write", "write after read"])
@pytest.mark.parametrize("seed", range(5))
def test_races_are_found_in_any_order_of_warps(name, seed):
    first, second = RACES[name]
    racy = run(ADDRESSES + first + second, threads=64, completion="random", seed=seed)
    assert set(racy.rules) & {"shared-race", "uninitialised-shared-read"}
    clean = run(
        ADDRESSES + first + "bar.sync 0;" + second, threads=64, completion="random", seed=seed
    )
    assert clean.rules == []


def test_a_race_names_both_accesses():
    result = run(
        ADDRESSES + "st.shared.b32 [%r3], %tid;\nld.shared.b32 %r5, [%r4];", threads=64, ctas=3
    )
    (hazard,) = result.launch.hazards
    assert hazard.rule == "shared-race" and hazard.count == 3 * 64
    assert hazard.ptx_line == result.line("ld.shared.b32 %r5")
    assert isinstance(hazard.other, AccessSite)
    assert hazard.other.ptx_line == result.line("st.shared.b32 [%r3]")
    assert {hazard.warp, hazard.other.warp} == {0, 1}
    assert (hazard.warp, hazard.lane, hazard.address) == (1, 0, 0x400)
    text = str(hazard)
    for part in ("ld.shared.b32 %r5", "st.shared.b32 [%r3]", "warp 0", "CTA (0, 0, 0)", "0x400"):
        assert part in text


def test_own_accesses_of_a_warp_are_ordered():
    body = "xor.b32 %r4, %r3, 4; st.shared.b32 [%r4], 3; ld.shared.b32 %r5, [%r3];"
    assert run(ADDRESSES + "st.shared.b32 [%r3], %tid;" + body, threads=64).rules == []


def test_neighbouring_bytes_are_not_confused():
    body = """
        add.u32 %r3, %smem, %tid; st.shared.b8 [%r3], %tid;
        ld.shared.b8 %r4, [%r3]; st.global.b32 [%out], %r4;
    """
    result = run(body, threads=128)
    assert result.rules == [] and (result.out[:, 0] == np.arange(128)).all()
    wide = run(body.replace("ld.shared.b8 %r4", "and.b32 %r3, %r3, 0xffffffc0; ld.shared.b32 %r4"))
    assert wide.rules == []
    apart = run(
        "add.u32 %r3, %smem, %warp; st.shared.b8 [%r3], %tid; ld.shared.b16 %r4, [%smem];",
        threads=64,
    )
    assert set(apart.rules) == {"shared-race"}


def test_uninitialised_reads():
    body = "{store} bar.sync 0; ld.shared.v2.b32 {{%r5, %r6}}, [%smem]; st.global.b32 [%out], %r6;"
    half = run(body.format(store="st.shared.b32 [%smem], 1;"))
    assert half.rules == ["uninitialised-shared-read"]
    assert np.isnan(half.out.view(np.float32)).all()
    both = run(body.format(store="st.shared.b32 [%smem], 1; st.shared.b32 [%smem+4], 1;"))
    assert both.rules == []


def test_shared_bounds_and_alignment():
    body = "st.shared.b32 [%smem+{}], 1;"
    assert run(body.format(4092)).rules == []
    above = run(body.format(4096))
    assert above.rules == ["shared-out-of-bounds"]
    assert "4 bytes past the end of the CTA's 4096 bytes" in above.launch.hazards[0].message
    below = run(body.format(-4))
    assert below.rules == ["shared-out-of-bounds"]
    assert "4 bytes before the start" in below.launch.hazards[0].message
    assert run(body.format(2)).rules == ["shared-misaligned"]
    assert run(body.format(1 << 24)).rules == ["shared-out-of-bounds"]


def test_bad_lanes_do_not_disturb_the_good_ones():
    result = run(
        """
        shl.b32 %r3, %lane, 7; add.u32 %r3, %r3, %smem;
        st.shared.b32 [%r3], %lane;
        ld.shared.b32 %r4, [%r3]; st.global.b32 [%out], %r4;
        """,
        smem_bytes=2048,
    )
    assert result.rules == ["shared-out-of-bounds"] * 2
    assert result.out[:16, 0].tolist() == list(range(16))
    assert np.isnan(result.out[16:].view(np.float32)).all()


def test_a_cluster_shares_memory_by_rank():
    body = """
        mov.u32 %r8, %cluster_ctarank; xor.b32 %r9, %r8, 1;
        shl.b32 %r3, %tid, 2; add.u32 %r3, %r3, %smem;
        and.b32 %r4, %r3, 0xffffff; shl.b32 %r5, {peer}, 24; or.b32 %r4, %r4, %r5;
        mad.lo.u32 %r6, %r8, 100, %tid;
        st.shared.b32 [%r3], 0;
        st.shared::cluster.b32 [%r4], %r6;
        bar.sync 0;
        ld.shared.b32 %r7, [%r3];
        st.global.b32 [%out], %r7;
    """
    # Without a cluster barrier the peer's store and the own one race, and the peer may have exited.
    racy = run(body.format(peer="%r9"), ctas=4, cluster=2, arch="sm_90a")
    assert set(racy.rules) == {"shared-race", "exited-cta-access"}
    own = run(body.format(peer="%r8"), ctas=4, cluster=2, arch="sm_90a")
    assert own.rules == []
    expected = np.concatenate([np.arange(32) + 100 * (cta % 2) for cta in range(4)])
    assert (own.out[:, 0] == expected).all()
    beyond = run(body.format(peer="7"), ctas=4, cluster=2, arch="sm_90a")
    assert beyond.rules == ["shared-bad-rank"]


def test_uninitialised_global_reads_are_found_where_asked_for():
    memory = GlobalMemory()
    workspace = np.zeros(64, np.uint32)
    memory.register(workspace, name="workspace", track_initialised=True)
    base = workspace.ctypes.data
    body = f"mov.b64 %rd3, {base}; mul.wide.u32 %rd4, %tid, 4; add.u64 %rd3, %rd3, %rd4;"
    read = "ld.global.b32 %r3, [%rd3];"
    bug = run(body + read, memory=memory)
    assert bug.rules == ["uninitialised-global-read"]
    assert "workspace" in bug.launch.hazards[0].message
    clean = run(body + "st.global.b32 [%rd3], 1;" + read, memory=memory)
    assert clean.rules == []


def test_read_only_memory():
    memory = GlobalMemory()
    constants = np.zeros(4, np.uint32)
    memory.register(constants, name="weights", writable=False)
    body = f"mov.b64 %rd3, {constants.ctypes.data};"
    assert run(body + "ld.global.b32 %r3, [%rd3];", memory=memory).rules == []
    assert run(body + "st.global.b32 [%rd3], 1;", memory=memory).rules == ["global-read-only-write"]
    assert not constants.any()


def test_parameters_are_read_only():
    body = "mov.b64 %rd3, p_x; cvta.param.u64 %rd3, %rd3; {}"
    good = run(body.format("ld.b32 %r3, [%rd3]; st.global.b32 [%out], %r3;"))
    assert good.rules == [] and (good.out == 7).all()
    assert run(body.format("st.b32 [%rd3], 1;")).rules == ["param-write"]
    assert run(body.format("ld.b32 %r3, [%rd3+64];")).rules == ["param-out-of-bounds"]


# --- options and reports --------------------------------------------------------------------------

RACE = (
    ADDRESSES + "st.shared.b32 [%r3], %tid; ld.shared.b32 %r5, [%r4]; ld.shared.b32 %r5, [%r3+512];"
)


def test_checks_select_rules():
    assert set(run(RACE, threads=64).rules) == {"shared-race", "uninitialised-shared-read"}
    assert run(RACE, threads=64, checks=frozenset({"shared-race"})).rules == ["shared-race"]
    only = run(RACE, threads=64, checks=frozenset({"uninitialised-shared-read"}))
    assert only.rules == ["uninitialised-shared-read"]
    assert run(RACE, threads=64, checks=False).rules == []
    with pytest.raises(InvalidArgumentError, match="shared-rice"):
        run(RACE, threads=64, checks=frozenset({"shared-rice"}))


def test_bounds_are_looked_at_even_without_checks():
    result = run("st.shared.b32 [%smem+4096], 1; ld.global.b32 %r3, [%in0+-4];", checks=False)
    assert result.rules == ["shared-out-of-bounds", "global-out-of-bounds"]


def test_which_rules_are_optional():
    assert hazards.selected_rules(False) == frozenset()
    assert "shared-race" in hazards.selected_rules(True)
    assert "deadlock" not in hazards.selected_rules(True)  # it is no option


def test_strict_raises_the_first_error():
    with pytest.raises(HazardError) as caught:
        run(RACE, threads=64, strict=True)
    assert caught.value.hazard.rule == "shared-race"
    assert "ld.shared.b32 %r5, [%r4]" in str(caught.value) and "strict=False" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.hazard == caught.value.hazard


def test_findings_are_merged_by_rule_and_lines():
    found: list[Hazard] = []
    other = AccessSite("write", 3, "st", None, 1)
    assert hazards.add(found, Hazard("shared-race", "a", ptx_line=5, other=other, count=2))
    assert not hazards.add(found, Hazard("shared-race", "b", ptx_line=5, other=other))
    assert hazards.add(found, Hazard("shared-race", "c", ptx_line=6, other=other))
    assert hazards.add(found, Hazard("shared-race", "d", ptx_line=5, other=AccessSite("write", 4)))
    assert [h.count for h in found] == [3, 1, 1] and found[0].message == "a"


def test_a_report_shows_all_there_is_to_know():
    hazard = Hazard(
        "shared-race",
        "a read is not ordered",
        kernel="k",
        ptx_line=12,
        ptx_text="ld.shared.b32 %r1, [%r2]",
        source="fwd.py:88",
        cta=(1, 2, 3),
        warp=4,
        lane=5,
        address=0x400,
        other=AccessSite("write", 9, "st.shared.b32 [%r2], %r3", "fwd.py:70", 6, (1, 2, 4)),
        count=7,
    )
    text = str(hazard)
    for part in (
        "error: shared-race: a read is not ordered",
        "found 7 times",
        "kernel: k",
        "PTX line 12: ld.shared.b32 %r1, [%r2]",
        "source: fwd.py:88",
        "CTA (1, 2, 3), warp 4, lane 5, address 0x400",
        "after: write by CTA (1, 2, 4) warp 6",
        "PTX line 9: st.shared.b32 [%r2], %r3",
        "source: fwd.py:70",
        RULES["shared-race"].meaning,
    ):
        assert part in text


def test_source_lines_appear_when_the_ptx_has_them():
    result = run(
        ".loc 1 41 0\nst.shared.b32 [%r3], %tid;\n.loc 1 42 0\nld.shared.b32 %r5, [%r4];".join(
            (ADDRESSES, "")
        ),
        threads=64,
        module='.file 1 "kernel.py"',
    )
    (hazard,) = result.launch.hazards
    assert hazard.source == "kernel.py:42" and hazard.other.source == "kernel.py:41"


LOOP = """
    mov.b32 %r8, 0;
    loop:
    st.shared.b32 [%r3], %r8;
    bar.sync 0;
    ld.shared.b32 %r5, [%r4];
    {second}
    add.u32 %r8, %r8, 1; setp.lt.u32 %p1, %r8, 40; @%p1 bra loop;
"""


def test_a_wave_that_forgets_its_past_reports_nothing_wrong(monkeypatch):
    from cute_fa.sim import race

    clean, bug = LOOP.format(second="bar.sync 0;"), LOOP.format(second="")
    for limit in (7, 10, 11, 50):
        monkeypatch.setattr(race, "MOST_EVENTS", limit)
        for policy in ("eager", "random"):
            assert run(ADDRESSES + clean, threads=64, ctas=2, completion=policy).rules == []
            racy = run(ADDRESSES + bug, threads=64, ctas=2, completion=policy)
            assert set(racy.rules) == {"shared-race"}
