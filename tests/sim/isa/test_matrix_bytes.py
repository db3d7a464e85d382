"""ldmatrix and stmatrix of bytes and of packed 4- and 6-bit elements (9.7.14.5.15, 9.7.14.5.16)."""

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.tiny import run

TO_SHARED = """
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%in];
    shl.b32 %r8, %lane, 4; add.u32 %r8, %r8, %smem;
    st.shared.v4.b32 [%r8], {%r3, %r4, %r5, %r6};
    bar.sync 0; mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
"""
STORE = "st.global.v4.b32 [%out], {%r10, %r11, %r12, %r13};"


def registers(count):
    return "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"


def unpacked(rows, source):
    """The 16 elements of each 16-byte row, by the bits of the row as one little-endian number."""
    bits = {"b8": 8, "b8x16.b6x16_p32": 6, "b8x16.b4x16_p64": 4}[source]
    numbers = [int.from_bytes(row.tobytes(), "little") for row in rows]
    return np.array([[n >> bits * i & (1 << bits) - 1 for i in range(16)] for n in numbers])


def load(form, count, source):
    rows = np.random.default_rng(4).integers(0, 256, (32, 16), np.uint8)
    body = f"ldmatrix.sync.aligned.{form}.shared.{source} {registers(count)}, [%r8];"
    result = run(TO_SHARED + body + STORE, rows, words=4, arch="sm_100a")
    assert result.rules == []
    return unpacked(rows, source), result


@pytest.mark.parametrize("source", ["b8", "b8x16.b6x16_p32", "b8x16.b4x16_p64"])
@pytest.mark.parametrize("count", [1, 2])
def test_square_matrices_by_columns(count, source):
    columns, result = load(f"m16n16.x{count}.trans", 2 * count, source)
    got = result.out.view(np.uint8).reshape(32, 4, 4)
    for j in range(count):
        matrix = columns[16 * j : 16 * j + 16].T
        for lane in range(32):
            g, t = divmod(lane, 4)
            assert (got[lane, 2 * j] == matrix[g, 4 * t : 4 * t + 4]).all()
            assert (got[lane, 2 * j + 1] == matrix[g + 8, 4 * t : 4 * t + 4]).all()
    assert result.launch.counters["shared_bytes_read"] == count * 256


@pytest.mark.parametrize("source", ["b8x16.b6x16_p32", "b8x16.b4x16_p64"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_wide_matrices_by_rows(count, source):
    rows, result = load(f"m8n16.x{count}", count, source)
    got = result.out.view(np.uint8).reshape(32, 4, 4)
    for j in range(count):
        for lane in range(32):
            g, t = divmod(lane, 4)
            assert (got[lane, j] == rows[8 * j + g, 4 * t : 4 * t + 4]).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_accumulators_of_bytes_are_stored_by_columns(count):
    words = np.random.default_rng(5).integers(0, 1 << 32, (32, 4), np.uint32)
    result = run(
        f"""
        ld.global.v4.b32 {registers(4)}, [%in];
        shl.b32 %r8, %lane, 4; add.u32 %r8, %r8, %smem;
        stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%r8], {registers(count)};
        bar.sync 0;
        setp.lt.u32 %p1, %lane, {8 * count};
        @%p1 ld.shared.v4.b32 {registers(4)}, [%r8];
        @%p1 {STORE}
        """,
        words,
        words=4,
        arch="sm_100a",
    )
    assert result.rules == []
    elements = words.view(np.uint8).reshape(32, 4, 4)
    columns = result.out.view(np.uint8).reshape(32, 16)
    for j in range(count):
        for lane in range(32):
            g, t = divmod(lane, 4)
            first, second = columns[8 * j + 2 * t], columns[8 * j + 2 * t + 1]
            stored = [first[g], second[g], first[g + 8], second[g + 8]]
            assert stored == elements[lane, j].tolist()


@pytest.mark.parametrize(
    "form",
    [
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r10, %r11}, [%r8]",
        "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%r10, %r11, %r12, %r13}, [%r8]",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r10}, [%r8]",
        "stmatrix.sync.aligned.m16n8.x1.shared.b8 [%r8], {%r10}",
        "stmatrix.sync.aligned.m16n8.x2.trans.shared.b8 [%r8], {%r10}",
    ],
)
def test_forms_that_do_not_exist_are_refused(form):
    with pytest.raises(UnsupportedError, match="line"):
        run(form + ";", arch="sm_100a")
