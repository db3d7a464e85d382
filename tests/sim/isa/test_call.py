"""Calls of vprintf, as the compiler makes them of device printf (PTX ISA 9.7.12.5)."""

import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.tiny import run


def text(string):
    return ", ".join(str(byte) for byte in string.encode()) + ", 0"


def call(name, result="mov.b32 %r9, 0;"):
    return f"""{{
        .param .b64 param0; .param .b64 param1; .param .b32 retval0;
        mov.b64 %rd8, {name}; cvta.global.u64 %rd9, %rd8;
        st.param.b64 [param0], %rd9; st.param.b64 [param1], %rd3;
        call.uni (retval0), vprintf, (param0, param1);
        {result}
    }}"""


def printed(capsys, form, body, **options):
    module = f".global .align 1 .b8 form[256] = {{{text(form)}}};"
    module += f".global .align 1 .b8 word[8] = {{{text('word')}}};"
    result = run(
        f"mov.b64 %rd2, frame; cvta.local.u64 %rd3, %rd2; setp.lt.u32 %p1, %lane, 2; {body}",
        module=module,
        declarations=".local .align 8 .b8 frame[64];",
        **options,
    )
    assert result.rules == []
    return capsys.readouterr().out


def test_each_active_lane_prints_its_arguments(capsys):
    body = f"""
        @!%p1 bra DONE;
        st.local.b32 [%rd2], %lane;
        mov.b64 %rd5, 0d3FF8000000000000; st.local.b64 [%rd2+8], %rd5;
        mov.b64 %rd5, -7; st.local.b64 [%rd2+16], %rd5;
        mov.b64 %rd5, word; cvta.global.u64 %rd5, %rd5; st.local.b64 [%rd2+24], %rd5;
        {call("form")}
        DONE:
    """
    out = printed(capsys, "lane %d: %5.2f|%lld|%-6s|100%%\n", body)
    assert out == "".join(f"lane {lane}:  1.50|-7|word  |100%\n" for lane in range(2))


@pytest.mark.parametrize(
    ("form", "value", "want"),
    [
        ("%u", "0xffffffff", "4294967295"),
        ("%i", "0xffffffff", "-1"),
        ("%#x", "255", "0xff"),
        ("%hd", "0x18000", "-32768"),
        ("%hhu", "0x1ff", "255"),
        ("%c", "65", "A"),
        ("%03d", "7", "007"),
        ("%.2d", "7", "07"),
    ],
)
def test_integer_specifications(capsys, form, value, want):
    body = f"""
        setp.ne.u32 %p1, %lane, 0; @%p1 bra DONE;
        mov.b32 %r3, {value}; st.local.b32 [%rd2], %r3; {call("form")}
        DONE:
    """
    assert printed(capsys, form, body) == want


def test_width_and_precision_from_arguments_and_no_arguments(capsys):
    body = f"""
        setp.ne.u32 %p1, %lane, 0; @%p1 bra DONE;
        mov.b32 %r3, 6; st.local.b32 [%rd2], %r3; mov.b32 %r3, 1; st.local.b32 [%rd2+4], %r3;
        mov.b64 %rd5, 0d4004000000000000; st.local.b64 [%rd2+8], %rd5; {call("form")}
        DONE:
    """
    assert printed(capsys, "[%*.*f]", body) == "[   2.5]"


def test_the_result_of_a_call_can_be_read(capsys):
    body = call("form", "ld.param.b32 %r9, [retval0];") + "st.global.b32 [%out], %r9;"
    assert printed(capsys, "x", body) == "x" * 32


def test_other_functions_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="a call of malloc"):
        run("{ .param .b64 p; .param .b64 r; call.uni (r), malloc, (p); }")
