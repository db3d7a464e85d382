"""Files stay under 600 lines, functions under 120 (a kernel's set-up under 200), ten parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for part in ("cute_fa", "tests", "tools", "benchmarks")
    for path in ROOT.glob(f"{part}/**/*.py")
)
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_PARAMETERS = 600, 120, 200, 10


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {d.attr for d in node.decorator_list if isinstance(d, ast.Attribute)}
    return bool(names & {"jit", "kernel"})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE, f"{path}: over {MAX_FILE} lines; find the seam and split"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        limit = MAX_KERNEL if is_kernel(node) else MAX_FUNCTION
        assert lines <= limit, (
            f"{path}:{node.lineno}: {node.name} has {lines} lines (limit {limit})"
        )
        arguments = node.args
        positional = len(arguments.posonlyargs) + len(arguments.args)
        positional -= bool(arguments.args and arguments.args[0].arg in ("self", "cls"))
        # Keyword-only parameters of the public functions follow the flash_attn convention.
        keyword = 0 if is_public_api(node) else len(arguments.kwonlyargs)
        # A kernel's entry point takes one parameter per tensor and scalar of its launch.
        if is_kernel(node) and node.name in ("__call__", "kernel"):
            continue
        assert positional + keyword <= MAX_PARAMETERS, (
            f"{path}:{node.lineno}: {node.name} has {positional + keyword} parameters"
        )


def is_public_api(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    # The references take the public function's keywords beside their own tile sizes, and the
    # quantiser its lengths.
    public = ("flash_attn_func", "flash_attn_varlen_func", "quantize_varlen_qkv", "compile")
    return node.name in (*public, "forward")
