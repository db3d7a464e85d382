"""A file imports from its own floor or below, never upward (the floors are listed here)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "cute_fa"

BOTTOM = {"problem", "varlen", "exp2", "target", "errors", "env"}
RUNGS = {"fa1", "fa2", "fa3", "fa4", "shared"}

# floor → the cute_fa parts it may import besides itself
MAY_IMPORT = {
    **dict.fromkeys(BOTTOM, BOTTOM),
    "quant": BOTTOM,
    "reference": BOTTOM | {"quant"},
    "ptx": BOTTOM,
    "asm": BOTTOM | {"ptx"},
    "sim": BOTTOM | {"ptx"},
    "blocks": BOTTOM,
    **{rung: BOTTOM | {"blocks"} for rung in RUNGS},
    "build": BOTTOM | {"ptx", "asm", "sim", "blocks"} | RUNGS,
    "testing": BOTTOM | {"ptx", "sim", "quant", "reference"},
    "ops": BOTTOM | {"ptx", "asm", "sim", "build", "quant", "reference"},
    "integrations": BOTTOM | {"ops"},
    "bench": BOTTOM | {"asm", "sim", "build", "reference", "testing", "ops"},
    "gpu_check": BOTTOM | {"sim", "build", "quant", "reference", "testing", "ops", "bench"},
    "cli": BOTTOM
    | {"ptx", "asm", "sim", "build", "reference", "testing", "ops"}
    | {"bench", "gpu_check"},
    "__init__": set(),
    "__main__": {"cli"},
}

# floor → third-party packages it may import; anything else is the standard library
HEAVY = {"torch", "numpy", "cutlass", "cuda", "tvm_ffi"}
MAY_USE = {
    "quant": {"torch"},
    "reference": {"torch"},
    "testing": {"torch", "numpy"},
    "sim": {"numpy"},
    "blocks": {"cutlass", "cuda"},
    **{rung: {"cutlass", "cuda"} for rung in RUNGS},
    "build": {"torch", "cutlass", "cuda", "tvm_ffi"},
    "ops": {"torch"},
    "integrations": {"torch"},
    "bench": {"torch", "tvm_ffi"},
    "gpu_check": {"torch"},
    "cli": {"torch", "numpy", "cuda", "cutlass"},
}
# The seam between the DSL and the simulator: the only simulator files that know either.
SEAM = {"device", "hosts", "linking", "tensors", "runtime", "torch_cuda", "cuda_driver"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether at module level) of every import in the file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use absolute imports"
            module = node.module or ""
            yield module, node.lineno, id(node) in top
            if module == "cute_fa":
                for alias in node.names:
                    yield f"cute_fa.{alias.name}", node.lineno, id(node) in top


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_point_upward(path: Path) -> None:
    floor = floor_of(path)
    assert floor in MAY_IMPORT, f"{path}: the part {floor!r} is on no floor; add it to this test"
    for module, line, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "cute_fa" or len(parts) == 1:
            continue
        assert parts[1] == floor or parts[1] in MAY_IMPORT[floor], (
            f"{path}:{line}: {floor} must not import {module}"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_on_their_floor(path: Path) -> None:
    floor = floor_of(path)
    allowed = MAY_USE.get(floor, set())
    if path.name == "config.py" and floor in RUNGS:
        allowed = set()
    for module, line, at_top in imports(path):
        package = module.split(".")[0]
        if package not in HEAVY or package in allowed:
            continue
        in_seam = floor == "sim" and path.stem in SEAM and not at_top
        assert in_seam, f"{path}:{line}: {floor} must not import {package}"


def test_a_rung_never_imports_another_rung() -> None:
    for rung in RUNGS:
        assert not (MAY_IMPORT[rung] & RUNGS)


def test_only_env_reads_the_environment() -> None:
    readers = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sources()
        if path.name != "env.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "os.getenv" in line or "environ.get" in line
    ]
    assert not readers, f"read the environment in cute_fa/env.py only: {readers}"
