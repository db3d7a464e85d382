"""FlashAttention 1 to 4 as CuTe DSL kernels, and a simulator that runs the PTX they compile to.

Importing this package imports neither torch nor the DSL; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AttentionProblem": "cute_fa.problem",
    "Compiled": "cute_fa.build",
    "CuteFAError": "cute_fa.errors",
    "Target": "cute_fa.target",
    "can_run": "cute_fa.build",
    "compile": "cute_fa.build",
    "compile_many": "cute_fa.build",
    "flash_attn_func": "cute_fa.ops",
    "flash_attn_varlen_func": "cute_fa.ops",
    "get_target": "cute_fa.target",
    "load_bundle": "cute_fa.ops",
}
_SUBMODULES = ("asm", "build", "ops", "ptx", "quant", "reference", "sim", "testing")

__all__ = [*_EXPORTS, *_SUBMODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value  # found without this function from now on
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"cute_fa.{name}")
    raise AttributeError(f"module 'cute_fa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
