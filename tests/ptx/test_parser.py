"""Modules, kernels, declarations and statements."""

from __future__ import annotations

import pytest

from cute_fa import ptx

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def parse_body(body: str, target: str = "sm_90a") -> ptx.Kernel:
    text = HEADER.replace("sm_90a", target) + ".visible .entry k()\n{\n" + body + "\nret;\n}\n"
    return ptx.parse(text).kernels["k"]


def test_module_header() -> None:
    module = ptx.parse(
        "// made by hand\n.version 9.4\n.target sm_100a, debug\n.address_size 64\n"
        '.file 1 "a dir/kernel.py"\n\t.file\t2 "b;{.py", 1234, 77\n'
        ".visible .entry one() { ret; }\n.entry two() { ret; }\n"
    )
    assert module.version == (9, 4)
    assert module.target == "sm_100a"
    assert module.target_options == ("debug",)
    assert list(module.kernels) == ["one", "two"]
    assert module.files == {1: "a dir/kernel.py", 2: "b;{.py"}
    assert module.kernels["two"].line == 8


def test_parameters_are_laid_out_by_their_alignment() -> None:
    module = ptx.parse(
        HEADER
        + """
        .visible .entry k(
            .param .u32 k_param_0,
            .param .align 64 .b8 k_param_1[128],
            .param .b8 k_param_2,
            .param .u64 .ptr .global .align 16 k_param_3,
            .param .b64 .ptr k_param_4,
            .param .align 4 .b8 k_param_5[12],
            .param .f32 k_param_6
        )
        { ret; }"""
    )
    kernel = module.kernels["k"]
    assert [(p.name[-1], p.offset, p.nbytes, p.align) for p in kernel.params] == [
        ("0", 0, 4, 4),
        ("1", 64, 128, 64),
        ("2", 192, 1, 1),
        ("3", 200, 8, 8),
        ("4", 208, 8, 8),
        ("5", 216, 12, 4),
        ("6", 228, 4, 4),
    ]
    assert kernel.param_bytes == 232
    assert kernel.param("k_param_3").offset == 200
    with pytest.raises(KeyError):
        kernel.param("k_param_7")


def test_performance_directives() -> None:
    module = ptx.parse(
        HEADER
        + """
        .visible .entry k()
        .reqntid 384, 1, 1
        .maxntid 512
        .minnctapersm 1
        .maxnreg 168
        .explicitcluster
        .reqnctapercluster 2, 1, 1
        .pragma "first";
        {
            .pragma "nounroll";
            ret;
        }"""
    )
    kernel = module.kernels["k"]
    assert kernel.reqntid == (384, 1, 1)
    assert kernel.maxntid == (512, 1, 1)
    assert kernel.reqnctapercluster == (2, 1, 1)
    assert (kernel.minnctapersm, kernel.maxnreg) == (1, 168)
    assert kernel.directives["explicitcluster"] == ()
    assert kernel.directives["pragma"] == ("first", "nounroll")
    bare = ptx.parse(HEADER + ".entry k() { ret; }").kernels["k"]
    assert (bare.reqntid, bare.maxntid, bare.minnctapersm, bare.directives) == (
        None,
        None,
        None,
        {},
    )


def test_registers_are_those_that_are_used() -> None:
    kernel = parse_body(
        """
        .reg .pred %p<3>;
        .reg .b16 %rs<4>, named;
        .reg .b32 %r<1000000000>;
        .reg .b64 %rd<2>;
        .reg .b128 %rq<2>;
        .reg .f32 %f1;
        mov.b32 %r7, 1;
        mov.b128 %rq1, {%rd0, %rd1};
        @%p2 mov.b16 named, %rs0;
        """
    )
    assert kernel.registers == {
        "named": ".b16",
        "%f1": ".f32",
        "%r7": ".b32",
        "%rq1": ".b128",
        "%rd0": ".b64",
        "%rd1": ".b64",
        "%p2": ".pred",
        "%rs0": ".b16",
    }


def test_variables() -> None:
    module = ptx.parse(
        HEADER
        + """
        .extern .shared .align 1024 .b8 __dynamic_shmem__0[];
        .shared .align 16 .b8 buffer[4][64], flag[1];
        .visible .global .align 4 .u32 table[4] = {1, 0x10, -1};
        .const .f32 half = 0f3F000000;
        .global .align 8 .u64 pointer = table+4;
        .global .align 2 .b8 nested[2][2] = {{1, 2}, {3, 4}};
        .visible .entry k()
        {
            .local .align 16 .b8 __local_depot0[48];
            .shared .b32 counter;
            .reg .b64 %SP, %SPL;
            mov.b64 %SPL, __local_depot0;
            cvta.local.u64 %SP, %SPL;
            st.shared.b32 [counter], 0;
            ret;
        }"""
    )
    dynamic = module.shared_vars["__dynamic_shmem__0"]
    assert (dynamic.nbytes, dynamic.align, dynamic.is_extern) == (0, 1024, True)
    assert (module.shared_vars["buffer"].nbytes, module.shared_vars["buffer"].align) == (256, 16)
    assert (module.shared_vars["flag"].nbytes, module.shared_vars["flag"].is_extern) == (1, False)
    table = module.global_vars["table"]
    assert (table.nbytes, table.space, table.type) == (16, "global", ".u32")
    assert ptx.initial_bytes(table) == bytes.fromhex("01000000 10000000 ffffffff 00000000")
    assert ptx.initial_bytes(module.global_vars["half"]) == bytes.fromhex("0000003f")
    assert ptx.initial_bytes(module.global_vars["nested"]) == bytes([1, 2, 3, 4])
    assert module.global_vars["pointer"].init == (ptx.Symbol("table", 4),)
    with pytest.raises(ValueError, match="address of table"):
        ptx.initial_bytes(module.global_vars["pointer"])
    kernel = module.kernels["k"]
    assert kernel.local_vars["__local_depot0"].nbytes == 48
    assert kernel.shared_vars["counter"].nbytes == 4
    assert kernel.body[0].operands == (ptx.Reg("%SPL"), ptx.Symbol("__local_depot0"))


def test_statements_end_at_semicolons_not_at_lines() -> None:
    kernel = parse_body(
        """.reg .b32 %r<20>;
        // a comment; with a semicolon { and a brace
        mov.b32 %r1, 0; mov.b32 %r2, 1; /* between
        lines; */ mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {%r1, %r2, %r3, %r4},
            {%r5, %r6, %r7, %r8}, // A
            {%r9, %r10},
            {%r1, %r2, %r3, %r4};
        add
          .s32 %r1, %r2, %r3;"""
    )
    first, second, mma, add, _ = kernel.body
    assert (first.line, second.line, mma.line, add.line) == (8, 8, 9, 14)
    assert mma.text == (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, "
        "{%r5, %r6, %r7, %r8}, {%r9, %r10}, {%r1, %r2, %r3, %r4}"
    )
    assert mma.opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert mma.parts[:4] == ("mma", "sync", "aligned", "m16n8k16")
    assert mma.op == "mma"
    assert len(mma.operands) == 4
    assert add.opcode == "add.s32"
    assert [i.index for i in kernel.body] == [0, 1, 2, 3, 4]


def test_guards() -> None:
    kernel = parse_body(
        """.reg .pred %p<3>;
        .reg .b32 %r<3>;
        @%p1 mov.b32 %r1, 0;
        @!%p2 mov.b32 %r1, 0;
        mov.b32 %r1, 0;"""
    )
    assert [i.guard for i in kernel.body[:3]] == [
        ptx.Guard("%p1", False),
        ptx.Guard("%p2", True),
        None,
    ]
    assert kernel.body[1].text == "@!%p2 mov.b32 %r1, 0"


def test_opcodes_with_double_colons_and_unknown_ones() -> None:
    kernel = parse_body(
        """.reg .b32 %r<3>;
        cp.async.bulk.wait_group.read 0;
        tcgen05.wait::ld.sync.aligned;
        ld.global.L1::no_allocate.L2::128B.b32 %r1, [%r2];
        frobnicate.sync.kind::novel.b32 %r1, [%r2+4], 7;""",
        target="sm_100a",
    )
    assert kernel.body[1].parts == ("tcgen05", "wait::ld", "sync", "aligned")
    assert kernel.body[2].parts[2:4] == ("L1::no_allocate", "L2::128B")
    assert kernel.body[3].opcode == "frobnicate.sync.kind::novel.b32"
    assert kernel.body[3].operands == (
        ptx.Reg("%r1"),
        ptx.Address(ptx.Reg("%r2"), 4),
        ptx.Imm(7),
    )


def test_source_lines() -> None:
    module = ptx.parse(
        HEADER + ".visible .entry k()\n{\n"
        "\t.reg .b32 %r<2>;\n"
        "\tmov.b32 %r0, 1;\n"
        "\t.loc\t1 42 9\n"
        "$L__tmp0:\n"
        "\tmov.b32 %r0, 2;\n"
        "\t.loc\t2 7 0, function_name $L__info_string0, inlined_at 1 43 1\n"
        "\tmov.b32 %r0, 3;\n"
        "\tret;\n"
        "$L__func_end0:\n"
        "}\n"
        '\t.file\t1 "kernel.py"\n'
        "\t.section\t.debug_abbrev\n"
        "\t{\n"
        ".b8 1                                   // Abbreviation Code\n"
        "$L__x:\n"
        ".b8 17\n"
        "\t}\n"
    )
    body = module.kernels["k"].body
    assert [i.loc for i in body] == [None, (1, 42), (2, 7), (2, 7), (2, 7)]
    assert module.source_of(body[0]) is None
    assert module.source_of(body[1]) == "kernel.py:42"
    assert module.source_of(body[2]) == "file 2:7"


def test_functions_are_named_and_calls_are_instructions() -> None:
    module = ptx.parse(
        HEADER
        + """
        .extern .func  (.param .b32 func_retval0) vprintf
        (
            .param .b64 vprintf_param_0,
            .param .b64 vprintf_param_1
        )
        ;
        .visible .func helper(.param .b32 x) { .reg .b32 %r<2>; { mov.b32 %r1, 0; } ret; }
        .visible .entry k()
        {
            .reg .b32 %r<3>;
            .reg .b64 %rd<3>;
            { // callseq 0
            .param .b64 param0;
            st.param.b64 [param0], %rd1;
            .param .b32 retval0;
            call.uni (retval0), vprintf, (param0, %rd2);
            ld.param.b32 %r1, [retval0];
            }
            call helper, (%r1);
            ret;
        }"""
    )
    assert module.functions == ("vprintf", "helper")
    assert list(module.kernels) == ["k"]
    kernel = module.kernels["k"]
    assert list(kernel.param_vars) == ["param0@1", "retval0@1"]
    call = kernel.body[1]
    assert call.operands == (
        ptx.Vector((ptx.Symbol("retval0@1"),)),
        ptx.Symbol("vprintf"),
        ptx.Vector((ptx.Symbol("param0@1"), ptx.Reg("%rd2"))),
    )
    assert ptx.uses(call) == ("%rd2",)
    assert ptx.uses(kernel.body[3]) == ("%r1",)


def test_a_body_that_could_run_off_its_end_gets_a_ret() -> None:
    text = HEADER + ".entry k() {\n.reg .pred %p;\n@%p bra END;\n@%p ret;\nEND:\n}\n"
    kernel = ptx.parse(text).kernels["k"]
    assert [i.text for i in kernel.body] == ["@%p bra END", "@%p ret", "ret"]
    assert kernel.labels == {"END": 2}
    assert kernel.body[2].line == 9
    assert [i.text for i in ptx.parse(HEADER + ".entry k() { }").kernels["k"].body] == ["ret"]


def test_shared_memory_declared_inside_a_kernel_may_be_extern() -> None:
    kernel = parse_body(".extern .shared .align 128 .b8 dynamic[];")
    assert kernel.shared_vars["dynamic"].is_extern
    assert kernel.shared_vars["dynamic"].align == 128


def test_windows_line_ends() -> None:
    text = HEADER + ".entry k() {\n.reg .b32 %r<2>;\n// note\nmov.b32 %r1, 5;\n ret;\n}\n"
    kernel = ptx.parse(text.replace("\n", "\r\n")).kernels["k"]
    assert kernel.body[0].operands == (ptx.Reg("%r1"), ptx.Imm(5))
    assert kernel.body[0].line == 7
