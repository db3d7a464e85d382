"""`import cute_fa` and the command line load neither torch nor the DSL."""

from __future__ import annotations

import pytest

from tests.processes import run_python

SHOW_HEAVY = (
    "import sys; print(*(m for m in ('torch', 'cutlass', 'numpy', 'tvm_ffi') if m in sys.modules))"
)


@pytest.mark.parametrize(
    "program",
    ["import cute_fa", "import cute_fa; dir(cute_fa)", "import cute_fa.cli.main"],
)
def test_no_heavy_import(program: str) -> None:
    assert run_python(f"{program}; {SHOW_HEAVY}").stdout.strip() == ""


def test_unknown_name_is_an_attribute_error() -> None:
    import cute_fa

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cute_fa.no_such_name


def test_every_exported_name_resolves() -> None:
    import cute_fa

    for name in cute_fa.__all__:
        assert getattr(cute_fa, name) is not None
