"""What two kernels differ in: figures, and a diff that does not drown in renamed registers."""

from __future__ import annotations

import json

import pytest

from cute_fa.asm import diff as asm_diff
from cute_fa.asm.diff import Version, diff, normalised
from cute_fa.asm.tools import find_tool
from cute_fa.errors import InvalidArgumentError, MissingToolError
from cute_fa.ptx import PtxSyntaxError

PTX = """
.version 8.8
.target sm_80
.address_size 64
// a comment
.visible .entry a_very_long_name(.param .u64 a_very_long_name_param_0)
{
    .reg .b32 %r<9>;
    .reg .pred %p<2>;
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, 0;
$L__BB0_1:
    add.s32 %r3, %r1, %r2;   // the sum
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p1, %r2, 10;
    @%p1 bra $L__BB0_1;
    ret;
}
"""
RENAMED = PTX.replace("%r3", "%r7").replace("a_very_long_name", "other").replace("BB0_1", "BB5_4")
FASTER = RENAMED.replace("    add.s32 %r7, %r1, %r2;   // the sum\n", "")


def test_renamed_is_equal() -> None:
    found = diff(Version("a", PTX), Version("b", RENAMED))
    assert found.is_empty and found.changed == {} and found.ptx == ()
    kept = diff(Version("a", PTX), Version("b", RENAMED), registers=True)
    assert not kept.is_empty and any("%r7" in line for line in kept.ptx)


def test_a_missing_instruction_shows() -> None:
    found = diff(Version("before", PTX), Version("after", FASTER), context=0)
    assert not found.is_empty
    assert found.figures["PTX"]["instructions"] == (7, 6)
    assert found.changed["PTX hot loop"]["instructions"] == (4, 3)
    assert found.changed["PTX"]["int"][0] - found.changed["PTX"]["int"][1] == 1  # type: ignore
    assert found.ptx[:2] == ("--- before", "+++ after")
    changes = [line for line in found.ptx[2:] if not line.startswith("@@")]
    assert changes == ["-    add.s32 %r, %r, %r;"]


def test_what_a_version_lacks_is_none() -> None:
    found = diff(Version("a", PTX, launch={"threads": 128}), Version("b", PTX, launch={"ctas": 2}))
    assert found.figures["launch"] == {"threads": (128, None), "ctas": (None, 2)}
    assert json.loads(json.dumps(found.as_dict()))["figures"]["launch"]["ctas"] == [None, 2]


def test_lines_that_say_nothing_are_left_out() -> None:
    lines = normalised(PTX.replace("mov.u32 %r2, 0;", ".loc 1 2 3\n    mov.u32 %r2, 0;"), False)
    text = "\n".join(lines)
    assert "comment" not in text and ".loc" not in text and "a_very_long_name" not in text
    assert all(line.strip() for line in lines)
    assert "$L:" in lines and "    @%p bra $L;" in lines


def test_bad_versions() -> None:
    with pytest.raises(InvalidArgumentError, match="nothing in common"):
        diff(Version("a", PTX), Version("b", launch={"threads": 3}))
    with pytest.raises(PtxSyntaxError):
        diff(Version("a", PTX), Version("b", "this is not PTX"))
    with pytest.raises(InvalidArgumentError, match="cubin"):
        diff(Version("a", cubin=b"x"), Version("b", cubin=b"x"))
    two = PTX + PTX.split(".address_size 64")[1].replace("a_very_long_name", "second")
    with pytest.raises(InvalidArgumentError, match="must hold one kernel"):
        diff(Version("a", two), Version("b", PTX))


def test_cubins(compile_kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, roles = compile_kernel("sm_90a"), compile_kernel("sm_90a", roles=True)
    sides = Version("plain", None, plain.cubin), Version("roles", None, roles.cubin)
    found = diff(*sides)
    assert found.changed["resources"]["setmaxnreg 0"][0] is None
    assert found.figures["resources"]["registers"][0] > 0  # type: ignore[operator]
    try:
        find_tool("nvdisasm")
    except MissingToolError:
        assert found.notes and "SASS" not in found.figures
    else:
        assert found.changed["SASS"]["instructions"][0] > 0  # type: ignore[operator]

        def missing(cubin: bytes) -> None:
            raise MissingToolError("nvdisasm is not installed", fix="install it")

        monkeypatch.setattr(asm_diff, "sass", missing)
        without = diff(*sides)
        assert without.notes == ("no SASS: nvdisasm is not installed; install it",)
        assert "SASS" not in without.figures and "resources" in without.figures
