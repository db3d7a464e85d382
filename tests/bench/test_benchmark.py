"""The benchmark from end to end, on the CPU: checked first, timed in turn, written down."""

from __future__ import annotations

import csv
import itertools
import json
import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cute_fa
from cute_fa.bench import benchmark, gpu_state, providers, report
from cute_fa.bench.benchmark import Results, Row
from cute_fa.bench.inputs import BenchInputs, make
from cute_fa.bench.providers import Ours, Sdpa, first_call
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Policy, Timing
from cute_fa.bench.verify import ROWS, parts, verify
from cute_fa.errors import (
    InvalidArgumentError,
    LaunchError,
    MissingToolError,
    UnsupportedError,
)
from cute_fa.problem import AttentionProblem
from cute_fa.reference.dense import attention
from cute_fa.varlen import Packing, VarlenProblem

POLICY = Policy(warmup=0, rounds=2, rest=0.0)


def dense(**changes: Any) -> Shape:
    return Shape(
        "papers", replace(AttentionProblem(1, 48, 48, 2, 2, 64, 64, "bfloat16"), **changes)
    )


def packed(*lengths: int, causal: bool = False) -> Shape:
    base = AttentionProblem(1, 1, 1, 2, 1, 64, 64, "bfloat16", causal=causal)
    return Shape("varlen", VarlenProblem.of(base, Packing.of_lengths(lengths, lengths)))


def exact(inputs: BenchInputs, shape: Shape) -> torch.Tensor:
    """The right answer, sequence by sequence."""
    if not isinstance(shape.problem, VarlenProblem):
        p = shape.problem
        tensors = (inputs.q.float(), inputs.k.float(), inputs.v.float())
        return attention(*tensors, causal=p.causal)[0].to(inputs.q.dtype)
    packing = shape.problem.packing
    assert packing is not None
    found = []
    for rows in packing.rows_q:
        one = slice(rows.start, rows.stop)
        q, k, v = (x[one][None].float() for x in (inputs.q, inputs.k, inputs.v))
        found.append(attention(q, k, v, causal=shape.padded.causal)[0][0])
    return torch.cat(found).to(inputs.q.dtype)


@dataclass(frozen=True)
class Reference:
    """The right answer, but for the rows that ``spoil`` names."""

    name: str = "reference"
    spoil: int | None = None
    refusals: type[Exception] = UnsupportedError

    def why_not(self, shape: Shape) -> str | None:
        return None

    def bind(self, shape: Shape, inputs: BenchInputs) -> providers.Call:
        def call() -> torch.Tensor:
            out = exact(inputs, shape)
            if self.spoil is not None:
                out[(self.spoil,) * (out.ndim - 2)] += 0.5
            return out

        return call

    def session(self) -> Any:
        import contextlib

        return contextlib.nullcontext()


class Clock:
    """A timer that runs the call and says that it took 1 ms."""

    def sample(self, action, *, flush: bool) -> float:
        action()
        return 1e-3


SHAPES = [
    dense(),
    dense(causal=True, heads_q=4),
    dense(batch=2, seqlen_q=40, seqlen_k=300, causal=True),
    dense(seqlen_q=ROWS + 40, seqlen_k=ROWS + 40, causal=True),
    packed(30, 7, 65),
    packed(9, 150, causal=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_right_answer_is_right(shape: Shape) -> None:
    inputs = make(shape, "cpu")
    verdict = verify(exact(inputs, shape), inputs, shape)
    assert verdict.ok and 0 <= verdict.error <= verdict.allowed


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_wrong_row_is_found(shape: Shape, row: int) -> None:
    p = shape.padded
    if row == 0 and p.causal and p.seqlen_q != p.seqlen_k:
        pytest.skip("the first rows of this mask are no problem of their own")
    inputs = make(shape, "cpu")
    out = Reference(spoil=row).bind(shape, inputs)()
    verdict = verify(out, inputs, shape)
    assert not verdict.ok and verdict.error > 0.4 and "WRONG" in verdict.why


def test_a_result_of_another_shape_is_wrong() -> None:
    inputs = make(dense(), "cpu")
    verdict = verify(torch.zeros(1, 48, 2, 32), inputs, dense())
    assert not verdict.ok and "(1, 48, 2, 32)" in verdict.why


def test_large_problems_are_looked_at_in_parts() -> None:
    shape = dense(seqlen_q=1000, seqlen_k=1000, causal=True)
    inputs = make(shape, "cpu")
    sizes = {
        (part.problem.seqlen_q, part.problem.seqlen_k) for part in parts(inputs.q, inputs, shape)
    }
    assert sizes == {(ROWS, 1000), (ROWS, ROWS)}


def test_fp8_has_a_budget_of_its_own() -> None:
    shape = dense(dtype="float8_e4m3fn")
    inputs = make(shape, "cpu")
    tensors = (inputs.q.float(), inputs.k.float(), inputs.v.float())
    out = attention(*tensors)[0].to(torch.bfloat16)
    good = verify(out, inputs, shape)
    assert good.ok and good.error < 0.02
    bad = verify(out + 0.2 * out.float().std(), inputs, shape)
    assert not bad.ok and "relative RMS" in bad.why


# --- providers


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_computes_what_we_mean(causal: bool) -> None:
    shape = dense(causal=causal, heads_q=4)
    inputs = make(shape, "cpu")
    tried = first_call(Sdpa("sdpa-math", "MATH"), shape, inputs)
    assert not isinstance(tried, str)
    assert verify(tried[1], inputs, shape).ok


def test_what_a_provider_refuses_is_said_in_words() -> None:
    flash = Sdpa("sdpa-flash", "CUDNN_ATTENTION")
    shape = dense()
    reason = first_call(flash, shape, make(shape, "cpu"))
    assert isinstance(reason, str) and reason.startswith("RuntimeError")
    for shape, words in (
        (packed(4, 4), "no packed sequences"),
        (dense(causal=True, seqlen_k=50), "top left"),
        (dense(dtype="float8_e4m3fn"), "fp8"),
    ):
        assert words in str(flash.why_not(shape))
    missing = providers.FlashAttention("flash-attn-9", "no_such_package.attention")
    assert missing.why_not(dense()) == "no_such_package.attention is not installed"
    assert providers.TorchVarlen().why_not(dense()) == "packed sequences only"
    refused = LaunchError("CUDA did not launch the kernel", got="CUDA Error Code: 719", fix="…")
    assert providers.in_words(refused) == "CUDA did not launch the kernel: CUDA Error Code: 719"
    unserved = UnsupportedError("no such kernel", got="a long list")
    assert providers.in_words(unserved) == "no such kernel"


def test_a_package_with_flash_attns_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_attention.py").write_text(
        "def flash_attn_func(q, k, v, *, causal): return q + causal, None\n"
        "def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, max_seqlen_k, causal, **more):\n"
        "    return q + int(cu_seqlens_q[-1]) + max_seqlen_k\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    other = providers.FlashAttention("other", "other_attention")
    inputs = make(dense(causal=True), "cpu")
    assert torch.equal(other.bind(dense(causal=True), inputs)(), inputs.q + 1)
    inputs = make(packed(3, 5), "cpu")
    assert torch.equal(other.bind(packed(3, 5), inputs)(), inputs.q + 8 + 5)
    assert other.why_not(dense(dtype="float8_e4m3fn")) == "no fp8"


def test_providers_by_name() -> None:
    everybody = [provider.name for provider in providers.providers(None, cute_fa)]
    assert everybody[:4] == ["cute_fa-fa1", "cute_fa-fa2", "cute_fa-fa3", "cute_fa-fa4"]
    assert {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient"} <= set(everybody)
    names = ["sdpa-flash", "cute_fa-fa2", "sdpa-flash"]
    assert [p.name for p in providers.providers(names, cute_fa)] == names[:2]
    with pytest.raises(InvalidArgumentError, match=r"unknown provider(.|\n)*fa7(.|\n)*sdpa-flash"):
        providers.providers(["fa7"], cute_fa)


# --- a whole run


def test_a_run(tmp_path: Path) -> None:
    """Ours in the simulator beside the reference; a wrong one is found and not timed."""
    asked: list[str] = []
    found: list[int] = []
    results = benchmark.run(
        [dense(seqlen_q=32, seqlen_k=32), packed(5, 9)],
        [
            Ours("fa2", cute_fa, backend="sim", arch="sm_80"),
            Reference(),
            Reference("broken", spoil=0),
            Sdpa("sdpa-flash", "FLASH_ATTENTION"),
        ],
        Clock(),
        device="cpu",
        policy=POLICY,
        state=lambda: {"sm_mhz": 1980},
        matmul_size=16,
        progress=lambda done, total, name: asked.append(f"{done}/{total} {name}"),
        changed=lambda results: found.append(len(results.rows)),
    )
    assert found == [4, 8]
    assert asked[0] == "0/2 papers bfloat16 d64 b1 s32 h2/2"
    by_name = {(row.group, row.provider): row for row in results.rows}
    assert len(by_name) == 8
    ours = by_name["papers", "cute_fa-fa2"]
    assert ours.ok and ours.seconds == Timing(1e-3, 1e-3, 1e-3, 1e-3, 2)
    assert ours.tflops == pytest.approx(4 * 2 * 32 * 32 * 64 / 1e-3 / 1e12)
    broken = by_name["papers", "broken"]
    assert broken.ok is False and broken.seconds is None and broken.error > 0.4  # type: ignore
    assert results.wrong == [broken, by_name["varlen", "broken"]]
    refused = by_name["varlen", "sdpa-flash"]
    assert not refused.served and "packed" in refused.reason and refused.ok is None
    assert results.matmul["bfloat16"] == pytest.approx(2 * 16**3 / 1e-3 / 1e12)
    assert results.share_of_matmul(ours) == pytest.approx(2 * 32**2 * 64 * 4 / (2 * 16**3))
    assert [state["sm_mhz"] for state in results.states] == [1980, 1980]

    written = report.write_all(results, tmp_path / "new" / "folder", plots=False)
    assert sorted(written[0].parent.iterdir()) == sorted(written)
    document = json.loads(written[0].read_text())
    assert document["rows"][0]["seconds"]["median"] == 1e-3
    assert document["policy"]["rounds"] == 2
    with written[1].open() as file:
        flat = list(csv.DictReader(file))
    assert flat[0]["provider"] == "cute_fa-fa2" and flat[0]["ok"] == "True"
    assert float(flat[0]["median_s"]) == 1e-3 and flat[2]["median_s"] == ""
    header, rows = report.summary(results)
    assert header == [
        "shape",
        "cute_fa-fa2",
        "reference",
        "broken",
        "sdpa-flash",
        "ours / best other",
    ]
    assert rows[0][3] == "WRONG" and rows[1][4] == "-" and rows[0][-1] == "1.00"


@dataclass(frozen=True)
class Faulty(Reference):
    """Raises at its ``fails_at``-th call."""

    fails_at: int = 1

    def bind(self, shape: Shape, inputs: BenchInputs) -> providers.Call:
        right, calls = super().bind(shape, inputs), itertools.count(1)

        def call() -> torch.Tensor:
            if next(calls) == self.fails_at:
                raise RuntimeError("CUDA error: misaligned address\nSearch for it")
            return right()

        return call


def test_who_fails_fails_alone() -> None:
    asked: list[str | None] = []
    rows, state = benchmark.run_shape(
        dense(),
        [
            Faulty("at once"),
            Faulty("later", fails_at=3),
            Faulty("in its own way", refusals=Exception),
            Reference("hung before"),
            Reference(),
        ],
        Clock(),
        POLICY,
        device="cpu",
        state=lambda: {"sm_mhz": 1980},
        about_to_call=lambda who: asked.append(who and who.name),
        refused=lambda who: "it hung" if who.name == "hung before" else None,
    )
    assert asked == ["at once", "later", "in its own way", "reference", None]
    found = {row.provider: (row.served, row.ok, row.seconds is not None) for row in rows}
    assert found == {
        "at once": (True, False, False),
        "later": (True, False, False),
        "in its own way": (False, None, False),
        "hung before": (True, False, False),
        "reference": (True, True, True),
    }
    reasons = {row.provider: row.reason for row in rows}
    assert reasons["at once"] == "RuntimeError: CUDA error: misaligned address"
    assert reasons["later"].startswith("while it was timed: RuntimeError: CUDA error")
    assert state == {"shape": dense().name, "sm_mhz": 1980}
    [line] = report.summary(Results(rows))[1]
    assert line[1:4] == ["FAILED", "FAILED", "FAILED"]


def test_inputs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(shape: Shape, device: str) -> BenchInputs:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(benchmark, "make", no_memory)
    rows, _ = benchmark.run_shape(
        dense(), [Reference()], Clock(), POLICY, device="cuda", state=dict
    )
    assert [(row.served, row.ok) for row in rows] == [(False, None)]
    assert "out of memory" in rows[0].reason


def row(provider: str, seqlen: int, seconds: float | None) -> Row:
    timing = None if seconds is None else Timing(seconds, seconds, seconds, seconds, 1)
    return Row(
        shape=f"papers s{seqlen}",
        group="papers",
        dtype="bfloat16",
        head_dim=128,
        causal=True,
        batch=1,
        seqlen=seqlen,
        heads_q=16,
        heads_k=16,
        flops=10**12,
        provider=provider,
        served=seconds is not None,
        ok=None if seconds is None else True,
        seconds=timing,
    )


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(
        [row("cute_fa-fa3", 512, 0.5), row("other", 512, 1.0), row("other", 1024, None)],
        {"bfloat16": 3.0},
    )
    assert report.summary(results)[1][0][-1] == "2.00"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(MissingToolError, match=r"cute-fa\[bench\]"):
            report.plot(results, tmp_path)
    else:
        [picture] = report.plot(results, tmp_path)
        assert picture.name == "bench_fwd_papers_bfloat16.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


# --- the GPU


ANSWER = "NVIDIA H100 80GB HBM3, 570.86.15, 1980, 1980, 2619, 412.50, 700.00, 54, {}\n"


def test_clocks_and_throttling() -> None:
    found = gpu_state.snapshot(lambda: ANSWER.format("0x0000000000000024"))
    assert found["name"] == "NVIDIA H100 80GB HBM3" and found["sm_mhz"] == 1980
    assert found["power_w"] == 412.5 and found["driver"] == "570.86.15"
    assert found["throttle_reasons"] == ["software power cap", "software thermal slowdown"]
    assert gpu_state.throttle_reasons(0) == []
    assert gpu_state.throttle_reasons(0x1000) == ["unknown (0x1000)"]


@pytest.mark.parametrize("known", ["event", "throttle", "neither"])
def test_drivers_name_the_reasons_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """The GPU is asked for by its UUID, in words that its driver knows."""
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    answer = ANSWER.format("0x4").strip()
    tool.write_text(
        f"""#!/bin/sh
echo "$*" >> {asked}
case "$*" in
    *clocks_{known}_reasons.active*) echo "{answer}" ;;
    *) echo 'Field is not a valid field to query.'; exit 2 ;;
esac
"""
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_state.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(uuid="00112233-4455")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = gpu_state.snapshot()
    assert "--id=GPU-00112233-4455" in asked.read_text()
    if known == "neither":
        assert "not a valid field" in found["unknown"]
    else:
        assert found["throttle_reasons"] == ["software power cap"] and found["sm_mhz"] == 1980


def test_numbers_that_are_not_finite_are_spelled(tmp_path: Path) -> None:
    """JSON has none, and a wrong result may have an infinite error."""
    shape: dict[str, Any] = benchmark._identity(dense())
    row = Row(**shape, provider="x", served=True, ok=False, error=math.inf, allowed=math.nan)
    path, _ = report.write_numbers(Results(rows=[row]), tmp_path)

    def refuse(name: str) -> None:
        raise ValueError(name)

    [found] = json.loads(path.read_text(), parse_constant=refuse)["rows"]
    assert (found["error"], found["allowed"]) == ("inf", "nan")


def test_an_nvidia_smi_that_hangs_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked after every shape, in time that the shapes behind it lack."""
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(f"#!/bin/sh\necho once >> {asked}\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_state.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(gpu_state, "_SMI_SECONDS", 0.5)
    monkeypatch.setattr(gpu_state, "_smi_hung", threading.Event())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: object())
    for _ in range(3):
        assert "0.5" in gpu_state.snapshot()["unknown"]
    assert asked.read_text() == "once\n"


def test_a_machine_that_does_not_tell() -> None:
    def missing() -> str:
        raise FileNotFoundError("not on the PATH")

    assert gpu_state.snapshot(missing) == {"unknown": "nvidia-smi: not on the PATH"}
    assert "answered" in gpu_state.snapshot(lambda: "No devices were found\n")["unknown"]
    odd = gpu_state.snapshot(lambda: ANSWER.format("[N/A]"))
    assert odd["throttle_reasons"] == ["unknown ([N/A])"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingToolError, match="no GPU to measure on"):
        gpu_state.require_gpu()
