"""Content keys: primitives only, equal for equal content, different for any difference."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cute_fa.build import keys
from cute_fa.errors import InvalidTypeError


@dataclass(frozen=True)
class Config:
    tile_m: Any
    nested: Any = None


class Order(enum.Enum):
    ROWS = "rows"


PARTS = {"config": Config(64, (1, 2.5, None)), "arch": "sm_80", "flag": True, "order": Order.ROWS}


def test_equal_content_gives_equal_digests() -> None:
    again = {
        "order": Order.ROWS,
        "flag": True,
        "arch": "sm_80",
        "config": Config(64, [1, 2.5, None]),
    }
    assert keys.digest(PARTS) == keys.digest(again)
    assert len(keys.digest(PARTS)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"config": Config(65, (1, 2.5, None))},
        {"config": Config(64, (1, 2.5000001, None))},
        {"config": Config(64, (2.5, 1, None))},
        {"arch": "sm_90"},
        {"flag": 1},
        {"order": "columns"},
        {"more": ""},
    ],
    ids=repr,
)
def test_any_difference_changes_the_digest(change: dict) -> None:
    assert keys.digest({**PARTS, **change}) != keys.digest(PARTS)


@pytest.mark.parametrize(
    "value",
    [torch.tensor(64), np.int64(64), np.bool_(True), np.float32(1), object(), b"64", {64}, int],
    ids=lambda value: type(value).__name__,
)
def test_anything_but_plain_values_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(InvalidTypeError, match=r"key\.config\.nested\[1\] is not a plain value"):
        keys.digest({"config": Config(64, (1, value))})


def test_a_mapping_with_other_keys_than_strings_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match=r"a name in key\.sizes"):
        keys.digest({"sizes": {1: 2}})


def test_source_digest_follows_every_file_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "cute_fa_probe_package"
    (package / "deep").mkdir(parents=True)
    for name in ("__init__.py", "kernel.py", "deep/block.py"):
        (package / name).write_text(f"# {name}\nraise RuntimeError('must not be imported')\n")
    (package / "README.md").write_text("not a source")
    monkeypatch.syspath_prepend(str(tmp_path))

    def now() -> str:
        keys.source_digest.cache_clear()
        return keys.source_digest(("cute_fa_probe_package",))

    try:
        seen = {now()}
        (package / "README.md").write_text("changed")
        assert now() in seen
        for name in ("__init__.py", "kernel.py", "deep/block.py"):
            (package / name).write_text("# changed\n")
            assert now() not in seen
            seen.add(now())
        assert "cute_fa_probe_package" not in sys.modules
    finally:
        keys.source_digest.cache_clear()
