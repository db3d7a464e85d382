"""The benchmark: every provider on every shape, checked first and then timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cute_fa.bench import gpu_state
from cute_fa.bench.inputs import TORCH_DTYPES, BenchInputs, make
from cute_fa.bench.providers import Call, Provider, first_call, in_words
from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Action, Policy, Timer, Timing, measure
from cute_fa.bench.verify import Verdict, verify

MATMUL_SIZE = 8192
BUSY_SECONDS = 0.2
MAX_BUSY_CALLS = 1000
"""What fits into the queue of a stream: more would make the host wait."""


@dataclass(frozen=True)
class Row:
    """One provider on one shape.

    Attributes:
        shape: ``Shape.name``; the fields of the problem follow.
        served: False if the provider does not serve it; ``reason`` says why.
        ok: whether the checked rows are within the error budget; False also where the call failed.
        error, allowed: the largest error there, and the budget's; None where the call failed.
        seconds: None if it was not served or is not right: what is wrong is not timed.
        flops: by the papers' convention.
    """

    shape: str
    group: str
    dtype: str
    head_dim: int
    causal: bool
    batch: int
    seqlen: int
    heads_q: int
    heads_k: int
    flops: int
    provider: str
    served: bool
    reason: str = ""
    ok: bool | None = None
    error: float | None = None
    allowed: float | None = None
    seconds: Timing | None = None

    @property
    def tflops(self) -> float | None:
        return None if self.seconds is None else self.flops / self.seconds.median / 1e12


@dataclass(frozen=True)
class Results:
    """What a run of the benchmark found.

    Attributes:
        rows: one per shape and provider.
        matmul: TFLOP/s of a square matrix product by dtype, measured in the same run.
        states: the GPU at the end of each shape, while it computes.
        device: what the GPU and the software are.
        policy: how it was timed.
    """

    rows: list[Row] = field(default_factory=list)
    matmul: dict[str, float] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)

    def share_of_matmul(self, row: Row) -> float | None:
        """Speed of a row relative to the matrix product in its dtype."""
        peak = self.matmul.get(row.dtype)
        return None if row.tflops is None or not peak else row.tflops / peak

    @property
    def wrong(self) -> list[Row]:
        """What failed or is not right."""
        return [row for row in self.rows if row.ok is False]

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            document = asdict(row)
            document["tflops"] = row.tflops
            document["share_of_matmul"] = self.share_of_matmul(row)
            rows.append(document)
        return {
            "device": self.device,
            "policy": asdict(self.policy),
            "matmul_tflops": self.matmul,
            "rows": rows,
            "states": self.states,
        }


# Called with (shapes done, shapes in all, what is being timed).
Progress = Callable[[int, int, str], None]


def run(
    shapes: Sequence[Shape],
    providers: Sequence[Provider],
    timer: Timer,
    *,
    device: torch.device | str = "cuda",
    policy: Policy | None = None,
    state: Callable[[], dict[str, Any]] = gpu_state.snapshot,
    matmul_size: int = MATMUL_SIZE,
    progress: Progress | None = None,
    changed: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Check and time every provider on every shape.

    Args:
        changed: is given what was found so far, after every shape.
    """
    policy = policy or Policy()
    results = Results(policy=policy)
    if is_asynchronous(device):
        results.device.update(gpu_state.device_document())
    for dtype in dict.fromkeys(shape.padded.dtype for shape in shapes):
        speed = matmul_tflops(dtype, timer, policy, device=device, size=matmul_size)
        if speed is not None:
            results.matmul[dtype] = speed
    for index, shape in enumerate(shapes):
        if progress is not None:
            progress(index, len(shapes), shape.name)
        rows, found = run_shape(shape, providers, timer, policy, device=device, state=state)
        results.rows.extend(rows)
        results.states.append(found)
        changed(results)
    return results


def run_shape(
    shape: Shape,
    providers: Sequence[Provider],
    timer: Timer,
    policy: Policy,
    *,
    device: torch.device | str,
    state: Callable[[], dict[str, Any]],
    about_to_call: Callable[[Provider | None], None] = lambda provider: None,
    refused: Callable[[Provider], str | None] = lambda provider: None,
) -> tuple[list[Row], dict[str, Any]]:
    """All providers on one shape, and the GPU's state. Whoever fails, fails alone.

    Args:
        about_to_call: is told whose first call comes next; None when all are timed.
        refused: why a provider is not to be called, as it failed before; or None.
    """
    try:
        inputs = make(shape, device)
    except RuntimeError as error:  # no memory left
        cause = f"no inputs: {in_words(error)}"
        unserved = [
            Row(**_identity(shape), provider=who.name, served=False, reason=cause)
            for who in providers
        ]
        return unserved, {"shape": shape.name}
    found: dict[str, dict[str, Any]] = {}
    actions: dict[str, Action] = {}
    for provider in providers:
        reason = refused(provider)
        if reason is not None:
            found[provider.name] = _failed(reason)
            continue
        about_to_call(provider)
        found[provider.name], call = _try(provider, shape, inputs)
        if call is not None:
            actions[provider.name] = _in_session(call, provider.session)
    about_to_call(None)
    failures: dict[str, str] = {}
    timings = measure(
        actions, timer, policy, failed=lambda name, error: failures.update({name: in_words(error)})
    )
    for name, reason in failures.items():
        found[name] = _failed(f"while it was timed: {reason}")
    rows = [
        Row(**_identity(shape), provider=name, seconds=timings.get(name), **fields)
        for name, fields in found.items()
    ]
    if timings and is_asynchronous(device):
        name, timing = next(iter(timings.items()))
        _enqueue(actions[name], timing.median)
    return rows, {"shape": shape.name, **state()}


def is_asynchronous(device: torch.device | str) -> bool:
    """Whether calls return before they have computed anything."""
    return torch.device(device).type == "cuda"


def _failed(reason: str) -> dict[str, Any]:
    return {"served": True, "ok": False, "reason": reason}


def _enqueue(action: Action, seconds: float) -> None:
    """Give the GPU so much to do that it works while it is asked for clocks and throttling."""
    for _ in range(max(1, min(MAX_BUSY_CALLS, round(BUSY_SECONDS / max(seconds, 1e-6))))):
        action()


def _try(
    provider: Provider, shape: Shape, inputs: BenchInputs
) -> tuple[dict[str, Any], Call | None]:
    """What is known before timing, and the call if it is to be timed."""
    try:
        tried = first_call(provider, shape, inputs)
        if isinstance(tried, str):
            return {"served": False, "reason": tried}, None
        call, out = tried
        verdict: Verdict = verify(out, inputs, shape)
    except Exception as error:
        return _failed(in_words(error)), None
    fields = {
        "served": True,
        "reason": verdict.why,
        "ok": verdict.ok,
        "error": verdict.error,
        "allowed": verdict.allowed,
    }
    return fields, call if verdict.ok else None


def _in_session(call: Call, session: Callable[[], Any]) -> Action:
    # Entering it costs host time only, which ``CudaTimer`` hides.
    def action() -> Any:
        with session():
            return call()

    return action


def _identity(shape: Shape) -> dict[str, Any]:
    p = shape.padded
    return {
        "shape": shape.name,
        "group": shape.group,
        "dtype": p.dtype,
        "head_dim": p.head_dim,
        "causal": p.causal,
        "batch": p.batch,
        "seqlen": p.seqlen_k,
        "heads_q": p.heads_q,
        "heads_k": p.heads_k,
        "flops": shape.flops,
    }


def matmul_tflops(
    dtype: str, timer: Timer, policy: Policy, *, device: torch.device | str, size: int
) -> float | None:
    """TFLOP/s of a square matrix product of normal values; None where torch has none."""

    def product() -> Any:
        if dtype == "float8_e4m3fn":
            # The second operand is wanted column by column.
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
        return a @ b

    try:
        a, b = (torch.randn(size, size, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
        one = torch.ones((), device=device)
        return 2 * size**3 / measure({"matmul": product}, timer, policy)["matmul"].median / 1e12
    except (RuntimeError, ValueError, NotImplementedError):
        return None
