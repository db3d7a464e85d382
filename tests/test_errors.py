"""The exception family and the environment it guards."""

from __future__ import annotations

import pickle

import pytest

from cute_fa import env, errors


def test_message_says_what_got_expected_and_how_to_mend():
    error = errors.UnsupportedError(
        "fa1 has no such mask",
        got="window",
        expected="causal",
        fix="use fa2",
        alternatives=["fa2", "fa3"],
    )
    lines = str(error).splitlines()
    assert lines[0] == "fa1 has no such mask"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "got",
        "expected",
        "to mend",
        "would do",
    ]
    assert "fa2, fa3" in lines[-1]


def test_falsy_values_that_were_got_are_shown():
    assert "got:      0" in str(errors.InvalidArgumentError("x", got=0))
    assert "got" not in str(errors.InvalidArgumentError("x"))


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidArgumentError, ValueError),
        (errors.InvalidTypeError, TypeError),
        (errors.UnsupportedError, NotImplementedError),
        (errors.CompileError, RuntimeError),
        (errors.MissingToolError, RuntimeError),
        (errors.CacheError, RuntimeError),
    ],
)
def test_one_family_that_ordinary_handlers_catch(kind, builtin):
    assert issubclass(kind, errors.CuteFAError) and issubclass(kind, builtin)


def test_errors_cross_processes_whole():
    error = errors.InvalidArgumentError("x", got=1, expected=2, fix="y", alternatives=["z"])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert copy.alternatives == ("z",) and copy.got == 1


@pytest.mark.parametrize("raw", ["0", "-1", "two", ""])
def test_sim_workers_refuses_what_is_no_count(monkeypatch, raw):
    monkeypatch.setenv("CUTE_FA_SIM_WORKERS", raw)
    with pytest.raises(errors.InvalidArgumentError, match="CUTE_FA_SIM_WORKERS"):
        env.sim_workers()


def test_environment_is_read_when_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("CUTE_FA_SIM_WORKERS", "3")
    assert env.sim_workers() == 3
    monkeypatch.delenv("CUTE_FA_SIM_WORKERS")
    assert env.sim_workers() >= 1
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    assert env.cache_dir() == tmp_path
    for raw, value in (("off", False), ("1", True), ("No", False)):
        monkeypatch.setenv("CUTE_FA_CACHE", raw)
        assert env.cache_enabled() is value
    monkeypatch.setenv("CUTE_FA_CACHE", "perhaps")
    with pytest.raises(errors.InvalidArgumentError, match="CUTE_FA_CACHE"):
        env.cache_enabled()
