"""Malformed text: the message names the line and points at the place."""

from __future__ import annotations

import random

import pytest

from cute_fa import ptx
from cute_fa.errors import CuteFAError

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
ENTRY = ".entry k()\n{\n.reg .pred %p<4>;\n.reg .b32 %r<4>;\n"
BODY_LINE = 8


def broken_body(statement: str) -> ptx.PtxSyntaxError:
    text = HEADER + ENTRY + statement + "\nret;\n}\n"
    with pytest.raises(ptx.PtxSyntaxError) as caught:
        ptx.parse(text)
    return caught.value


# ^ stands below the caret's column in the line above it.
@pytest.mark.parametrize(
    ("statement", "caret", "what"),
    [
        ("add.s32 %r1, %r2, %r9;", "                  ^", "register %r9 is not declared"),
        ("add.s32 %r1, %q2, %r3;", "             ^", "register %q2 is not declared"),
        ("add.s32 %r1, [%r2, %r1;", "             ^", "not well-formed"),
        ("add.s32 %r1, , %r2;", "             ^", "operand is missing"),
        ("add.s32 %r1, %r2,;", "                 ^", "operand is missing"),
        ("mov.b64 {%r1, }, %r2;", "              ^", "operand is missing"),
        ("mov.b32 %r1, 0x1G;", "             ^", "0x1G is not a number"),
        ("mov.b32 %r1, 0f3F80;", "             ^", "0f3F80 is not a number"),
        ("mov.b32 %r1, 089;", "             ^", "octal"),
        ("ld.shared.b32 %r1, [%r12+4];", "                    ^", "%r12 is not declared"),
        ("ld.shared.b32 %r1, [%r1+x];", "                        ^", "x is not an integer"),
        ("mov.b32 %r1, %tid.w.x;", "             ^", "not well-formed"),
        ("mov.b32 %r1, %r2.x;", "             ^", "%r2 has no component .x"),
        ("mov.b32 %r1|%r2|%r3, 0;", "        ^", "more than two destinations"),
        ("mov.b32 %r1, !7;", "             ^", "negated"),
        ("bra NOWHERE;", "    ^", "label NOWHERE is not defined"),
        ("bra %r1;", "^", "names no label"),
        ("@%p9 mov.b32 %r1, 0;", " ^", "predicate %p9 is not declared"),
        ("@%r1 mov.b32 %r1, 0;", " ^", "%r1 is no predicate"),
        ("@%p1;", "^", "guard without an instruction"),
        ("MOV.B32 %r1, 0;", "^", "no instruction"),
        (".reg .b32 %x, 9;", "             ^", "register name is not well-formed"),
        (".reg .b32 %x, %x;", "             ^", "declared twice"),
        (".reg .b32 %r<3>;", "          ^", "declared twice"),
        (".local .align 8 buffer[4];", "^", "declaration is not well-formed"),
        (".local .b8 buffer[4] 7;", "                     ^", "declaration is not well-formed"),
        (".local .align 24 .b8 buffer[4];", "              ^", "24 is no alignment"),
        (".reg .v4 .b32 %v<99999999>;", "              ^", "more than 65536 vector registers"),
        (".surprise 1;", "^", "unknown directive .surprise"),
        ("L: L: ret;", "   ^", "label L is defined twice"),
        ("mov.b32 %r1, 0 {", "^", "does not end"),
    ],
)
def test_error_points_at_the_place(statement: str, caret: str, what: str) -> None:
    error = broken_body(statement)
    assert what in str(error)
    assert error.line == BODY_LINE
    assert error.column == len(caret)
    assert error.source_line == statement
    assert f"PTX line {BODY_LINE}" in str(error)
    excerpt = str(error).splitlines()[1:3]
    assert excerpt == [f"  {BODY_LINE} | {statement}", f"    | {caret}"]


def test_caret_stands_right_behind_tabs() -> None:
    error = broken_body("\tadd.s32 \t%r1, %r2, %r9;")
    _, shown, caret = str(error).splitlines()[:3]
    assert shown[caret.index("^") :] == "%r9;"


def test_caret_is_on_the_right_line_of_a_long_statement() -> None:
    error = broken_body("mma.sync.aligned\n  {%r1, %r2},\n  {%r1, %r7};")
    assert error.line == BODY_LINE + 2
    assert error.source_line == "  {%r1, %r7};"
    assert error.column == 9


def test_a_forgotten_semicolon_is_named() -> None:
    error = broken_body("add.s32 %r1, %r2, %r3\nsub.s32 %r1, %r2, %r3;")
    assert error.line == BODY_LINE
    assert "end it with ;" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "no .version"),
        (".target sm_80\n.entry k() { ret; }", 1, "no .version"),
        (".version 8.8\n.entry k() { ret; }", 1, "no .target"),
        (".version eight\n", 1, ".version directive is not well-formed"),
        (".version 8.8\n.target sm_80\n.address_size 32\n", 3, "only 64-bit"),
        (HEADER + "nonsense", 4, "no directive here"),
        (HEADER + ".frobnicate 7;", 4, "unknown module-level directive .frobnicate"),
        (HEADER + ".entry k()", 4, "has no body"),
        (HEADER + ".entry k() {\nret;\n", 5, "never closed"),
        (HEADER + ".entry k() { ret; }\n.entry k() { ret; }", 5, "defined twice"),
        (HEADER + ".entry k(.param .b32) { ret; }", 4, "parameter is not well-formed"),
        (HEADER + ".entry k(.param .align 0 .b8 a[4]) { ret; }", 4, "0 is no alignment"),
        (HEADER + ".entry k(.param .b32 a,, .param .b32 b) { ret; }", 4, "parameter is missing"),
        (HEADER + ".entry k() { ret; } /* open", 4, "comment is never closed"),
        (HEADER + ".shared .b8 x[4]", 4, "does not end"),
        (HEADER + ".section .debug {\n.b8 1", 4, "never closed"),
    ],
)
def test_module_level_errors(text: str, line: int, what: str) -> None:
    with pytest.raises(ptx.PtxSyntaxError, match=what) as caught:
        ptx.parse(text)
    assert caught.value.line == line


def test_it_is_of_the_one_family_and_a_value_error() -> None:
    error = broken_body("add.s32 %r1, %r2, %r9;")
    assert isinstance(error, CuteFAError)
    assert isinstance(error, ValueError)


WELL_FORMED = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.global .align 4 .b32 table[2] = {1, 0f3F800000};
.visible .entry k(.param .align 64 .b8 k_param_0[128], .param .u64 .ptr .align 16 out)
.reqntid 128, 1, 1
{
\t.reg .pred %p<3>;
\t.reg .b32 %r<9>;
\t.reg .v2 .b32 pair;
\t.local .align 8 .b8 depot[16];
\t.loc\t1 4 0
\tmov.u32 \t%r1, %tid.x; // thread
$L_LOOP:
\tld.shared.v2.b32 \t{%r2, _}, [%r1+-8];
\tmov.b32 pair.x, 0x10;
\tshfl.sync.bfly.b32 %r3|%p1, %r2, 1, 31, -1;
\t{ .reg .pred P1; LAB: setp.ne.s32 P1, %r3, -2; @!P1 bra LAB; }
\tcp.async.bulk.tensor.2d.shared::cta.global.tile.bulk_group [%r1], [k_param_0, {%r2, 3}];
\t@%p1 bra \t$L_LOOP;
\tret;
}
.file 1 "kernel.py"
"""


def test_damaged_text_is_parsed_or_refused_but_never_crashes() -> None:
    ptx.parse(WELL_FORMED)
    rng = random.Random(3)
    refused = 0
    for _ in range(3000):
        text = WELL_FORMED
        for _ in range(rng.randrange(1, 4)):
            at, end = rng.randrange(len(text)), rng.randrange(len(text))
            scrap = rng.choice([*';{}[](),.:@!%|_-0x<>"/*\n ', "", text[end : end + 12]])
            text = text[:at] + scrap + text[at + rng.randrange(5) :]
        try:
            module = ptx.parse(text)
        except ptx.PtxSyntaxError as error:
            refused += 1
            assert 1 <= error.line <= text.count("\n") + 1
            assert 1 <= error.column <= len(error.source_line) + 2
        else:
            for kernel in module.kernels.values():
                ptx.liveness(kernel, ptx.basic_blocks(kernel))
    assert 1500 < refused < 3000
