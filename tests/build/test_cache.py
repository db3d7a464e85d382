"""The disk cache: whole entries or misses, private, bounded, locked across processes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cute_fa.build.cache import META, KernelCache, _locked
from cute_fa.errors import CacheError

KEY, OTHER, THIRD = ("a" * 64, "b" * 64, "c" * 64)
FILES = {"kernel.ptx": b"ptx text", "host.o": bytes(range(256))}
LABEL = {"label": "fa2 fwd"}


def put(cache: KernelCache, key: str = KEY) -> Path:
    with cache.lock(key):
        return cache.store(key, FILES, LABEL)


def test_what_is_stored_comes_back(cache: KernelCache) -> None:
    assert cache.load(KEY) is None
    put(cache)
    loaded = cache.load(KEY)
    assert loaded is not None
    files, meta = loaded
    assert files == FILES
    assert meta["label"] == "fa2 fwd"
    assert cache.load(OTHER) is None


def test_looking_creates_nothing(cache: KernelCache) -> None:
    assert cache.load(KEY) is None and cache.entries() == [] and cache.verify() == {}
    assert not cache.root.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [*FILES, META])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_entry_is_a_miss_and_is_replaced(cache: KernelCache, name: str, damage) -> None:
    directory = put(cache)
    damage(directory / name)
    assert cache.load(KEY) is None
    put(cache)
    loaded = cache.load(KEY)
    assert loaded is not None and loaded[0] == FILES


def test_an_entry_of_another_format_is_a_miss(cache: KernelCache) -> None:
    meta = put(cache) / META
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 0}))
    assert cache.load(KEY) is None


def test_verify_names_and_removes_the_damaged_only(cache: KernelCache) -> None:
    put(cache, OTHER)
    flip_a_bit(put(cache) / "host.o")
    assert cache.verify() == {KEY: "host.o does not match its checksum"}
    assert [entry.key for entry in cache.entries()] == [OTHER]
    assert cache.verify() == {}


def test_entries_tell_label_and_size(cache: KernelCache) -> None:
    directory = put(cache)
    [entry] = cache.entries()
    assert (entry.key, entry.label) == (KEY, "fa2 fwd")
    assert entry.nbytes == sum(path.stat().st_size for path in directory.iterdir())


def test_clear_removes_everything(cache: KernelCache) -> None:
    put(cache)
    put(cache, OTHER)
    assert cache.clear() == 2
    assert cache.entries() == []
    assert [path.name for path in cache.root.iterdir()] == []


def test_the_least_recently_used_goes_first(cache: KernelCache) -> None:
    now = 1_700_000_000
    for age, key in ((30, KEY), (20, OTHER)):
        os.utime(put(cache, key) / META, (now - age, now - age))
    assert cache.load(KEY) is not None  # now the youngest
    size = cache.entries()[0].nbytes
    small = KernelCache(cache.root, max_bytes=2 * size + size // 2)
    put(small, THIRD)
    assert {entry.key for entry in cache.entries()} == {KEY, THIRD}


def test_the_entry_just_stored_survives_even_a_zero_limit(cache: KernelCache) -> None:
    put(cache)
    put(KernelCache(cache.root, max_bytes=0), OTHER)
    assert [entry.key for entry in cache.entries()] == [OTHER]


def test_an_entry_that_is_locked_is_not_evicted(cache: KernelCache) -> None:
    put(cache)
    with cache.lock(KEY):
        put(KernelCache(cache.root, max_bytes=0), OTHER)
    assert {entry.key for entry in cache.entries()} == {KEY, OTHER}


def test_a_failed_store_leaves_nothing(cache: KernelCache) -> None:
    with pytest.raises(TypeError):
        cache.store(KEY, FILES, {"label": object()})
    assert cache.entries() == []
    assert list(cache.root.glob(".new-*")) == []


def test_what_a_dead_process_left_is_swept_but_not_what_is_in_the_making(
    cache: KernelCache,
) -> None:
    put(cache)
    for name, age in ((".new-old", 7200), (".new-young", 60)):
        (cache.root / name).mkdir()
        (cache.root / name / "kernel.ptx").write_text("half")
        then = time.time() - age
        os.utime(cache.root / name, (then, then))
    put(cache, OTHER)
    assert [path.name for path in cache.root.glob(".new-*")] == [".new-young"]


def test_the_directory_is_the_users_alone(cache: KernelCache) -> None:
    directory = put(cache)
    for path in (cache.root, directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_directory_that_others_can_write_is_refused(cache: KernelCache, mode: int) -> None:
    put(cache)
    cache.root.chmod(mode)
    for use in (lambda: cache.load(KEY), lambda: put(cache), cache.entries, cache.clear):
        with pytest.raises(CacheError, match="other users can write"):
            use()


def test_a_directory_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="CUTE_FA_CACHE_DIR"):
        put(KernelCache(tmp_path / "file" / "kernels"))


HOLD = """
import sys
import time
from pathlib import Path
from cute_fa.build.cache import KernelCache, _locked
cache, key = KernelCache(Path(sys.argv[1])), sys.argv[2]
with _locked(cache.root / ".locks" / key, blocking=False) as free:
    print("free" if free else "busy", flush=True)
with cache.lock(key):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start_holder(cache: KernelCache) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache.root), KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_lock_holds_across_processes_and_clear(cache: KernelCache) -> None:
    """Also for one that was waiting while ``clear`` removed the file it waited on."""
    put(cache)
    with start_holder(cache) as first:
        assert first.stdout is not None and first.stdin is not None
        assert [first.stdout.readline() for _ in range(2)] == ["free\n", "locked\n"]
        with start_holder(cache) as second:
            assert second.stdout is not None and second.stdin is not None
            assert second.stdout.readline() == "busy\n"
            cache.clear()
            first.stdin.close()
            assert second.stdout.readline() == "locked\n"
            with _locked(cache.root / ".locks" / KEY, blocking=False) as free:
                assert not free
            second.stdin.close()


@pytest.mark.parametrize("inner", [".", "kernels", "below/kernels"])
def test_a_file_where_the_cache_should_be(tmp_path: Path, inner: str) -> None:
    """Every operation says so, as an error of this package."""
    (tmp_path / "file").write_text("not a directory")
    cache = KernelCache(tmp_path / "file" / inner)

    def lock() -> None:
        with cache.lock(KEY):
            pass

    for operation in (cache.entries, cache.verify, cache.clear, lock, lambda: cache.load(KEY)):
        with pytest.raises(CacheError, match=r"cannot be used where it is(.|\n)*CUTE_FA_CACHE_DIR"):
            operation()
