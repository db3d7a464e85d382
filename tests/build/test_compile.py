"""compile(): any architecture on any machine, verified artefacts, one compile per kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fa import sim
from cute_fa.build import KernelCache, KernelEntry, compile, compile_many
from cute_fa.build.compile import (
    Request,
    _verify,
    compile_request,
    dtype_name,
    lookup,
    make_request,
)
from cute_fa.build.parallel import to_json
from cute_fa.errors import (
    CompileError,
    InvalidArgumentError,
    InvalidTypeError,
    UnsupportedError,
)
from cute_fa.ops import flash_attn_func, sources
from cute_fa.problem import AttentionProblem
from cute_fa.target import TARGETS

KERNELS = Path(__file__).parent / "kernels"


def with_kernels(program: str) -> str:
    return f"import sys; sys.path.insert(0, {str(KERNELS)!r})\n{program}"


def tiny_compile(arch: str = "sm_80", **changes: Any):
    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 64, **changes}
    return compile("tiny", arch=arch, **arguments)


@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch != "sm_87"])
def test_every_architecture_cross_compiles_here(tiny: KernelEntry, arch: str) -> None:
    compiled = tiny_compile(arch)
    assert re.findall(r"^\.target (\w+)", compiled.ptx, re.MULTILINE) == [arch]
    assert compiled.cubin[:4] == b"\x7fELF" and compiled.host_object[:4] == b"\x7fELF"
    assert f".entry {compiled.kernel_name}(" in compiled.ptx
    assert compiled.kernel_name.encode() in compiled.cubin
    assert compiled.arch == arch and compiled.target is TARGETS[arch]
    assert compiled.label == f"tiny fwd {arch} bfloat16 d64"


def test_the_second_compile_is_the_first_one(tiny: KernelEntry, cache: KernelCache) -> None:
    assert tiny_compile() is tiny_compile(dtype="bf16", head_dim_v=64, window_size=(None, -1))
    assert len(cache.entries()) == 1


def test_every_difference_that_matters_is_its_own_entry(
    tiny: KernelEntry, cache: KernelCache
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"arch": "sm_89"},
        {"dtype": torch.float16},
        {"head_dim": 72},
        {"line_info": True},
        {"num_threads": 64},
        {"factor": 3.0},
    ]
    keys = {tiny_compile(**change).key for change in changes}
    assert len(keys) == len(changes) == len(cache.entries())


def test_no_shape_reaches_the_key() -> None:
    """Batch, lengths, head counts, scale and window sizes share one kernel."""
    shapes = [
        (1, 1, 1, 1, 1, 5, None, None),
        (7, 513, 2049, 25, 5, 64, 0.5, 30.0),
        (2, 0, 8192, 32, 1, 1, 1.0, 50.0),
    ]
    keys = set()
    for batch, seqlen_q, seqlen_k, heads_q, heads_k, left, scale, cap in shapes:
        problem = AttentionProblem(
            batch, seqlen_q, seqlen_k, heads_q, heads_k, 64, 64, "float16", causal=True,
            window_left=left, softcap=cap or 1.0, softmax_scale=scale,
        )  # fmt: skip
        request = make_request(
            "fa2", "fwd", arch="sm_80", dtype="float16", head_dim=64, causal=True,
            window_size=(left, -1), softcap=cap or 1.0,
        )  # fmt: skip
        assert request.variant == problem.variant
        keys.add(request.key)
    assert len(keys) == 1


def test_no_shape_compiles_again(cache: KernelCache) -> None:
    """The same through the torch function: one entry for every batch, length and head count."""
    sources.kernel.cache_clear()  # what this process may hold from another cache directory
    sizes = [(1, 5, 5, 1, 1), (2, 17, 40, 4, 2), (1, 70, 3, 3, 3), (3, 1, 64, 6, 1)]
    for batch, seqlen_q, seqlen_k, heads_q, heads_k in sizes:
        q = torch.randn(batch, seqlen_q, heads_q, 32, dtype=torch.float16)
        k, v = torch.randn(2, batch, seqlen_k, heads_k, 32, dtype=torch.float16)
        for scale in (None, 0.5):
            flash_attn_func(q, k, v, generation="fa2", softmax_scale=scale)
    assert [entry.label for entry in cache.entries()] == ["fa2 fwd sm_80 float16 d32"]


HIT = """
import json
from cute_fa.build.compile import compile_request
from cute_fa.build.parallel import from_json
compiled = compile_request(from_json(json.loads(sys.argv[1])))
assert compiled.ptx and compiled.cubin
print(compiled.key, *(m for m in ("cutlass", "torch", "numpy", "tvm_ffi") if m in sys.modules))
"""


def test_a_cached_kernel_loads_without_the_dsl(tiny: KernelEntry, cache: KernelCache) -> None:
    request = make_request("tiny", "fwd", arch="sm_80", dtype="float16", head_dim=64)
    compiled = compile_request(request)
    result = subprocess.run(
        [sys.executable, "-c", with_kernels(HIT), json.dumps(to_json(request))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [compiled.key]


def test_a_damaged_entry_is_compiled_again(
    tiny: KernelEntry, cache: KernelCache, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    request = make_request("tiny", "fwd", arch="sm_80", dtype="float16", head_dim=64, log=str(log))
    first = compile_request(request)
    assert first.directory is not None
    path = first.directory / "kernel.ptx"
    path.write_text(path.read_text() + "// changed\n")
    assert lookup(request, cache) is None
    [again] = compile_many([request], jobs=1)
    assert again.ptx == first.ptx
    assert len(log.read_text().splitlines()) == 2


def test_without_the_cache_nothing_is_stored(
    tiny: KernelEntry, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny_compile(use_cache=False).directory is None
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    assert tiny_compile().ptx
    [compiled] = compile_many(
        [{"generation": "tiny", "arch": "sm_80", "dtype": "half", "head_dim": 8}]
    )
    assert compiled.cubin
    assert not cache.root.exists()


def test_two_threads_get_their_own_architecture(tiny: KernelEntry) -> None:
    """The DSL alone hands out the other thread's, silently."""
    wrong: list[str] = []

    def compile_some(arch: str) -> None:
        for head_dim in range(8, 48, 8):
            compiled = tiny_compile(arch, head_dim=head_dim)
            if f".target {arch}\n" not in compiled.ptx:
                wrong.append(arch)

    threads = [threading.Thread(target=compile_some, args=(a,)) for a in ("sm_80", "sm_90a")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


CONTEND = """
import json
from cute_fa.build.compile import compile_request
from cute_fa.build.parallel import from_json
compile_request(from_json(json.loads(sys.argv[1])))
"""


def test_processes_that_start_together_compile_once(
    tiny: KernelEntry, cache: KernelCache, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    request = make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64, log=str(log))
    command = [sys.executable, "-c", with_kernels(CONTEND), json.dumps(to_json(request))]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1
    assert len(cache.entries()) == 1


def test_the_dsls_own_settings_are_part_of_the_key(
    tiny: KernelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64).key

    plain = key()
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    monkeypatch.setenv("CUTE_DSL_KEEP", "ptx")
    assert key() == plain
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    assert key() != plain


def test_line_info_relates_ptx_to_source(tiny: KernelEntry) -> None:
    assert "tiny_kernel.py" in tiny_compile(line_info=True).ptx
    assert "tiny_kernel.py" not in tiny_compile().ptx


def test_a_failing_kernel_is_a_compile_error_with_the_plain_message(
    tiny: KernelEntry, cache: KernelCache
) -> None:
    with pytest.raises(CompileError) as caught:
        tiny_compile(fault="raise")
    text = str(caught.value)
    assert "tiny fwd sm_80 bfloat16 d64 failed" in text and "the kernel is broken" in text
    assert "\x1b" not in text
    assert isinstance(caught.value.__cause__, ValueError)
    assert cache.entries() == []


GOOD_PTX = ".version 8.8\n.target sm_80\n.visible .entry kernel(\n"


@pytest.mark.parametrize(
    ("ptx", "cubin", "message"),
    [
        ("/tmp/kernel.sm_80.ptx", b"\x7fELF", "no PTX"),
        (None, b"\x7fELF", "no PTX"),
        (GOOD_PTX.replace("sm_80", "sm_90a"), b"\x7fELF", "another target"),
        (GOOD_PTX.replace("sm_80", "sm_80a"), b"\x7fELF", "another target"),
        (GOOD_PTX.replace(".entry", ".func"), b"\x7fELF", "without a kernel"),
        (GOOD_PTX, "/tmp/kernel.sm_80.cubin", "no cubin"),
        (GOOD_PTX, None, "no cubin"),
        (GOOD_PTX, b"", "no cubin"),
    ],
)
def test_what_is_not_the_artefact_asked_for_is_refused(
    tiny: KernelEntry, ptx: object, cubin: object, message: str
) -> None:
    request = make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64)
    with pytest.raises(CompileError, match=message):
        _verify(request, ptx, cubin)
    assert _verify(request, GOOD_PTX, b"\x7fELF...") == "kernel"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arch": "sm_75"}, InvalidArgumentError, "unknown architecture"),
        ({"arch": "sm_87"}, UnsupportedError, "tiny fwd is not built for this architecture"),
        ({"head_dim": 100}, InvalidArgumentError, "head_dim"),
        ({"head_dim": 264}, InvalidArgumentError, "head_dim"),
        (
            {"head_dim": 64.0},
            InvalidTypeError,
            "head_dim is not an integer\\n.*64.0 .float.\\n  expected: a Python int",
        ),
        ({"head_dim_v": True}, InvalidTypeError, "head_dim_v is not an integer"),
        ({"dtype": torch.float32}, InvalidTypeError, "float32"),
        ({"window_size": (-2, 0)}, InvalidArgumentError, "window_size"),
        ({"window_size": 5}, InvalidTypeError, "window_size"),
        ({"softcap": float("nan")}, InvalidArgumentError, "softcap"),
        ({"softcap": 30.0}, UnsupportedError, "tiny has no softcap"),
        ({"tile_x": 3}, InvalidArgumentError, "tile_x: no such field"),
        ({"num_threads": 33}, InvalidArgumentError, "whole warps"),
        ({"factor": torch.tensor(2.0)}, InvalidTypeError, "expected: float, as in factor=2.0"),
        ({"num_threads": "64"}, InvalidTypeError, "expected: int, as in num_threads="),
        ({"num_threads": True}, InvalidTypeError, "num_threads: not what this field"),
        ({"seqused_k": True}, InvalidArgumentError, "expected: varlen=True with it"),
        ({"varlen": 1}, InvalidTypeError, "varlen is not a bool"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_compiling(
    tiny: KernelEntry, cache: KernelCache, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_compile(**changes)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.bfloat16, "bfloat16"), ("bf16", "bfloat16")),
        *(("half", "float16"), ("FP16", "float16")),
        *((torch.float8_e4m3fn, "float8_e4m3fn"), ("fp8", "float8_e4m3fn")),
    ],
)
def test_dtypes_by_object_and_name(dtype: object, name: str) -> None:
    assert dtype_name(dtype) == name


def test_a_request_compares_by_content(tiny: KernelEntry) -> None:
    request = make_request("tiny", "fwd", arch="sm_80", dtype="half", head_dim=64)
    assert isinstance(request, Request)
    again = make_request("tiny", "fwd", arch="8.0", dtype=torch.float16, head_dim=64)
    assert request == again and request.key == again.key


def test_a_simulated_device_around_it_changes_nothing(tiny: KernelEntry) -> None:
    outside = tiny_compile(use_cache=False)
    with sim.Device("sm_90a"):
        inside = tiny_compile(use_cache=False)
    assert inside.key == outside.key
    assert inside.ptx == outside.ptx and inside.cubin == outside.cubin


@pytest.mark.parametrize("argument", [{"causal": 1}, {"causal": "no"}, {"line_info": "no"}])
def test_switches_are_bools(argument) -> None:
    from cute_fa.errors import InvalidTypeError

    with pytest.raises(InvalidTypeError, match="is not a bool"):
        compile("fa2", arch="sm_80", dtype="float16", head_dim=64, **argument)
