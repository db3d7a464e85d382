"""Which candidate wins, and on what it is timed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from cute_fa.bench.shapes import Shape
from cute_fa.bench.timing import Policy, Timing
from cute_fa.build import presets
from cute_fa.errors import CompileError
from cute_fa.gpu_check import tune
from cute_fa.gpu_check.place import Place
from cute_fa.ops.bundle import LoadedBundle
from cute_fa.problem import KernelVariant
from cute_fa.target import Target, get_target
from tests.gpu_check.processes import SHAPE, Clock


def trial(kernel: str, role: str, *seconds: float, refused: str = "") -> tune.Trial:
    medians = {str(number): value for number, value in enumerate(seconds)}
    return tune.Trial(kernel, role, {}, medians, refused)


@pytest.mark.parametrize(
    ("trials", "winner", "speedup"),
    [
        ([trial("d", "default", 2.0, 2.0), trial("c", "candidate", 1.0, 2.0)], "c", 2**0.5),
        ([trial("d", "default", 1.0), trial("c", "candidate", 0.995)], "d", 1.0),
        ([trial("d", "default", 2.0), trial("c", "candidate", 1.0, refused="wrong")], "d", 1.0),
        ([trial("d", "default", refused="no"), trial("c", "candidate", 1.0)], "c", 1.0),
        ([trial("d", "default", refused="no"), trial("c", "candidate", refused="no")], "d", 1.0),
    ],
)
def test_the_winner(trials: list[tune.Trial], winner: str, speedup: float) -> None:
    choice = tune.choose("label", trials)
    assert choice.kernel == winner and choice.speedup == pytest.approx(speedup)


def test_what_is_to_be_written_into_the_tile_table() -> None:
    default = replace(trial("d", "default", 2.0), config={"tile_n": 64, "stages": 2})
    other = replace(trial("c", "candidate", 1.0), config={"tile_n": 96, "stages": 2})
    assert tune.choose("label", [default, other]).changes == {"tile_n": 96}
    assert tune.choose("label", [default]).changes == {}


def test_the_table_keeps_what_was_chosen_before() -> None:
    """On such a device; what was decided anew replaces it, and what nobody timed is no choice."""
    first, second = (tune.Choice(label, "d", 1.0, (trial("d", "default", 1.0),)) for label in "ab")
    earlier = json.loads(tune.table([first, second], {"name": "H100"}))
    anew = tune.Choice("b", "c", 2.0, (trial("c", "candidate", 1.0),))
    failed = tune.Choice("c", "d", 1.0, (trial("d", "default", refused="no"),))

    def chosen(device: str) -> dict[str, str]:
        document = json.loads(tune.table([anew, failed], {"name": device}, earlier))
        assert document["device"] == {"name": device}
        return {entry["label"]: entry["kernel"] for entry in document["choices"]}

    assert chosen("H100") == {"a": "d", "b": "c"}
    assert chosen("H200") == {"b": "c"}


def test_tuning_shapes_are_the_variants() -> None:
    variant = KernelVariant("float16", 128, 128, causal=True)
    found = tune.tuning_shapes(variant)
    assert sorted(shape.padded.seqlen_q for shape in found) == [512, 1024, 2048, 4096, 8192, 16384]
    assert {shape.problem.variant for shape in found} == {variant}
    packed = replace(variant, is_varlen=True)
    found = tune.tuning_shapes(packed)
    assert len(found) == 3 and {shape.problem.variant for shape in found} == {packed}
    for other in (replace(variant, has_softcap=True), replace(variant, head_dim=96, head_dim_v=96)):
        assert tune.tuning_shapes(other) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_every_candidate_of_the_preset_is_timed(arch: str) -> None:
    selected, _ = presets.select(["tune"], [arch])
    for variant in {each.request.variant for each in selected}:
        assert len(tune.tuning_shapes(variant)) >= 3


def test_competitions_in_order_of_interest() -> None:
    """What a GPU would not launch, and what is not timed, does not compete."""
    half, quarter = (KernelVariant(name, 128, 128) for name in ("bfloat16", "float8_e4m3fn"))
    narrow = KernelVariant("bfloat16", 64, 64)
    fields = [
        ("fa2", "sm_80", half),
        ("fa2", "sm_90a", half),
        ("fa3", "sm_90a", replace(half, is_varlen=True)),
        ("fa3", "sm_90a", quarter),
        ("fa3", "sm_90a", narrow),
        ("fa3", "sm_90a", replace(half, has_window_left=True)),
        ("fa3", "sm_90a", half),
    ]
    kernels = [
        Entrant(f"{number} {role}", role, *field)
        for number, field in enumerate(fields)
        for role in ("candidate", "default")
    ]
    kernels.append(Entrant("alone", "default", "fa3", "sm_90a", replace(half, causal=True)))
    found = tune.competitions(Field(kernels), Place("cpu", get_target("sm_90a")))
    order = [fields[int(field[0].name[0])] for field in found.values()]
    assert order == [fields[number] for number in (6, 3, 4, 2, 1)]
    assert all([k.role for k in field] == ["default", "candidate"] for field in found.values())


@dataclass(frozen=True)
class Entrant:
    """What ``tune.competitions`` looks at of a kernel."""

    name: str
    role: str
    generation: str
    arch: str
    variant: KernelVariant

    @property
    def config(self) -> Any:
        return SimpleNamespace(smem_bytes=0)

    @property
    def target(self) -> Target:
        return get_target(self.arch)

    @property
    def label(self) -> str:
        return f"{self.generation} {self.arch} {self.variant}"


@dataclass(frozen=True)
class Field:
    kernels: list[Entrant]


def test_who_is_far_behind_is_dropped(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the shape that showed it; but not the default, however slow. Scores add up: who is
    slow on one shape and quick on another stays."""
    [kernels] = tune.competitions(bundle, simulator).values()
    seconds = {"default": (9.0, 9.0, 9.0), "quick": (1.0, 1.0, 1.0), "late": (1.1, 1.2, 1.2)}
    seconds |= {"slow": (1.13, 1.0, 1.0), "mixed": (1.1, 1.13, 1.0)}
    field = [replace(kernels[0], name=name, role=name) for name in seconds]
    timed: list[list[str]] = []

    def measure(actions, timer, policy, failed):
        timed.append(list(actions))
        found = {name: seconds[name][len(timed) - 1] for name in actions}
        return {name: Timing.of([value]) for name, value in found.items()}

    monkeypatch.setattr(tune, "measure", measure)
    trials = tune.try_out(field, three_shapes(), simulator, Clock())
    stay = ["default", "quick", "late", "mixed"]
    assert timed == [[*stay[:3], "slow", "mixed"], stay, ["default", "quick", "mixed"]]
    by_name = {trial.kernel: trial for trial in trials}
    assert by_name["slow"].dropped == "13% behind the best" and len(by_name["slow"].medians) == 1
    assert by_name["late"].dropped == "15% behind the best"
    assert [by_name[name].dropped for name in ("default", "quick", "mixed")] == ["", "", ""]
    choice = tune.choose("label", trials)
    assert choice.kernel == "quick" and choice.speedup == pytest.approx(9.0)
    assert math.isinf(by_name["slow"].score), "fast on the only shape that it was timed on"


def test_time_may_end_between_shapes(bundle: LoadedBundle, simulator: Place) -> None:
    """All have been timed on the same shapes then; on one at least."""
    [kernels] = tune.competitions(bundle, simulator).values()
    for answers, count in (([True, False], 2), ([False], 1)):
        trials = tune.try_out(
            kernels,
            three_shapes(),
            simulator,
            Clock(),
            Policy(warmup=0, rounds=1),
            has_time=iter(answers).__next__,
        )
        assert [len(trial.medians) for trial in trials] == [count] * 2
        assert math.isfinite(tune.choose("label", trials).trials[0].score)


def three_shapes() -> list[Shape]:
    """Three names for problems that the fixtures' kernels serve."""
    return [
        replace(SHAPE, problem=replace(SHAPE.padded, seqlen_k=seqlen_k))
        for seqlen_k in (32, 33, 34)
    ]


def test_a_candidate_that_fails_is_not_timed(
    bundle: LoadedBundle, simulator: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    [default, candidate] = next(iter(tune.competitions(bundle, simulator).values()))
    assert (default.role, candidate.role) == ("default", "candidate")
    host = type(candidate).host

    def fail(self, backend):
        if self is candidate:
            raise CompileError("it does not load")
        return host(self, backend)

    monkeypatch.setattr(type(candidate), "host", fail)
    asked: list[str | None] = []
    trials = tune.try_out(
        [default, candidate],
        [SHAPE, SHAPE],
        simulator,
        Clock(),
        Policy(warmup=0, rounds=1),
        about_to_call=asked.append,
    )
    assert [trial.refused for trial in trials] == ["", "it does not load"]
    assert asked == [default.name, candidate.name, None, default.name, None]
    assert tune.choose("label", trials).kernel == default.name
