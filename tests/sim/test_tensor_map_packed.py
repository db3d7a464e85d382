"""Tensor maps of 4- and 6-bit elements; swizzles with atoms of 32 and 64 bytes (5.5.1, 5.5.7)."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest

from cute_fa.errors import InvalidArgumentError
from cute_fa.sim.memory import GlobalMemory
from cute_fa.sim.tensor_map import TensorMap, decode, driver_type, encode, swizzled_chunks
from tests.sim.test_mbarrier import init, wait
from tests.sim.test_tensor_copy import aligned
from tests.sim.tiny import Result, run

BAR = 8192
ROWS, PITCH = 12, 256  # rows of global memory, bytes between them
BITS = {"b4x16": 4, "b4x16_p64": 4, "b6x16_p32": 6, "u8": 8}


def tensor_map(data: np.ndarray, kind: str, box: tuple[int, int], **fields: object) -> TensorMap:
    """256 elements by ``ROWS`` rows; ``box`` in elements."""
    inner, high = box
    bits = BITS[kind]
    return TensorMap(
        data.ctypes.data,
        kind,
        1,
        (256 * bits // 8, ROWS),
        (1, PITCH),
        (inner * bits // 8, high),
        (1, 1),
        **{"swizzle": 0, **fields},  # type: ignore[arg-type]
    )


def load(tensor: TensorMap, data: np.ndarray, corner: tuple[int, int], **options: object) -> Result:
    """Load one box to the start of shared memory and copy 4096 bytes of it to the output."""
    memory = GlobalMemory()
    memory.register(data, name="tensor")
    image = np.zeros(512, np.uint8)
    image[:128] = np.frombuffer(encode(tensor), np.uint8)
    words = tensor.shared_bytes // 128
    lines = ["mul.lo.u32 %r40, %tid, 4; add.u32 %r40, %r40, %smem;"]
    for i in range(words):
        lines.append(f"ld.shared.u32 %r41, [%r40+{i * 128}]; st.global.u32 [%out+{4 * i}], %r41;")
    body = f"""
        @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%smem+{BAR}], {tensor.box_bytes};
        mov.u32 %r20, {corner[0]}; mov.u32 %r21, {corner[1]};
        @%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
            [%smem], [%in0, {{%r20, %r21}}], [%smem+{BAR}];
    """
    return run(
        init(1, f"+{BAR}") + body + wait(0, f"+{BAR}") + "\n".join(lines),
        image,
        arch="sm_100a",
        smem_bytes=16384,
        memory=memory,
        words=words,
        **options,  # type: ignore[arg-type]
    )


def shared(result: Result) -> np.ndarray:
    """The bytes of shared memory, in order."""
    return np.ascontiguousarray(result.out.T).view(np.uint8).reshape(-1)


def chunk_of(line: int, chunk: int, swizzle: int, atom: int) -> int:
    """Where a 16-byte chunk of a 128-byte line lies, by the tables of section 5.5.7."""
    per_atom = atom // 16
    return (chunk // per_atom ^ line % (swizzle // atom)) * per_atom + chunk % per_atom


def random_data() -> np.ndarray:
    data = aligned(ROWS * PITCH)
    data[...] = np.random.default_rng(1).integers(0, 256, data.size, np.uint8)
    return data


@pytest.mark.parametrize("kind", ["b4x16_p64", "b6x16_p32"])
@pytest.mark.parametrize("swizzle", [0, 128])
def test_sixteen_elements_take_sixteen_bytes(kind: str, swizzle: int) -> None:
    """128 elements of 8 rows from element 128 on: lines of 128 bytes in shared memory."""
    data = random_data()
    tensor = tensor_map(data, kind, (128, 8), swizzle=swizzle)
    bits = BITS[kind]
    assert (tensor.box_bytes, tensor.shared_bytes) == (128 * bits // 8 * 8, 1024)
    result = load(tensor, data, (128, 2))
    assert result.rules == []
    got = shared(result).reshape(8, 8, 16)
    rows = data.reshape(ROWS, PITCH)[2:10, 128 * bits // 8 : 256 * bits // 8]
    for line, group in itertools.product(range(8), range(8)):
        place = chunk_of(line, group, 128, 16) if swizzle else group
        want = rows[line, 2 * bits * group : 2 * bits * (group + 1)]
        assert (got[line, place, : 2 * bits] == want).all()


def test_packed_pairs_without_padding() -> None:
    data = random_data()
    tensor = tensor_map(data, "b4x16", (256, 8), swizzle=128)
    assert tensor.box_bytes == tensor.shared_bytes == 1024
    got = shared(load(tensor, data, (0, 4))).reshape(8, 8, 16)
    for line, chunk in itertools.product(range(8), range(8)):
        want = data.reshape(ROWS, PITCH)[line + 4, 16 * chunk : 16 * chunk + 16]
        assert (got[line, chunk_of(line, chunk, 128, 16)] == want).all()


def test_rows_outside_are_zero_and_count() -> None:
    data = random_data()
    tensor = tensor_map(data, "b6x16_p32", (128, 8))
    result = load(tensor, data, (0, ROWS - 4))
    assert result.rules == []
    got = shared(result).reshape(8, 8, 16)[:, :, :12]
    assert (got[:4] == data.reshape(ROWS, PITCH)[-4:, :96].reshape(4, 8, 12)).all()
    assert not got[4:].any()


@pytest.mark.parametrize("atom", [16, 32, 64])
def test_swizzles_keep_their_atoms_together(atom: int) -> None:
    data = random_data()
    tensor = tensor_map(data, "u8", (128, 8), swizzle=128, atom=atom)
    got = shared(load(tensor, data, (0, 0))).reshape(8, 8, 16)
    for line, chunk in itertools.product(range(8), range(8)):
        want = data.reshape(ROWS, PITCH)[line, 16 * chunk : 16 * chunk + 16]
        assert (got[line, chunk_of(line, chunk, 128, atom)] == want).all()
    assert (
        swizzled_chunks(1024 + 128, 32, 128, atom).tolist()
        == {
            16: [73, 72],
            32: [74, 75],
            64: [76, 77],
        }[atom]
    )


@pytest.mark.parametrize(("kind", "start"), [("b4x16_p64", 64), ("b6x16_p32", 16), ("b4x16", 1)])
def test_boxes_begin_at_whole_groups(kind: str, start: int) -> None:
    data = random_data()
    result = load(tensor_map(data, kind, (128, 8)), data, (start, 0), strict=False)
    assert "bulk-operands" in result.rules


@pytest.mark.parametrize("kind", sorted(BITS))
@pytest.mark.parametrize("atom", [16, 32, 64])
def test_packed_maps_survive_a_round_trip(kind: str, atom: int) -> None:
    tensor = tensor_map(random_data(), kind, (128, 7), swizzle=128, atom=atom)
    assert decode(encode(tensor)) == tensor
    with pytest.raises(InvalidArgumentError, match="atoms" if atom > 16 else "swizzle"):
        encode(replace(tensor, swizzle=64, box=(tensor.box[0] * (1 + (atom == 16)), 7)))


def test_maps_that_exchange_halves_are_refused() -> None:
    image = bytearray(encode(tensor_map(random_data(), "u8", (128, 8), swizzle=128)))
    flags = struct.unpack_from("<I", image, 8)[0]
    struct.pack_into("<I", image, 8, flags | 2 << 19)
    with pytest.raises(InvalidArgumentError, match="8-byte halves"):
        decode(bytes(image))


def test_the_drivers_types() -> None:
    names = [driver_type(number) for number in range(16)]
    assert names[:10] == ["u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16"]
    assert names[10:] == ["f32", "tf32", "tf32", "b4x16", "b4x16_p64", "b6x16_p32"]
    with pytest.raises(InvalidArgumentError, match="16"):
        driver_type(16)
