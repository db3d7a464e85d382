"""Every operand shape, and the registers that instructions write and read."""

from __future__ import annotations

import math

import pytest

from cute_fa import ptx
from cute_fa.ptx import Address, FloatImm, Imm, Negated, Pair, Reg, Sink, Special, Symbol, Vector

DECLARATIONS = """
.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .align 64 .b8 param0[128])
{
.reg .pred %p<10>;
.reg .b16 %rs<10>;
.reg .b32 %r<200>;
.reg .b64 %rd<40>;
.reg .b128 %rq<4>;
.reg .pred leader;
"""


def instruction(text: str) -> ptx.Instr:
    return ptx.parse(DECLARATIONS + text + "\nret;\n}\n").kernels["k"].body[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%r1", Reg("%r1")),
        ("leader", Reg("leader")),
        ("%tid.x", Special("%tid.x")),
        ("%cluster_ctarank", Special("%cluster_ctarank")),
        ("%nclusterid.y", Special("%nclusterid.y")),
        ("%laneid", Special("%laneid")),
        ("WARP_SZ", Imm(32)),
        ("_", Sink()),
        ("param0", Symbol("param0")),
        ("smem", Symbol("smem")),
        ("smem+16", Symbol("smem", 16)),
        ("smem - 0x10", Symbol("smem", -16)),
        ("0", Imm(0)),
        ("-9223372036854775808", Imm(-(2**63))),
        ("4294967295U", Imm(2**32 - 1)),
        ("0xFEFFFFF8", Imm(0xFEFFFFF8)),
        ("-0x10", Imm(-16)),
        ("0b101", Imm(5)),
        ("017", Imm(15)),
        ("0fFF800000", FloatImm(0xFF800000, 32)),
        ("0F3f800000", FloatImm(0x3F800000, 32)),
        ("-0f3F800000", FloatImm(0xBF800000, 32)),
        ("0d3FF8000000000000", FloatImm(0x3FF8000000000000, 64)),
        ("1.5", FloatImm(0x3FF8000000000000, 64)),
        ("-2e3", FloatImm(0xC09F400000000000, 64)),
        ("!%p1", Negated(Reg("%p1"))),
        ("%r1|%p2", Pair(Reg("%r1"), Reg("%p2"))),
        ("_|%p1", Pair(Sink(), Reg("%p1"))),
        ("%p1|_", Pair(Reg("%p1"), Sink())),
        ("[%r1]", Address(Reg("%r1"))),
        ("[%r1+16]", Address(Reg("%r1"), 16)),
        ("[%r1+-4]", Address(Reg("%r1"), -4)),
        ("[%rd1-8]", Address(Reg("%rd1"), -8)),
        ("[ %r1 + 0x8 ]", Address(Reg("%r1"), 8)),
        ("[leader]", Address(Reg("leader"))),
        ("[smem]", Address(Symbol("smem"))),
        ("[param0+24]", Address(Symbol("param0"), 24)),
        ("[1024]", Address(Imm(1024))),
        (
            "[%rd1, {%r1, %r2, 0, -3}]",
            ptx.TensorAddress(Reg("%rd1"), (Reg("%r1"), Reg("%r2"), Imm(0), Imm(-3))),
        ),
        (
            "[%rd1+64, {%r1}]",
            ptx.TensorAddress(Reg("%rd1"), (Reg("%r1"),), 64),
        ),
        ("{%r1, %r2}", Vector((Reg("%r1"), Reg("%r2")))),
        ("{_, %r2}", Vector((Sink(), Reg("%r2")))),
        ("{%r1,0f00000000 , 7}", Vector((Reg("%r1"), FloatImm(0, 32), Imm(7)))),
    ],
)
def test_operand(text: str, expected: ptx.Operand) -> None:
    # In second place, after a register, and once more in third.
    found = instruction(f"novel.b32 %r9, {text}, {text};")
    assert found.operands == (Reg("%r9"), expected, expected)
    assert instruction(f"novel.b32 {text};").operands == (expected,)


def test_float_values() -> None:
    assert FloatImm(0x3F800000, 32).value == 1.0
    assert FloatImm(0xFF800000, 32).value == -math.inf
    assert FloatImm(0x3FF8000000000000, 64).value == 1.5


@pytest.mark.parametrize(
    "operand",
    [
        "%r1",
        "[%r1+-4]",
        "{%r1, _}",
        "_|%p1",
        "!%p1",
        "0f3F800000",
        "[%rd1, {%r1, 2}]",
        "smem+4",
        "%tid.x",
        "-7",
    ],
)
def test_operands_print_as_they_are_written(operand: str) -> None:
    (found,) = instruction(f"novel {operand};").operands
    assert str(found) == operand


def regs(prefix: str, *numbers: int) -> str:
    return ", ".join(f"{prefix}{n}" for n in numbers)


def names(prefix: str, stop: int, start: int = 1) -> tuple[str, ...]:
    return tuple(f"{prefix}{n}" for n in range(start, stop + 1))


ACC = "{" + regs("%r", *range(1, 17)) + "}"

# (instruction, registers written, registers read)
DATAFLOW = [
    ("add.s32 %r1, %r2, %r2;", ("%r1",), ("%r2",)),
    ("add.cc.u32 %r1, %r2, 1;", ("%r1", "%cc.cf"), ("%r2",)),
    ("madc.lo.cc.u32 %r1, %r2, %r3, 1;", ("%r1", "%cc.cf"), ("%r2", "%r3", "%cc.cf")),
    ("addc.u32 %r1, %r2, 0;", ("%r1",), ("%r2", "%cc.cf")),
    ("@!%p1 mov.b32 %r1, %tid.x;", ("%r1",), ("%p1",)),
    ("mov.b64 {%r1, _}, %rd1;", ("%r1",), ("%rd1",)),
    ("mov.b64 %rd1, {%r1, %r2};", ("%rd1",), ("%r1", "%r2")),
    ("mov.b64 %rd1, smem;", ("%rd1",), ()),
    ("mov.b128 %rq1, {%rd1, %rd2};", ("%rq1",), ("%rd1", "%rd2")),
    ("max.f32 %r1, %r2, %r3, %r4;", ("%r1",), ("%r2", "%r3", "%r4")),
    ("selp.b32 %r1, %r2, 0fFF800000, %p1;", ("%r1",), ("%r2", "%p1")),
    ("setp.lt.s32 %p1, %r1, %r2;", ("%p1",), ("%r1", "%r2")),
    ("setp.lt.and.s32 %p1|%p2, %r1, %r2, !%p3;", ("%p1", "%p2"), ("%r1", "%r2", "%p3")),
    ("setp.eq.f32 %p1|_, %r1, 0f00000000;", ("%p1",), ("%r1",)),
    (
        "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 0x80, %p2;",
        ("%r1", "%p1"),
        ("%r2", "%r3", "%r4", "%p2"),
    ),
    ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", ("%r1",), ("%r2", "%r3")),
    ("ld.param.v2.b32 {%r1, %r2}, [param0+8];", ("%r1", "%r2"), ()),
    ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+16];", names("%r", 4), ("%rd1",)),
    ("ld.shared.v2.b64 {%rd1, %rd2}, [%r1];", ("%rd1", "%rd2"), ("%r1",)),
    ("ld.global.b32 %rd1, [%rd1];", ("%rd1",), ("%rd1",)),
    ("st.global.v4.b32 [%rd1+16], {%r1, %r2, %r3, 0};", (), ("%rd1", "%r1", "%r2", "%r3")),
    ("st.shared.b32 [smem], %r1;", (), ("%r1",)),
    ("atom.global.add.f32 %r1, [%rd1], %r2;", ("%r1",), ("%rd1", "%r2")),
    ("atom.shared.cas.b32 _, [%r1], %r2, %r3;", (), ("%r1", "%r2", "%r3")),
    ("red.release.gpu.global.add.s32 [%rd1], %r1;", (), ("%rd1", "%r1")),
    ("cp.async.cg.shared.global [%r1], [%rd1], 16, %r2;", (), ("%r1", "%rd1", "%r2")),
    ("cp.async.wait_group 1;", (), ()),
    ("cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];", (), ("%r1",)),
    (
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];",
        names("%r", 4),
        ("%r5",),
    ),
    ("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r5], {%r1, %r2};", (), ("%r5", "%r1", "%r2")),
    (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, "
        "%r4}, {%r5, %r6, %r7, %r8}, {%r9, %r10}, {%r1, %r2, %r3, %r4};",
        names("%r", 4),
        (*names("%r", 10, 5), *names("%r", 4)),
    ),
    ("wgmma.fence.sync.aligned;", (), ()),
    (
        f"wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {ACC}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
        names("%r", 16),
        (*names("%r", 16), "%rd1", "%rd2", "%p1"),
    ),
    (
        f"wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {ACC}, {{%r17, "
        f"%r18, %r19, %r20}}, %rd2, 1, 1, 1, 0;",
        names("%r", 16),
        (*names("%r", 20), "%rd2"),
    ),
    ("wgmma.wait_group.sync.aligned 0;", (), ()),
    ("shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;", ("%r1", "%p1"), ("%r2",)),
    ("shfl.sync.idx.b32 %r1, %r2, %r3, 31, %r4;", ("%r1",), ("%r2", "%r3", "%r4")),
    ("vote.sync.ballot.b32 %r1, !%p1, -1;", ("%r1",), ("%p1",)),
    ("redux.sync.add.s32 %r1, %r2, -1;", ("%r1",), ("%r2",)),
    ("match.all.sync.b32 %r1|%p1, %r2, -1;", ("%r1", "%p1"), ("%r2",)),
    ("elect.sync _|%p1, -1;", ("%p1",), ()),
    ("elect.sync %r1|%p1, %r2;", ("%r1", "%p1"), ("%r2",)),
    ("bar.sync %r1, 128;", (), ("%r1",)),
    ("bar.arrive %r1, %r2;", (), ("%r1", "%r2")),
    ("bar.red.popc.u32 %r1, 0, %p1;", ("%r1",), ("%p1",)),
    ("barrier.cta.red.aligned.and.pred %p1, %r1, %p2;", ("%p1",), ("%r1", "%p2")),
    ("barrier.sync %r1;", (), ("%r1",)),
    ("bar.warp.sync %r1;", (), ("%r1",)),
    ("barrier.cluster.arrive.relaxed;", (), ()),
    ("mbarrier.init.shared.b64 [%r1], 4;", (), ("%r1",)),
    ("mbarrier.arrive.shared.b64 _, [%r1];", (), ("%r1",)),
    ("mbarrier.arrive.shared.b64 %rd1, [%r1], %r2;", ("%rd1",), ("%r1", "%r2")),
    ("mbarrier.arrive.expect_tx.shared.b64 _, [%r1], %r2;", (), ("%r1", "%r2")),
    ("mbarrier.expect_tx.relaxed.cta.shared.b64 [%r1], 32;", (), ("%r1",)),
    (
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2, 10000000;",
        ("%p1",),
        ("%r1", "%r2"),
    ),
    (
        "cp.async.bulk.tensor.4d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint "
        "[%r1], [%rd1, {%r2, %r3, 0, %r4}], [%r5], %rd2;",
        (),
        ("%r1", "%rd1", "%r2", "%r3", "%r4", "%r5", "%rd2"),
    ),
    (
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%rd1, "
        "{%r2, %r3, %r4}], [%r1];",
        (),
        ("%rd1", "%r2", "%r3", "%r4", "%r1"),
    ),
    (
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], 1024;",
        (),
        ("%rd1", "%r1"),
    ),
    ("prefetch.tensormap [%rd1];", (), ("%rd1",)),
    ("mapa.shared::cluster.u32 %r1, %r2, %r3;", ("%r1",), ("%r2", "%r3")),
    ("fence.proxy.async.shared::cta;", (), ()),
    ("fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;", (), ("%rd1",)),
    ("nanosleep.u32 %r1;", (), ("%r1",)),
    ("setmaxnreg.dec.sync.aligned.u32 24;", (), ()),
    ("griddepcontrol.wait;", (), ()),
    ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], %r2;", (), ("%r1", "%r2")),
    ("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, %r2;", (), ("%r1", "%r2")),
    (
        "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r1, %r2, %r3, %r4}, [%r5+8];",
        names("%r", 4),
        ("%r5",),
    ),
    (
        "tcgen05.ld.red.sync.aligned.32x32b.x2.max.f32 {%r1, %r2}, %r3, [%r5];",
        ("%r1", "%r2", "%r3"),
        ("%r5",),
    ),
    ("tcgen05.st.sync.aligned.32x32b.x2.b32 [%r5], {%r1, %r2};", (), ("%r5", "%r1", "%r2")),
    (
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, {%r3, %r4, %r5, %r6}, %p1;",
        (),
        ("%r1", "%rd1", "%rd2", "%r2", "%r3", "%r4", "%r5", "%r6", "%p1"),
    ),
    (
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], [%r7], %rd2, %r2, 1;",
        (),
        ("%r1", "%r7", "%rd2", "%r2"),
    ),
    ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];", (), ("%r1",)),
    ("tcgen05.cp.cta_group::1.32x128b.warpx4 [%r1], %rd1;", (), ("%r1", "%rd1")),
    ("tcgen05.wait::ld.sync.aligned;", (), ()),
    (
        "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes"
        ".multicast::cluster::all.b128 "
        "[%r1], [%r2];",
        (),
        ("%r1", "%r2"),
    ),
    ("clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p1, %rq1;", ("%p1",), ("%rq1",)),
    ("tensormap.replace.tile.global_address.global.b1024.b64 [%rd1], %rd2;", (), ("%rd1", "%rd2")),
    (
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r2, [%r3];",
        (),
        ("%r1", "%r2", "%r3"),
    ),
    ("ret;", (), ()),
]


@pytest.mark.parametrize(
    ("text", "written", "read"), DATAFLOW, ids=[text.split()[0] for text, _, _ in DATAFLOW]
)
def test_registers_written_and_read(
    text: str, written: tuple[str, ...], read: tuple[str, ...]
) -> None:
    instr = instruction(text)
    assert ptx.defs(instr) == written
    assert ptx.uses(instr) == read


def test_carry_is_a_register_only_where_it_is_used() -> None:
    def registers(text: str) -> dict[str, str]:
        return ptx.parse(DECLARATIONS + text + "\nret;\n}\n").kernels["k"].registers

    assert "%cc.cf" not in registers("add.u32 %r1, %r2, %r3;")
    assert registers("add.cc.u32 %r1, %r2, %r3;")["%cc.cf"] == ".pred"
