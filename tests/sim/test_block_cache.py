"""Generated code on disk: found again, never trusted when damaged or open to others."""

import numpy as np
import pytest

from cute_fa import ptx
from cute_fa.sim import block_cache
from cute_fa.sim import program as program_module
from tests.sim.tiny import FRAME, run

BODY = """
    ld.global.b32 %r3, [%in]; mov.b32 %r4, 0;
    LOOP: mad.lo.s32 %r3, %r3, 5, %r4; add.s32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, %lane; @%p1 bra LOOP;
    mov.b64 %rd1, table; ld.global.b32 %r5, [%rd1+4]; add.s32 %r3, %r3, %r5;
    st.global.b32 [%out], %r3;
"""
MODULE = ".global .align 4 .u32 table[2] = {7, 1000};"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache that takes kernels of any size; programs in memory are forgotten."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUTE_FA_CACHE", raising=False)
    monkeypatch.setattr(block_cache, "MIN_INSTRUCTIONS", 1)
    forget(monkeypatch)
    return tmp_path / "sim" / "blocks"


def forget(monkeypatch):
    monkeypatch.setattr(program_module, "_PROGRAMS", type(program_module._PROGRAMS)())


def launch():
    data = np.arange(64, dtype=np.uint32)
    return run(BODY, data, threads=64, module=MODULE, strict=True)


def refuse_to_generate(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(program_module, "BlockEmitter", fail)
    monkeypatch.setattr(program_module, "render", fail)


def test_a_second_process_generates_nothing(folder, monkeypatch):
    first = launch()
    assert len(list(folder.iterdir())) == 1
    forget(monkeypatch)
    refuse_to_generate(monkeypatch)
    second = launch()
    assert (second.out == first.out).all()
    assert second.launch.counters == first.launch.counters


def test_variants_that_the_entry_lacks_are_made_and_added(folder, monkeypatch):
    """The first launch has whole warps only, the second one a part of a warp."""
    uniform = "add.s32 %r3, %tid, 1; bra NEXT; NEXT: st.global.b32 [%out], %r3;"
    run(uniform, threads=64, strict=True)
    (entry,) = folder.iterdir()
    before = entry.stat().st_size
    forget(monkeypatch)
    result = run(uniform, threads=40, strict=True)
    assert (result.out[:, 0] == np.arange(40) + 1).all()
    assert entry.stat().st_size > before


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_entry_is_no_entry(folder, monkeypatch, damage):
    first = launch()
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    forget(monkeypatch)
    assert (launch().out == first.out).all()
    assert entry.read_bytes() != damage  # written anew


def test_a_directory_that_others_can_write_to_is_not_used(folder, monkeypatch):
    launch()
    folder.chmod(0o777)
    forget(monkeypatch)
    refuse_to_generate(monkeypatch)
    with pytest.raises(AssertionError, match="generated again"):
        launch()
    folder.chmod(0o700)
    assert launch().out.shape == (64, 1)


def test_the_cache_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setenv("CUTE_FA_CACHE", "0")
    launch()
    assert not folder.exists()


def test_small_kernels_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(block_cache, "MIN_INSTRUCTIONS", 500)
    launch()
    assert not folder.exists()


def test_entries_differ_by_text_kernel_and_simulator(monkeypatch):
    names = {block_cache.key_of("text", "k"), block_cache.key_of("text ", "k")}
    names.add(block_cache.key_of("text", "j"))
    monkeypatch.setattr(block_cache, "_sources_digest", lambda: "another version")
    names.add(block_cache.key_of("text", "k"))
    assert len(names) == 4


def test_the_oldest_entries_go(folder, monkeypatch):
    monkeypatch.setattr(block_cache, "MAX_ENTRIES", 3)
    for number in range(5):
        block_cache.save(f"entry{number}", number)
    left = [block_cache.load(f"entry{number}") for number in range(5)]
    assert left.count(None) == 2
    assert left[4] == 4


def test_global_variables_are_there_again(folder, monkeypatch):
    text = FRAME.format(
        arch="sm_80", module=MODULE, declarations="", body=BODY, in_bytes=4, out_bytes=4
    )
    launch()
    forget(monkeypatch)
    restored = program_module.prepare(ptx.parse(text), "tiny")
    assert restored.variables["table"].view(np.uint32).tolist() == [7, 1000]
