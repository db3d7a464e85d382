"""The toolchain: the DSL's flavour by its own rule, versions, C compiler."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from cute_fa.build import toolchain as tools
from cute_fa.build.toolchain import check_loaded_flavour, installed_flavours, toolchain
from cute_fa.errors import CompileError, MissingToolError
from tests.processes import run_python


@pytest.mark.parametrize(
    ("installed", "driver", "flavour", "why"),
    [
        ((12,), None, "cu12", "the only one installed; no CUDA driver"),
        ((12, 13), None, "cu13", "the newest of cu12, cu13; no CUDA driver"),
        ((12, 13), (12, 9), "cu12", "the newest of cu12, cu13 for a CUDA 12.9 driver"),
        ((12, 13), (13, 0), "cu13", "the newest of cu12, cu13 for a CUDA 13.0 driver"),
        ((12,), (13, 1), "cu12", "the newest of cu12 for a CUDA 13.1 driver"),
    ],
)
def test_flavour(
    installed: tuple[int, ...], driver: tuple[int, int] | None, flavour: str, why: str
) -> None:
    assert tools._choose_flavour(installed, driver) == (flavour, why)


@pytest.mark.parametrize(
    ("installed", "driver", "message"),
    [((), None, "no libraries installed"), ((13,), (12, 9), "runs on this CUDA driver")],
)
def test_no_usable_flavour(
    installed: tuple[int, ...], driver: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(MissingToolError, match=message):
        tools._choose_flavour(installed, driver)


def test_the_prediction_is_what_the_dsl_loads() -> None:
    """In a process of its own, because the simulator's devices pretend to be a driver."""
    program = (
        "import cutlass\n"
        "from cute_fa.build.toolchain import check_loaded_flavour, toolchain\n"
        "check_loaded_flavour(toolchain().flavour)\n"
        "print(toolchain().dsl == cutlass.__version__)"
    )
    assert run_python(program).stdout.strip() == "True"


def test_another_flavour_than_predicted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(__file__="/x/_cutlass_ir.cu13.cpython-311-x86_64-linux-gnu.so")
    monkeypatch.setitem(sys.modules, "cutlass._mlir._mlir_libs._cutlass_ir", loaded)
    check_loaded_flavour("cu13")
    with pytest.raises(CompileError, match=r"cu13(.|\n)*cu12"):
        check_loaded_flavour("cu12")


def test_this_installation() -> None:
    found = toolchain()
    assert found.flavour in [f"cu{major}" for major in installed_flavours()]
    parts = found.key_parts()
    assert parts["ptxas"] == f"{found.flavour} {found.libraries}"
    assert all(parts.values())
    assert tools.runtime_library().name == "libcute_dsl_runtime.so"


def test_a_missing_package_names_the_command() -> None:
    with pytest.raises(MissingToolError, match="pip install it"):
        tools._version("cute-fa-no-such-package", "pip install it")


def test_cc_chooses_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    usual = tools.c_compiler()
    assert usual is not None
    monkeypatch.setenv("CC", usual)
    assert tools.c_compiler() == usual
    monkeypatch.setenv("CC", "no-such-compiler")
    assert tools.c_compiler() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert tools.c_compiler() is None
