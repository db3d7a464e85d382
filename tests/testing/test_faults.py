"""Faults: what is found in a PTX text, what becomes of it, and how a survey counts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cute_fa import ptx
from cute_fa.sim.execute import execute
from cute_fa.sim.hazards import HazardError
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.wave import LaunchConfig, SimOptions
from cute_fa.testing.fault_survey import Survey, Verdict
from cute_fa.testing.faults import KINDS, Fault, faults
from tests.sim.tiny import FRAME

# A ring of two slots of 64 bytes: warp 0 copies four blocks through it, warp 1 adds them up. Slot
# s has its full barrier at byte 8 s and its empty one at 16 + 8 s.
RING = """
setp.ne.u32 %p1, %tid, 0;
@%p1 bra READY;
mbarrier.init.shared.b64 [smem], 1;
mbarrier.init.shared.b64 [smem+8], 1;
mbarrier.init.shared.b64 [smem+16], 32;
mbarrier.init.shared.b64 [smem+24], 32;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
mov.u32 %r3, 0;
mov.u32 %r4, 0;
setp.eq.u32 %p2, %warp, 1;
LOOP:
and.b32 %r5, %r3, 1;
shr.u32 %r6, %r3, 1;
and.b32 %r6, %r6, 1;
shl.b32 %r7, %r5, 3;
add.u32 %r7, %r7, %smem;
shl.b32 %r8, %r5, 6;
add.u32 %r8, %r8, %smem;
@%p2 bra WAIT;
@%p1 bra NEXT;
xor.b32 %r9, %r6, 1;
EMPTY:
mbarrier.try_wait.parity.shared.b64 %p3, [%r7+16], %r9;
@!%p3 bra EMPTY;
mov.b32 %r10, 64;
mbarrier.arrive.expect_tx.shared.b64 _, [%r7], %r10;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r8+64], [%in0], 64, [%r7];
add.u64 %in0, %in0, 64;
bra NEXT;
WAIT:
mbarrier.try_wait.parity.shared.b64 %p3, [%r7], %r6;
@!%p3 bra WAIT;
ld.shared.b32 %r11, [%r8+64];
add.u32 %r4, %r4, %r11;
mbarrier.arrive.shared.b64 _, [%r7+16];
NEXT:
add.u32 %r3, %r3, 1;
setp.lt.u32 %p4, %r3, 4;
@%p4 bra LOOP;
st.global.b32 [%out], %r4;
"""
TEXT = FRAME.format(arch="sm_90a", module="", declarations="", body=RING, in_bytes=0, out_bytes=4)


def of_kind(kind, **more):
    return [fault for fault in faults(TEXT, **more) if fault.kind == kind]


def test_every_instruction_that_synchronises_has_its_faults():
    expected = {"fence": 1, "barrier": 1, "wait": 2, "parity": 2, "arrive": 2}
    assert Counter(fault.kind for fault in faults(TEXT)) == expected | {"expect_tx": 1, "bytes": 1}
    assert {fault.kind for fault in faults(TEXT)} < set(KINDS)


def test_a_fault_changes_its_instruction_and_nothing_else():
    sound = [instr.text for instr in ptx.parse(TEXT).kernels["tiny"].body]
    for fault in faults(TEXT):
        changed = [instr.text for instr in ptx.parse(fault.apply(TEXT)).kernels["tiny"].body]
        assert changed[: fault.index] == sound[: fault.index]
        tail = len(sound) - fault.index - 1
        assert changed[-tail:] == sound[-tail:]
        assert changed[fault.index] != sound[fault.index]
        assert sound[fault.index] == fault.text


def test_replacements():
    """What stands in the place of the instruction, with its guard and operands."""
    (announced,) = of_kind("expect_tx")
    assert announced.replacement == "mbarrier.arrive.shared.b64 _, [%r7];"
    (halved,) = of_kind("bytes")
    assert "shr.u32 %changed, %r10, 1;" in halved.replacement
    assert "expect_tx.shared.b64 _, [%r7], %changed;" in halved.replacement
    assert of_kind("wait")[0].replacement == "setp.eq.u32 %p3, 0, 0;"
    assert "xor.b32 %changed, %r9, 1;" in of_kind("parity")[0].replacement
    assert of_kind("wait")[1].form == "mbarrier.try_wait.parity.shared.b64 %p, [%r], %r"


def test_rings_come_from_the_addresses_that_were_used():
    """A slot is exchanged with another that the same instruction, or its ring, uses."""
    body = ptx.parse(TEXT).kernels["tiny"].body
    full, empty = (1024, 1032), (1040, 1048)
    arrive = next(i.index for i in body if i.opcode == "mbarrier.arrive.shared.b64")
    copy = next(i.index for i in body if i.opcode.startswith("cp.async.bulk"))
    addresses = {
        arrive: {"barrier": empty},
        copy: {"barrier": (full[0],), "tile": (1088, 1152)},
    }
    exchanged = of_kind("stage", addresses=addresses)
    assert [(fault.index, fault.text[:8]) for fault in exchanged] == [
        (copy, "cp.async"),
        (arrive, "mbarrier"),
    ]
    assert "setp.eq.u32 %is_one, %place, 1088" in exchanged[0].replacement
    assert "@%is_one mov.u32 %place, 1152" in exchanged[0].replacement
    assert "[%place], [%in0], 64, [%r7];" in exchanged[0].replacement
    assert "add.u32 %place, %place, 16;" in exchanged[1].replacement


def test_guards_stay_and_other_forms_are_known():
    body = """
    @%p1 bar.sync 1, 64;
    @!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [smem], 128;
    wgmma.fence.sync.aligned;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.arrive 2, 64;
    bar.warp.sync -1;
    """
    text = FRAME.format(
        arch="sm_90a", module="", declarations="", body=body, in_bytes=0, out_bytes=4
    )
    found = faults(text)
    assert [fault.kind for fault in found] == [
        *("barrier", "arrive", "expect_tx", "bytes", "fence", "commit", "wait"),
        *("commit", "wait", "arrive", "barrier"),
    ]
    by_kind = {fault.kind: fault.replacement for fault in reversed(found)}
    assert by_kind["expect_tx"] == "@!%p1 mbarrier.arrive.shared.b64 _, [smem];"
    assert "@!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [smem], %changed;" in by_kind["bytes"]


def outcome(text, **options):
    """The sum that the ring's kernel stores, or the rule that it breaks; and its launch."""
    memory = GlobalMemory()
    raw = np.zeros(64 + 512, np.uint8)
    start = -raw.ctypes.data % 64
    data, out = raw[start : start + 256], raw[start + 256 : start + 512]
    data.view(np.uint32)[::16] = [1, 20, 300, 4000]
    bases = [memory.register(x, name=n).base for x, n in ((data, "in"), (out, "out"))]
    params = np.array(bases, np.uint64).tobytes() + bytes(8)
    config = LaunchConfig("tiny", (1, 1, 1), (64, 1, 1), smem_bytes=4096, params=params)
    try:
        launch = execute(ptx.parse(text), config, memory, SimOptions("sm_90a", **options))
    except HazardError as error:
        return error.hazard.rule, None
    return int(out.view(np.uint32)[40]), launch


def test_the_simulator_sees_them():
    """All but two: with two slots, the empty barriers may be exchanged on one side. Slots are
    released in order, so that the producer then waits for the younger of two uses, and after that
    for the older, which it needs no more."""
    total, launch = outcome(TEXT, trace=True)
    assert total == 4321
    listed = faults(TEXT, addresses=launch.trace.shared_addresses())
    assert sum(fault.kind == "stage" for fault in listed) == 6
    missed = [f for f in listed if outcome(f.apply(TEXT), completion="late")[0] == total]
    assert [(fault.kind, fault.text.partition(",")[2]) for fault in missed] == [
        ("stage", " [%r7+16], %r9"),
        ("stage", " [%r7+16]"),
    ]


def test_a_survey_counts_by_kind_and_outcome():
    fence = Fault("fence", 1, 0, "fence.acq_rel.cta", 0, 0, "")
    wait = Fault("wait", 2, 1, "wgmma.wait_group.sync.aligned 0", 0, 0, "")
    verdicts = (
        Verdict(fence, "hazard", "shared-race", 1),
        Verdict(fence, "survived", "", 8),
        Verdict(wait, "deadlock", "deadlock", 1),
    )
    found = Survey(verdicts, ())
    assert found.caught == 2
    assert found.survivors == [fence]
    rows = [line.split() for line in found.table().splitlines()]
    assert rows[0] == ["fault", "number", "hazard", "deadlock", "wrong", "result", "survived"]
    assert rows[1] == ["fence", "2", "1", "0", "0", "1"]
    assert rows[2] == ["wait", "1", "0", "1", "0", "0"]
    assert rows[3] == ["all", "3", "1", "1", "0", "1"]
