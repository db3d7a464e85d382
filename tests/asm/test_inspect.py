"""The inspect screen and its dictionary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest

from cute_fa.asm import Inspection, inspect, inspect_kernel
from cute_fa.errors import InvalidArgumentError, MissingToolError
from cute_fa.target import KIB


def inspected(compiled, **changes) -> Inspection:
    arguments = {"threads": 256, "dynamic_smem_bytes": 8 * KIB, "target": compiled.arch, **changes}
    return inspect_kernel(compiled.ptx, compiled.cubin, **arguments)


def rules(found: Inspection) -> dict[str, str]:
    return {flag.rule: flag.severity for flag in found.flags}


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_100a"])
def test_everything_is_on_the_screen(compile_kernel: Callable, arch: str) -> None:
    compiled = compile_kernel(arch)
    found = inspected(compiled)
    assert found.kernel in compiled.ptx
    assert found.cubin_sha256 == hashlib.sha256(compiled.cubin).hexdigest()
    assert found.ptx_sha256 == hashlib.sha256(compiled.ptx.encode()).hexdigest()
    assert found.sass is not None
    assert found.sass.global_widths == {"loads": {4: 32}, "stores": {4: 1}}
    assert found.sass.hot_loop is not None
    assert found.sass.hot_loop.mix["mufu"] == 1
    assert found.ptx.hot_loop is not None
    assert rules(found)["local-memory"] == "warning"
    assert rules(found)["narrow-global-access"] == "note"
    assert [flag.severity for flag in found.flags] == sorted(
        (flag.severity for flag in found.flags), reverse=True
    )
    screen = found.render()
    assert found.resources is not None
    for expected in (
        found.kernel,
        arch,
        f"{found.resources.registers} per thread",
        "8192 B dynamic",
        f"{found.sass.instructions} instructions",
        f"{found.ptx.instructions} instructions",
        "32 × 4 B",
        found.sass.hot_loop.where,
        "[local-memory]",
    ):
        assert expected in screen, expected
    assert all(len(line) <= 80 or found.kernel in line for line in screen.splitlines())


def test_the_dictionary_survives_json(compile_kernel: Callable) -> None:
    found = inspected(compile_kernel("sm_80"))
    read = json.loads(json.dumps(found.as_dict()))
    assert read["resources"]["registers"] == found.resources.registers
    assert read["occupancy"]["ctas"] == found.occupancy.ctas
    assert read["ptx"]["loops"][0]["mix"] == found.ptx.loops[0].mix
    assert read["flags"][0]["rule"] == found.flags[0].rule


def test_without_a_cubin_the_ptx_is_analysed(compile_kernel: Callable) -> None:
    compiled = compile_kernel("sm_90a")
    found = inspect_kernel(compiled.ptx, None, threads=256, dynamic_smem_bytes=0, target="sm_90a")
    assert found.resources is found.sass is found.cubin_sha256 is found.occupancy is None
    assert found.ptx.mix["mufu"] == 1
    assert "no cubin was given" in found.render()
    assert rules(found) == {"local-variables": "note"}


def test_without_a_disassembler_the_rest_is_there(
    compile_kernel: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MissingToolError("nvdisasm is not installed", fix='pip install "cute-fa[inspect]"')

    monkeypatch.setattr(inspect, "sass", refuse)
    found = inspected(compile_kernel("sm_80"))
    assert found.sass is None
    assert found.resources is not None
    assert 'pip install "cute-fa[inspect]"' in " ".join(found.render().split())
    assert "PTX loops" in found.render()


def test_flags_of_resources(compile_kernel: Callable) -> None:
    compiled = compile_kernel("sm_90a")
    assert rules(inspected(compiled, threads=512))["too-many-threads"] == "warning"
    assert rules(inspected(compiled, dynamic_smem_bytes=300 * KIB))["does-not-fit"] == "warning"
    assert "does-not-fit" not in rules(inspected(compiled))


def test_flags_of_artefacts_that_do_not_belong_together(compile_kernel: Callable) -> None:
    old, new = compile_kernel("sm_80"), compile_kernel("sm_90a")
    assert "other-target" not in rules(inspected(new))
    assert rules(inspected(new, target="sm_90"))["other-target"] == "warning"
    arguments = {"threads": 256, "dynamic_smem_bytes": 0, "target": "sm_80"}
    mixed = inspect_kernel(old.ptx, new.cubin, **arguments)
    assert rules(mixed)["other-target"] == "warning"


def test_setmaxnreg_that_the_compiler_dropped_is_flagged(compile_kernel: Callable) -> None:
    kept = inspected(compile_kernel("sm_90a", roles=True))
    dropped = inspected(compile_kernel("sm_90a", roles=True, bounded=False))
    assert kept.resources is not None
    assert "by role 40, 232" in kept.render()
    assert "setmaxnreg-dropped" not in rules(kept)
    assert dropped.resources is not None
    assert dropped.resources.role_registers == ()
    assert rules(dropped)["setmaxnreg-dropped"] == "warning"


def test_a_kernel_must_be_named_where_there_are_several() -> None:
    header = ".version 8.8\n.target sm_80\n.address_size 64\n"
    two = header + ".entry one() { ret; }\n.entry two() { bar.sync 0; ret; }\n"
    arguments = {"threads": 32, "dynamic_smem_bytes": 0, "target": "sm_80"}
    with pytest.raises(InvalidArgumentError, match=r"(?s)which kernel.*one, two"):
        inspect_kernel(two, None, **arguments)
    with pytest.raises(InvalidArgumentError, match="no kernel of that name"):
        inspect_kernel(two, None, kernel="three", **arguments)
    found = inspect_kernel(two, None, kernel="two", **arguments)
    assert found.ptx.mix == {"sync": 1, "branch": 1}
    assert "red flags\n  none" in found.render()
