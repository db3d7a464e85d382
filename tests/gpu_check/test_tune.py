"""Which candidate wins, and on what it is timed."""

from __future__ import annotations

import pytest

from cute_fa.bench.timing import Policy
from cute_fa.errors import CompileError
from cute_fa.gpu_check import tune
from cute_fa.gpu_check.place import Place
from cute_fa.ops.bundle import LoadedBundle
from cute_fa.problem import KernelVariant
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


def test_tuning_shapes_are_the_variants() -> None:
    found = tune.tuning_shapes(KernelVariant("float16", 128, 128, causal=True))
    assert [shape.padded.seqlen_q for shape in found] == [1024, 4096, 16384]
    assert {shape.padded.variant for shape in found} == {KernelVariant("float16", 128, 128, True)}


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
