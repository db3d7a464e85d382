"""Classes of instructions, MMA shapes and access widths."""

from __future__ import annotations

import pytest

from cute_fa import ptx
from cute_fa.asm.mix import (
    CLASSES,
    access_bytes,
    global_access_widths,
    ptx_class,
    ptx_mix,
    ptx_mma_shapes,
    sass_class,
    sass_mix,
    sass_mma_shapes,
)
from cute_fa.asm.sass import SassInstr
from tests.ptx.kernels import kernel_of


def machine(text: str) -> SassInstr:
    opcode, _, operands = text.partition(" ")
    return SassInstr(0, opcode, "", operands)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HMMA.16816.F32.BF16 R4,R8,R12,R4", "tensor"),
        ("HGMMA.64x128x16.F32.BF16 R24,gdesc[UR8],R24", "tensor"),
        ("UTCHMMA.2CTA gdesc[UR4],gdesc[UR6],tmem[UR8]", "tensor"),
        ("UTCQMMA gdesc[UR4],gdesc[UR6],tmem[UR8]", "tensor"),
        ("LDTM.x32 R4,tmem[UR30]", "tensor memory"),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN UP0,UR8,UR8", "tensor memory"),
        ("UTCBAR.MULTICAST [UR25],URZ,UR28", "sync"),
        ("MUFU.EX2 R2,R3", "mufu"),
        ("FFMA R1,R2,R3,R4", "fp32"),
        ("FFMA2 R2,R4.F32x2.HI_LO,R6.F32x2.HI_LO,R8", "fp32"),
        ("FMNMX3 R1,R2,R3,R4,!PT", "fp32"),
        ("HFMA2.BF16 R1,R2,R3,R4", "fp16"),
        ("HFMA2 R2,-RZ,RZ,0,5.9604644775390625e-08", "move"),
        ("DFMA R2,R4,R6,R8", "fp64"),
        ("F2FP.BF16.F32.PACK_AB R1,R2,R3", "convert"),
        ("IADD3 R1,R2,R3,RZ", "int"),
        ("IMAD.WIDE R2,R7,0x4,R2", "int"),
        ("IMAD.MOV.U32 R1,RZ,RZ,R2", "move"),
        ("ULEA UR4,UR5,UR6,0x18", "uniform"),
        ("SHFL.BFLY PT,R1,R2,0x10,0x1f", "warp"),
        ("LDSM.16.M88.4 R4,[R0]", "shared"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R0],[R2.64]", "async copy"),
        ("UTMALDG.3D [UR8],[UR32],desc[URZ]", "tma"),
        ("UTMACCTL.PF [UR14]", "tma"),
        ("LDG.E.128 R4,[R2.64]", "global"),
        ("STL.128 [R1],R4", "local"),
        ("LDCU.64 UR4,c[0x0][0x358]", "constant"),
        ("SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ,[UR4],RZ", "sync"),
        ("WARPGROUP.DEPBAR.LE gsb0,0x0", "sync"),
        ("USETMAXREG.DEALLOC.CTAPOOL 0x18", "sync"),
        ("BSYNC.RECONVERGENT B0", "branch"),
        ("FROBNICATE R1", "other"),
    ],
)
def test_sass_class(text: str, expected: str) -> None:
    assert sass_class(machine(text)) == expected
    assert expected in CLASSES


DECLARATIONS = """
.reg .pred %p<3>;
.reg .b16 %h<3>;
.reg .b32 %r<10>;
.reg .b64 %d<5>;
"""


def ptx_code(*statements: str) -> tuple[ptx.Instr, ...]:
    kernel = kernel_of(DECLARATIONS + "\n".join(statements), "sm_100a")
    return kernel.body[: len(statements)]


MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, "
    "{%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4};"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MMA, "tensor"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %d1, %d2, 1, 1, 1;", "tensor"),
        ("wgmma.wait_group.sync.aligned 0;", "sync"),
        ("tcgen05.mma.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, 1;", "tensor"),
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r2];", "tensor memory"),
        ("tcgen05.wait::ld.sync.aligned;", "sync"),
        ("tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r1];", "sync"),
        ("ex2.approx.ftz.f32 %r1, %r2;", "mufu"),
        ("fma.rn.f32x2 %d1, %d2, %d2, %d2;", "fp32"),
        ("setp.lt.f32 %p1, %r1, %r2;", "fp32"),
        ("mul.f16x2 %r1, %r2, %r3;", "fp16"),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", "convert"),
        ("add.s32 %r1, %r2, %r3;", "int"),
        ("and.pred %p1, %p2, %p2;", "int"),
        ("mov.b64 %d1, {%r1, %r2};", "move"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "warp"),
        ("ld.shared::cta.b32 %r1, [%r2];", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];", "shared"),
        ("atom.shared.add.u32 %r1, [%r2], 1;", "shared"),
        ("st.local.b32 [%r2], %r1;", "local"),
        ("ld.param.b32 %r1, [%r2];", "constant"),
        ("ld.global.nc.v2.b32 {%r1, %r2}, [%d1];", "global"),
        ("ld.b32 %r1, [%d1];", "global"),
        ("red.global.add.f32 [%d1], %r1;", "global"),
        ("cp.async.cg.shared.global [%r1], [%d1], 16;", "async copy"),
        ("cp.async.commit_group;", "sync"),
        ("cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];", "sync"),
        ("cp.async.bulk.shared::cluster.global [%r1], [%d1], 16, [%r2];", "tma"),
        ("cp.async.bulk.wait_group.read 0;", "sync"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d1], [%r1], 16;", "tma"),
        ("prefetch.tensormap [%d1];", "tma"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "sync"),
        ("setmaxnreg.dec.sync.aligned.u32 24;", "sync"),
        ("ret;", "branch"),
    ],
)
def test_ptx_class(text: str, expected: str) -> None:
    (instr,) = ptx_code(text)
    assert ptx_class(instr) == expected
    assert expected in CLASSES


def test_mixes_count_and_keep_the_order_of_classes() -> None:
    code = [machine(t) for t in ("IADD3 R1", "MUFU.EX2 R1", "NOP", "HMMA.16816.F32 R1", "LEA R1")]
    assert list(sass_mix(code).items()) == [("tensor", 1), ("mufu", 1), ("int", 2)]
    assert ptx_mix(ptx_code("add.s32 %r1, %r2, 1;", MMA)) == {"tensor": 1, "int": 1}


def test_mma_shapes() -> None:
    code = [
        machine(t)
        for t in (
            "HMMA.16816.F32.BF16 R4",
            "HMMA.16816.F32.BF16 R8",
            "HMMA.1688.F32.TF32 R8",
            "IMMA.16832.S8.S8 R8",
            "HGMMA.64x128x16.F32.BF16 R24",
            "UTCHMMA.2CTA gdesc[UR4]",
            "FADD R1",
        )
    ]
    assert sass_mma_shapes(code) == {
        "m16n8k16 F32.BF16": 2,
        "m16n8k8 F32.TF32": 1,
        "m16n8k32 S8.S8": 1,
        "m64n128k16 F32.BF16": 1,
        "UTCHMMA.2CTA": 1,
    }
    code_ptx = ptx_code(MMA, MMA, "tcgen05.mma.cta_group::2.kind::f16 [%r1], %d1, %d2, %r2, 1;")
    assert ptx_mma_shapes(code_ptx) == {
        "m16n8k16 f32.bf16.bf16.f32": 2,
        "tcgen05.mma cta_group::2 kind::f16": 1,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LDG.E R2,desc[UR4][R2.64]", 4),
        ("LDG.E.64.CONSTANT R2,[R2.64]", 8),
        ("STG.E.128.STRONG.GPU [R2.64],R4", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R0],[R2.64]", 16),
        ("LDGSTS.E.LTC128B [R0],[R2.64]", 4),
        ("LDG.E.U16 R2,[R2.64]", 2),
        ("STL.U8 [R1],R4", 1),
    ],
)
def test_access_bytes(text: str, expected: int) -> None:
    assert access_bytes(machine(text)) == expected


def test_global_access_widths() -> None:
    code = [machine(t) for t in ("LDG.E R1", "LDG.E.128 R4", "LDG.E R2", "STG.E.64 [R1]", "LDS R1")]
    assert global_access_widths(code) == {"loads": {4: 2, 16: 1}, "stores": {8: 1}}
