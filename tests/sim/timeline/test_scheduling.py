"""Costs of instructions, and the order in which a block's instructions are issued."""

from __future__ import annotations

import pytest

from cute_fa import ptx
from cute_fa.sim.program import Program
from cute_fa.sim.timeline.costs import cost_of
from cute_fa.sim.timeline.machines import machine_of
from cute_fa.sim.timeline.scheduling import scheduled
from tests.sim.tiny import FRAME

H100 = machine_of("sm_90a")


def costs(body, arch="sm_90a", model=H100):
    """The costs of a body's instructions, those of the frame left out."""
    text = FRAME.format(arch=arch, module="", declarations="", body=body, in_bytes=4, out_bytes=4)
    module = ptx.parse(text)
    kernel = module.kernels["tiny"]
    program = Program(module, kernel)
    frame = len(ptx.parse(text.replace(body, "")).kernels["tiny"].body) - 1
    own = kernel.body[frame:-1]
    return [cost_of(i, program.counter_class(i), program.decoded(i), model) for i in own]


@pytest.mark.parametrize(
    ("line", "unit", "cycles"),
    [
        ("add.f32 %r3, %r4, %r5;", "fma", 1),
        ("fma.rn.f16x2 %r3, %r4, %r5, %r6;", "fma", 1),
        ("add.s32 %r3, %r4, %r5;", "alu", 2),
        ("add.s64 %rd3, %rd4, %rd5;", "alu", 4),
        ("mad.lo.s32 %r3, %r4, %r5, %r6;", "imad", 2),
        ("lg2.approx.f32 %r3, %r4;", "mufu", 8),
        ("cvt.rn.f16x2.f32 %r3, %r4, %r5;", "convert", 2),
        ("shfl.sync.bfly.b32 %r3, %r4, 1, 31, -1;", "shuffle", 4),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [smem];", "shared", 4),
        ("st.shared.b16 [smem], %h1;", "shared", 0.5),
        ("mov.b32 %r3, %r4;", "", 0),
        ("bar.sync 0;", "", 0),
    ],
)
def test_units_and_cycles(line, unit, cycles):
    (cost,) = costs(line)
    assert (cost.unit, cost.cycles) == (unit, cycles)
    assert cost.issues == (not line.startswith("mov"))


def test_packed_arithmetic_takes_one_slot_and_two_passes():
    (cost,) = costs(
        "fma.rn.f32x2 %rd3, %rd4, %rd5, %rd6;", arch="sm_100a", model=machine_of("sm_100a")
    )
    assert (cost.unit, cost.cycles, cost.issues) == ("fma", 2, True)


def test_copies_by_threads_count_their_bytes():
    (copy, commit) = costs("cp.async.cg.shared.global [smem], [%in], 16;\ncp.async.commit_group;")
    assert (copy.nbytes, copy.special) == (32 * 16, True)
    assert (commit.nbytes, commit.special) == (0, True)


def order(body):
    given = costs(body)
    return [given.index(cost) for cost in scheduled(given)]


def test_chains_are_interleaved():
    """Two chains of three: one after the other as written, by turns as issued."""
    chain = "\n".join(f"add.f32 %r{r}, %r{r}, %r5;" for r in (10, 10, 10, 11, 11, 11))
    assert order(chain) == [0, 3, 1, 4, 2, 5]


def test_values_and_overwritten_registers_keep_their_order():
    body = "add.f32 %r10, %r3, %r4;\nmul.f32 %r11, %r10, %r4;\nex2.approx.ftz.f32 %r10, %r3;"
    assert order(body) == [0, 1, 2]


def test_nothing_moves_across_what_synchronises():
    body = "add.f32 %r10, %r3, %r4;\nmul.f32 %r11, %r10, %r4;\nbar.sync 0;\nadd.f32 %r12, %r3, %r4;"
    assert order(body) == [0, 1, 2, 3]


def test_memory_keeps_its_order():
    body = "ld.shared.b32 %r10, [smem];\nst.shared.b32 [smem], %r3;\nld.shared.b32 %r11, [smem+4];"
    assert order(body) == [0, 1, 2]


def test_long_chains_go_first():
    """What the longest path to the end begins with is issued first."""
    body = """
    add.f32 %r10, %r3, %r4;
    ex2.approx.ftz.f32 %r11, %r5;
    ex2.approx.ftz.f32 %r12, %r11;
    add.f32 %r13, %r12, %r10;
    """
    assert order(body) == [1, 0, 2, 3]
