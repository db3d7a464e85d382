"""What machine code has no instruction for takes no time in the model."""

from __future__ import annotations

from collections import Counter

from cute_fa import ptx
from cute_fa.sim.program import Program
from cute_fa.sim.timeline.costs import cost_of
from cute_fa.sim.timeline.fusion import fused, reads_of
from cute_fa.sim.timeline.machines import machine_of
from tests.sim.tiny import FRAME

B200 = machine_of("sm_100a")


def issued(body: str) -> Counter[str]:
    """The instructions of a body that take an issue slot, by name."""
    text = FRAME.format(
        arch="sm_100a", module="", declarations="", body=body, in_bytes=4, out_bytes=4
    )
    module = ptx.parse(text)
    program = Program(module, module.kernels["tiny"])
    reads = reads_of(program)
    found: Counter[str] = Counter()
    for block in range(len(program.blocks)):
        costs = [
            cost_of(i, program.counter_class(i), program.decoded(i), B200)
            for i in program.body_of(block)
        ]
        found.update(c.instr.op for c in fused(program, block, costs, reads) if c.issues)
    return found


def election(guarded: str) -> str:
    return f"""
    elect.sync %r10|%p1, -1;
    not.pred %p2, %p1;
    @%p2 bra AFTER;
    {guarded}
    AFTER:
    add.f32 %r11, %r3, %r4;
    """


def test_one_shift_before_an_addition_is_free():
    alone = issued("add.f32 %r11, %r3, %r4;")["shl"]
    body = "shl.b32 %r10, %r3, 4;\nadd.s32 %r11, %r10, %r4;"
    assert issued(body)["shl"] == alone
    assert issued(body + "\nadd.s32 %r12, %r10, %r5;")["shl"] == alone + 1


def test_elections_vanish_before_what_is_executed_once_per_warp():
    commit = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];"
    assert issued(election(commit))["elect"] == 0
    assert issued(election("st.shared.b32 [%r3], %r4;"))["elect"] == 1
