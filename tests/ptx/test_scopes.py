"""Scopes of inline assembly: the same names again and again, and names at kernel scope."""

from __future__ import annotations

from cute_fa import ptx
from tests.ptx.kernels import kernel_of

# Two waits on a barrier, as inline assembly writes them: names recur, braces stand on their own
# line, at the end of one and after a statement.
SPINS = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry k()
{
.reg .pred %p<3>;
.reg .b32 %r<9>;
.reg .b64 %rd<3>;
mov.b32 %r1, 0;
// begin inline asm
{
    .reg .pred P1;
    LAB_WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1], %r2, 10000000;
    @P1 bra DONE;
    bra LAB_WAIT;
    DONE:
}
// end inline asm
{ .reg .pred P1; .reg .b32 %r<3>, tmp; mov.b32 %r2, 7; mov.b32 tmp, %r2;
LAB_WAIT:
mbarrier.try_wait.parity.shared::cta.b64 P1, [tmp], %r3;
@!P1 bra.uni LAB_WAIT;
{
.reg .pred P1;
setp.eq.b32 P1, tmp, %r3;
@P1 bra OUTSIDE; }
}
.reg .b32 kept_<4>, kept_one;
mov.b32 kept_3, kept_one;
{ mov.b32 kept_3, 1; }
OUTSIDE: ret;
}
"""


def test_names_are_renamed_apart() -> None:
    kernel = ptx.parse(SPINS).kernels["k"]
    assert kernel.labels == {
        "LAB_WAIT@1": 1,
        "DONE@1": 4,
        "LAB_WAIT@2": 6,
        "OUTSIDE": 12,
    }
    assert set(kernel.registers) == {
        "%r1",
        "%r2",
        "%r3",
        "P1@1",
        "%r2@2",
        "tmp@2",
        "P1@2",
        "P1@3",
        "kept_3",
        "kept_one",
    }
    body = kernel.body
    assert body[1].operands[0] == ptx.Reg("P1@1")
    assert body[1].operands[2] == ptx.Reg("%r2")
    assert body[2].guard == ptx.Guard("P1@1", False)
    assert body[2].operands == (ptx.Symbol("DONE@1"),)
    assert body[3].operands == (ptx.Symbol("LAB_WAIT@1"),)
    assert body[4].operands[0] == ptx.Reg("%r2@2")
    assert body[5].operands == (ptx.Reg("tmp@2"), ptx.Reg("%r2@2"))
    assert body[7].guard == ptx.Guard("P1@2", True)
    assert body[7].operands == (ptx.Symbol("LAB_WAIT@2"),)
    # The innermost P1, but tmp of the scope around it, and a label of the kernel.
    assert ptx.defs(body[8]) == ("P1@3",)
    assert ptx.uses(body[8]) == ("tmp@2", "%r3")
    assert body[9].operands == (ptx.Symbol("OUTSIDE"),)


def test_registers_declared_by_inline_assembly_at_kernel_scope_stay() -> None:
    body = ptx.parse(SPINS).kernels["k"].body
    assert body[10].operands == (ptx.Reg("kept_3"), ptx.Reg("kept_one"))
    assert ptx.defs(body[11]) == ("kept_3",)


def test_a_declaration_counts_from_where_it_stands() -> None:
    text = """
    .reg .b32 %r<3>;
    {
    mov.b32 %r1, 1;
    .reg .b32 %r<2>;
    mov.b32 %r1, 2;
    }
    ret;"""
    body = kernel_of(text).body
    assert ptx.defs(body[0]) == ("%r1",)
    assert ptx.defs(body[1]) == ("%r1@1",)


def test_labels_may_stand_after_the_branch_and_shadow_outer_ones() -> None:
    text = """
    .reg .pred p;
    @p bra DONE;
    { @p bra DONE; DONE: }
    { { bra DONE; } }
    DONE:
    ret;"""
    kernel = kernel_of(text)
    targets = [i.operands[0] for i in kernel.body if i.op == "bra"]
    assert targets == [ptx.Symbol("DONE"), ptx.Symbol("DONE@1"), ptx.Symbol("DONE")]
    assert kernel.labels["DONE@1"] == 2


def test_vector_registers_are_registers_per_element() -> None:
    text = """
    .reg .b32 %r<4>;
    .reg .v2 .b32 pair;
    {
    .reg .v4 .s32 abcd;
    mov.s32 abcd.x, %r1;
    mov.s32 abcd.a, pair.g;
    st.shared.v4.s32 [%r2], abcd;
    ld.shared.v2.b32 pair, [%r2];
    }
    ret;"""
    kernel = kernel_of(text)
    body = kernel.body
    assert ptx.defs(body[0]) == ("abcd.x@1",)
    assert (ptx.defs(body[1]), ptx.uses(body[1])) == (("abcd.w@1",), ("pair.y",))
    assert ptx.uses(body[2]) == ("%r2", "abcd.x@1", "abcd.y@1", "abcd.z@1", "abcd.w@1")
    assert ptx.defs(body[3]) == ("pair.x", "pair.y")
    assert kernel.registers["abcd.z@1"] == ".s32"
