"""tcgen05.cp and tcgen05.shift (PTX ISA 9.7.16.9), element by element."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.isa import UnsupportedInstruction
from cute_fa.sim.umma_descriptors import SharedDescriptor
from tests.sim.tensor_core import BASE, LEADER, WAIT, commit, end, launch, tensor_memory
from tests.sim.test_wgmma import SMEM

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
COLUMN = 24

SHAPES = {  # rows, bytes of a row, lanes of row r
    "128x256b": (128, 32, lambda r: [r]),
    "128x128b": (128, 16, lambda r: [r]),
    "4x256b": (4, 32, lambda r: [32 * r]),
    "64x128b.warpx2::02_13": (64, 16, lambda r: [r, r + 64]),
    "64x128b.warpx2::01_23": (64, 16, lambda r: [64 * (r // 32) + r % 32 + 32 * i for i in (0, 1)]),
    "32x128b.warpx4": (32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
}


def descriptor(swizzle: int, nbytes: int) -> SharedDescriptor:
    """Rows in groups of eight with a gap behind each."""
    if swizzle:
        return SharedDescriptor(BASE, 16, 8 * swizzle, 0, swizzle)
    return SharedDescriptor(BASE, 4096, 8 * nbytes + 128)


def row_bytes(image: np.ndarray, desc: SharedDescriptor, row: int, nbytes: int) -> np.ndarray:
    """The bytes of a row in shared memory, chunk by chunk of 16 bytes (9.7.16.3.3)."""
    out = []
    for chunk in range(nbytes // 16):
        if desc.swizzle:
            where = desc.start + row // 8 * desc.stride + row % 8 * desc.swizzle + 16 * chunk
            where ^= (where >> 7 & (desc.swizzle // 16 - 1)) << 4
        else:
            where = desc.start + row // 8 * desc.stride + row % 8 * 16 + chunk * desc.leading
        out.append(image[where - BASE : where - BASE + 16])
    return np.concatenate(out)


def copy(form: str, desc: SharedDescriptor | int, column: int = COLUMN) -> str:
    bits = desc if isinstance(desc, int) else desc.encode()
    return f"mov.u64 %rd20, {bits};\nmov.u32 %r22, {column};\n@%p1 {form} [%r22], %rd20;\n"


def image_of(ctas: int = 1) -> np.ndarray:
    return np.random.default_rng(ctas).integers(0, 256, SMEM * ctas, np.uint8)


def unpacked(chunk: np.ndarray, source: str) -> list[int]:
    """16 elements of a chunk in the byte containers of the matrix unit."""
    bits, shift = {"b4x16_p64": (4, 2), "b6x16_p32": (6, 0)}[source]
    word = int.from_bytes(chunk.tobytes(), "little")
    return [(word >> bits * i & (1 << bits) - 1) << shift for i in range(16)]


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_copy(shape: str, swizzle: int) -> None:
    rows, nbytes, lanes = SHAPES[shape]
    desc = descriptor(swizzle, nbytes)
    image = image_of()
    body = copy(f"tcgen05.cp.cta_group::1.{shape}", desc) + commit() + WAIT
    with tensor_memory() as seen:
        got = launch(body, image)
    assert got.rules == []
    want = np.zeros((512, 128), np.uint32)
    for row in range(rows):
        words = row_bytes(image, desc, row, nbytes).view(np.uint32)
        for lane in lanes(row):
            want[COLUMN : COLUMN + len(words), lane] = words
    assert want.any()
    np.testing.assert_array_equal(seen[0][0], want)
    written = rows * nbytes * len(lanes(0))
    assert got.launch.counters["tmem_bytes_written"] == written


@POLICIES
@pytest.mark.parametrize("source", ["b4x16_p64", "b6x16_p32"])
@pytest.mark.parametrize("shape", ["128x256b", "32x128b.warpx4"])
def test_copy_with_decompression(shape: str, source: str, completion: str) -> None:
    rows, nbytes, lanes = SHAPES[shape]
    desc = descriptor(0, nbytes)
    image = image_of()
    form = f"tcgen05.cp.cta_group::1.{shape}.b8x16.{source}"
    with tensor_memory() as seen:
        got = launch(copy(form, desc) + commit() + WAIT, image, completion=completion)
    assert got.rules == []
    for row in range(rows):
        chunks = row_bytes(image, desc, row, nbytes).reshape(-1, 16)
        values = [value for chunk in chunks for value in unpacked(chunk, source)]
        words = np.array(values, np.uint8).view(np.uint32)
        for lane in lanes(row):
            cells = seen[0][0, COLUMN : COLUMN + len(words), lane]
            np.testing.assert_array_equal(cells, words)


@POLICIES
def test_copy_by_a_pair(completion: str) -> None:
    """One thread copies in both CTAs, each from its own shared memory."""
    image = image_of(2)
    desc = descriptor(0, 16)
    body = LEADER + copy("tcgen05.cp.cta_group::2.128x128b", desc) + end(2)
    with tensor_memory() as seen:
        got = launch(body, image, ctas=2, completion=completion)
    assert got.rules == []
    for cta in range(2):
        part = image[cta * SMEM : (cta + 1) * SMEM]
        rows = [row_bytes(part, desc, row, 16).view(np.uint32) for row in range(128)]
        np.testing.assert_array_equal(seen[0][cta, COLUMN : COLUMN + 4], np.array(rows).T)


@POLICIES
@pytest.mark.parametrize("lane", [0, 32, 96])
def test_shift(lane: int, completion: str) -> None:
    """Every lane gets what the next one has, except the last of a quarter."""
    before = np.random.default_rng(0).integers(0, 1 << 32, (1, 512, 128), np.uint32)
    body = f"mov.u32 %r22, {lane << 16 | COLUMN};\n@%p1 tcgen05.shift.cta_group::1.down [%r22];\n"
    with tensor_memory(before) as seen:
        got = launch(body + commit() + WAIT, image_of(), completion=completion)
    assert got.rules == []
    want = before[0].copy()
    for column in range(COLUMN, COLUMN + 8):
        for i in range(lane, 128):
            if i % 32 != 31:
                want[column, i] = before[0, column, i + 1]
    np.testing.assert_array_equal(seen[0][0], want)


def test_shifts_and_copies_follow_one_another() -> None:
    """A copy, then two shifts of it, in the order of issue; ``.down`` may stand first."""
    image = image_of()
    desc = descriptor(0, 16)
    body = copy("tcgen05.cp.cta_group::1.128x128b", desc)
    body += "@%p1 tcgen05.shift.down.cta_group::1 [%r22];\n" * 2
    with tensor_memory() as seen:
        got = launch(body + commit() + WAIT, image, completion="late")
    assert got.rules == []
    for lane in range(128):
        row = lane // 32 * 32 + min(lane % 32 + 2, 31)
        words = row_bytes(image, desc, row, 16).view(np.uint32)
        np.testing.assert_array_equal(seen[0][0, COLUMN : COLUMN + 4, lane], words)


@pytest.mark.parametrize(
    "form",
    [
        "tcgen05.cp.cta_group::1.64x128b",
        "tcgen05.cp.cta_group::1.32x128b.warpx2::02_13",
        "tcgen05.cp.cta_group::1.128x256b.warpx4",
        "tcgen05.cp.cta_group::1.128x128b.b8x16",
        "tcgen05.cp.cta_group::1.128x128b.b4x16_p64",
        "tcgen05.cp.128x128b",
    ],
)
def test_forms_that_do_not_exist_are_refused(form: str) -> None:
    with pytest.raises(UnsupportedInstruction):
        launch(copy(form, descriptor(0, 16)), image_of())


@pytest.mark.parametrize(
    ("desc", "column", "rule"),
    [
        (descriptor(0, 16).encode() & ~(7 << 46), 0, "tensor-descriptor"),
        (descriptor(0, 16).encode() | 3 << 61, 0, "tensor-descriptor"),
        (SharedDescriptor(BASE + SMEM, 16, 1024).encode(), 0, "shared-out-of-bounds"),
        (descriptor(0, 16), 510, "tmem-out-of-bounds"),
        (descriptor(0, 16), 1 << 16, "tmem-out-of-bounds"),
    ],
)
def test_operands_that_are_not_allowed(desc: int, column: int, rule: str) -> None:
    with tensor_memory():
        got = launch(copy("tcgen05.cp.cta_group::1.128x128b", desc, column), image_of())
    assert got.rules == [rule]


def test_shift_from_a_lane_inside_a_quarter() -> None:
    body = f"mov.u32 %r22, {16 << 16};\n@%p1 tcgen05.shift.cta_group::1.down [%r22];\n"
    with tensor_memory():
        got = launch(body, image_of())
    assert got.rules == ["tmem-operands"]


def test_shared_memory_is_read_behind_a_proxy() -> None:
    """A thread writes what the copy reads, and there is no fence.proxy.async in between."""
    body = "mov.u32 %r40, 5;\n@%p1 st.shared.u32 [%smem], %r40;\n"
    body += copy("tcgen05.cp.cta_group::1.128x128b", descriptor(0, 16)) + commit() + WAIT
    with tensor_memory():
        got = launch(body, image_of(), checks=frozenset(["missing-proxy-fence"]))
    assert got.rules == ["missing-proxy-fence"]


def test_shared_memory_is_overwritten_under_a_copy() -> None:
    body = copy("tcgen05.cp.cta_group::1.128x128b", descriptor(0, 16)) + commit()
    body += "mov.u32 %r40, 5;\n@%p1 st.shared.u32 [%smem], %r40;\n" + WAIT
    for completion in ("eager", "late"):
        with tensor_memory():
            got = launch(body, image_of(), checks=True, completion=completion)
        assert set(got.rules) & {"overwrite-while-reading", "shared-race"}, completion
