"""Cubins to analyse: one small CuTe DSL kernel, compiled for several architectures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

KERNEL = Path(__file__).parent / "kernels" / "gather_kernel.py"


@dataclass(frozen=True)
class Compiled:
    arch: str
    ptx: str
    cubin: bytes


@pytest.fixture(scope="session")
def compile_kernel(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Compiled]:
    """``compile_kernel(arch, roles=False, bounded=True)``; compiles each kind once."""
    cutlass = pytest.importorskip("cutlass")
    import cuda.bindings.driver as cuda
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor

    spec = importlib.util.spec_from_file_location("gather_kernel", KERNEL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done: dict[tuple[str, bool, bool], Compiled] = {}

    def compile_once(arch: str, *, roles: bool = False, bounded: bool = True) -> Compiled:
        key = (arch, roles, bounded)
        if key not in done:
            folder = tmp_path_factory.mktemp("asm")
            tensors = [
                make_fake_compact_tensor(cutlass.Float32, (cute.sym_int32(),), stride_order=(0,))
                for _ in range(2)
            ]
            compiled = cute.compile(
                module.Gather(roles, bounded),
                *tensors,
                cuda.CUstream(0),
                options=f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}",
            )
            done[key] = Compiled(arch, compiled.artifacts.PTX, compiled.artifacts.CUBIN)
        return done[key]

    return compile_once
