"""tcgen05.mma against brute force from the ISA's layouts, under every completion policy."""

from __future__ import annotations

import numpy as np
import pytest

from cute_fa.sim.isa import UnsupportedInstruction, minifloat
from tests.sim.tensor_core import (
    A_AT,
    B_AT,
    LEADER,
    WAIT,
    accumulators,
    commit,
    end,
    image_of,
    instruction,
    launch,
    matrix,
    mma,
    tensor_memory,
    tile,
)
from tests.sim.test_wgmma import SMEM

POLICIES = pytest.mark.parametrize("completion", ["eager", "late", "random"])
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "i8": 32, "mxf8f6f4": 32, "mxf4": 64, "mxf4nvf4": 64}

LAYOUTS = [
    # kind, A, B, D, M, N, swizzle, transposed, atom
    ("f16", "f16", "f16", "f32", 128, 64, 128, "", 16),
    ("f16", "bf16", "bf16", "f32", 64, 24, 64, "", 16),
    ("f16", "bf16", "bf16", "f32", 128, 8, 32, "B", 16),
    ("f16", "f16", "f16", "f32", 64, 16, 0, "", 16),
    ("f16", "bf16", "bf16", "f32", 128, 128, 128, "AB", 16),
    ("f16", "f16", "f16", "f32", 128, 64, 64, "A", 16),
    ("f16", "f16", "f16", "f32", 64, 32, 32, "AB", 16),
    ("f16", "f16", "f16", "f32", 128, 40, 0, "AB", 16),
    ("f16", "bf16", "bf16", "f32", 128, 256, 128, "B", 16),
    ("f16", "f16", "f16", "f16", 128, 64, 128, "", 16),
    ("tf32", "tf32", "tf32", "f32", 128, 32, 128, "", 16),
    ("tf32", "tf32", "tf32", "f32", 128, 64, 128, "AB", 32),
    ("f8f6f4", "e4m3", "e5m2", "f32", 128, 48, 64, "", 16),
    ("f8f6f4", "e4m3", "e4m3", "f16", 64, 32, 128, "AB", 16),
    ("f8f6f4", "e2m3", "e3m2", "f32", 128, 16, 128, "", 16),
    ("f8f6f4", "e2m1", "e5m2", "f32", 128, 16, 32, "", 16),
    ("i8", "u8", "s8", "s32", 128, 32, 128, "", 16),
    ("i8", "s8", "s8", "s32", 64, 48, 64, "B", 16),
]


@pytest.mark.parametrize(("kind", "a", "b", "d", "m", "n", "swizzle", "transpose", "atom"), LAYOUTS)
def test_operand_layouts(
    kind: str, a: str, b: str, d: str, m: int, n: int, swizzle: int, transpose: str, atom: int
) -> None:
    image = image_of(a, b)
    left = tile(A_AT, swizzle, "A" in transpose, m, atom=atom)
    right = tile(B_AT, swizzle, "B" in transpose, n, atom=atom)
    idesc = instruction(kind, m, n, a, b, d, transpose=transpose)
    body = mma(kind, idesc, str(left.encode()), right.encode(), d=40) + commit() + WAIT
    with tensor_memory() as seen:
        got = launch(body, image)
    assert got.rules == []
    k = DEPTH[kind]
    want = matrix(image, a, left, m, "A" in transpose, k)
    want = want @ matrix(image, b, right, n, "B" in transpose, k).T
    assert np.any(want)
    np.testing.assert_array_equal(accumulators(seen[0], m, n, d, 40), want)
    types = a if a == b else f"{a}.{b}"
    counters = got.launch.counters
    assert counters[f"mma_flops.{types}"] == 2 * m * n * k
    assert counters["mma_shared_bytes_read"] == 32 * (m + n)  # each row's k extent is 32 bytes
    assert counters["mma_tmem_bytes_written"] == 4 * m * n
    assert counters["mma_tmem_bytes_read"] == 0


@POLICIES
@pytest.mark.parametrize("d", ["f32", "f16", "s32"])
def test_chains_accumulate(d: str, completion: str) -> None:
    """Products along k on one accumulator, with another accumulator's in between."""
    kind, a = ("i8", "s8") if d == "s32" else ("f16", "f16")
    m, n, k = 128, 16, DEPTH[kind]
    image = image_of(a, a)
    left = [tile(A_AT + 32 * i, 128, False, m) for i in range(4)]
    right = [tile(B_AT + 32 * i, 128, False, n) for i in range(4)]
    idesc = instruction(kind, m, n, a, a, d)
    body = ""
    for i in range(4):
        pair = str(left[i].encode()), right[i].encode()
        body += mma(kind, idesc, *pair, accumulate=i > 0)
        if i == 2:
            body += mma(kind, idesc, *pair, d=64, accumulate=True)
    before = np.zeros((1, 512, 128), np.uint32)
    three = {"f32": 0x40400000, "f16": 0x4200, "s32": 3}[d]
    before[0, 64 : 64 + n] = three
    with tensor_memory(before) as seen:
        got = launch(body + commit() + WAIT, image, completion=completion, seed=2)
    assert got.rules == []
    parts = [
        matrix(image, a, x, m, False, k) @ matrix(image, a, y, n, False, k).T
        for x, y in zip(left, right, strict=True)
    ]
    np.testing.assert_array_equal(accumulators(seen[0], m, n, d), sum(parts))
    np.testing.assert_array_equal(accumulators(seen[0], m, n, d, 64), parts[2] + 3)


SHAPES = [  # M, N, CTAs of the group, .ws
    (256, 64, 2, False),
    (256, 32, 2, False),
    (128, 64, 2, False),
    (128, 16, 2, False),
    (128, 64, 1, True),
    (64, 128, 1, True),
    (32, 64, 1, True),
]


@POLICIES
@pytest.mark.parametrize(("m", "n", "group", "ws"), SHAPES)
def test_accumulator_layouts(m: int, n: int, group: int, ws: bool, completion: str) -> None:
    """Pairs: each CTA supplies half of A's rows and half of B's columns from its own memory."""
    pair = group == 2
    images = [image_of("bf16", "bf16", seed) for seed in range(1, group + 1)]
    rows, columns = m // group, n // group
    left, right = tile(A_AT, 128, False, rows), tile(B_AT, 128, False, columns)
    idesc = instruction("f16", m, n, "bf16", "bf16")
    body = LEADER
    form = ".ws" if ws else ""
    body += mma("f16", idesc, str(left.encode()), right.encode(), group=group, form=form)
    body += end(group)
    with tensor_memory() as seen:
        got = launch(body, np.concatenate(images), ctas=group, completion=completion)
    assert got.rules == []
    a = np.concatenate([matrix(x, "bf16", left, rows, False, 16) for x in images])
    b = np.concatenate([matrix(x, "bf16", right, columns, False, 16) for x in images])
    got_d = accumulators(seen[0], m, n, "f32", pair=pair, ws=ws)
    np.testing.assert_array_equal(got_d, a @ b.T)


@POLICIES
@pytest.mark.parametrize(
    ("kind", "a", "m", "group"),
    [
        ("f16", "bf16", 128, 1),
        ("f16", "f16", 64, 1),
        ("tf32", "tf32", 128, 1),
        ("f8f6f4", "e4m3", 128, 1),
        ("f8f6f4", "e2m1", 128, 1),
        ("f8f6f4", "e3m2", 128, 1),
        ("f16", "bf16", 128, 2),
    ],
)
def test_a_in_tensor_memory(kind: str, a: str, m: int, group: int, completion: str) -> None:
    """Two products along k: A's rows are lanes, its elements packed along the columns."""
    n, k = 32, DEPTH[kind]
    b = a if a not in ("e2m1", "e3m2") else "e4m3"
    image = np.concatenate([image_of(a, b, seed) for seed in range(1, group + 1)])
    before = np.zeros((group, 512, 128), np.uint32)
    raw = random_words(a, (group, 16, 128))
    before[:, 200:216] = raw
    columns = n // group
    right = [tile(B_AT + 32 * i, 128, False, columns) for i in range(2)]
    idesc = instruction(kind, m, n, a, b)
    body = LEADER
    for i in range(2):
        body += f"mov.u32 %r31, {200 + 8 * i};\n"
        body += mma(kind, idesc, "%r31", right[i].encode(), accumulate=i > 0, group=group)
    body += end(group)
    with tensor_memory(before) as seen:
        got = launch(body, image, ctas=group, completion=completion)
    assert got.rules == []
    images = np.split(image, group)
    parts = [[matrix(x, b, right[i], columns, False, k) for x in images] for i in range(2)]
    b_rows = np.concatenate([np.concatenate(part) for part in parts], axis=1)  # (n, 2 k)
    want = np.zeros((m, n))
    for row in range(m):
        cta, r = divmod(row, m // group)
        for half in range(group):  # of a pair's lanes, each has A's rows for half of D's columns
            lane = r + 64 * half if group == 2 else (r // 16 * 32 + r % 16 if m == 64 else r)
            where = slice(half * n // group, (half + 1) * n // group)
            want[row, where] = (lane_values(a, raw[cta, :, lane]) @ b_rows.T)[where]
    got_d = accumulators(seen[0], m, n, "f32", pair=group == 2)
    np.testing.assert_array_equal(got_d, want)
    lanes = m * group  # of both CTAs of a pair
    assert got.launch.counters["mma_tmem_bytes_read"] == 4 * (2 * 8 * lanes + m * n)


def random_words(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Tensor memory cells of small numbers."""
    rng = np.random.default_rng(5)
    count = int(np.prod(shape))
    if kind in ("f16", "bf16"):
        numbers = rng.integers(-3, 4, 2 * count)
        if kind == "f16":
            return numbers.astype(np.float16).view(np.uint32).reshape(shape)
        wide = numbers.astype(np.float32).view(np.uint32) >> 16
        return wide.astype(np.uint16).view(np.uint32).reshape(shape)
    if kind == "tf32":
        return rng.integers(-3, 4, count).astype(np.float32).view(np.uint32).reshape(shape)
    codes = {
        "e4m3": [0, 0x38, 0x40, 0xB8],
        "e2m1": [code << 2 for code in range(16)],
        "e3m2": list(range(64)),
    }
    return rng.choice(np.array(codes[kind], np.uint8), 4 * count).view(np.uint32).reshape(shape)


def lane_values(kind: str, words: np.ndarray) -> np.ndarray:
    """The elements of one lane's cells, in order."""
    words = np.ascontiguousarray(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "bf16":
        halves = words.view(np.uint16).astype(np.uint32) << 16
        return halves.view(np.float32).astype(np.float64)
    if kind == "tf32":
        return words.view(np.float32).astype(np.float64)
    codes = words.view(np.uint8) >> (2 if kind == "e2m1" else 0)
    return minifloat.decode(codes, kind).astype(np.float64)


SCALED = [  # kind, A, B, M, N, scales per row, scale type, ids of A and B, CTAs
    ("mxf8f6f4", "e4m3", "e5m2", 128, 64, 1, "ue8m0", (1, 3), 1),
    ("mxf8f6f4", "e2m1", "e4m3", 128, 48, 1, "ue8m0", (0, 2), 1),
    ("mxf4", "e2m1", "e2m1", 128, 128, 2, "ue8m0", (2, 0), 1),
    ("mxf4nvf4", "e2m1", "e2m1", 128, 64, 4, "ue4m3", (0, 0), 1),
    ("mxf4nvf4", "e2m1", "e2m1", 256, 64, 4, "ue8m0", (0, 0), 2),
    ("mxf8f6f4", "e4m3", "e4m3", 256, 128, 1, "ue8m0", (0, 1), 2),
    ("mxf8f6f4", "e4m3", "e4m3", 128, 128, 1, "ue8m0", (3, 0), 2),
]


@pytest.mark.parametrize(("kind", "a", "b", "m", "n", "per_row", "scale", "ids", "group"), SCALED)
def test_block_scaling(
    kind: str,
    a: str,
    b: str,
    m: int,
    n: int,
    per_row: int,
    scale: str,
    ids: tuple[int, int],
    group: int,
) -> None:
    """Row r of the factors: lane r % 32 of each partition, column r // 32, bytes from the id on."""
    k, rows, columns = DEPTH[kind], m // group, n // group
    image = np.concatenate([image_of(a, b, seed) for seed in range(1, group + 1)])
    rng = np.random.default_rng(9)
    low, high = (124, 131) if scale == "ue8m0" else (0x28, 0x48)
    a_codes = rng.integers(low, high, (m, per_row)).astype(np.uint8)
    b_codes = rng.integers(low, high, (n, per_row)).astype(np.uint8)
    before = np.zeros((group, 512, 128), np.uint32)
    raw = before.view(np.uint8).reshape(group, 512, 128, 4)
    halves = 2 if group == 2 and m == 128 else 1
    for partition in range(4):
        for row in range(m):
            cta, r = divmod(row, rows)
            lane = 32 * partition + r % 32
            raw[cta, 300 + r // 32, lane, ids[0] : ids[0] + per_row] = a_codes[row]
        for column in range(n):
            half, r = divmod(column, n // halves)
            if halves == 2 and partition // 2 != half:
                continue
            for cta in range(group):
                lane = 32 * partition + r % 32
                raw[cta, 320 + r // 32, lane, ids[1] : ids[1] + per_row] = b_codes[column]
    left, right = tile(A_AT, 128, False, rows), tile(B_AT, 128, False, columns)
    ue8m0 = int(scale == "ue8m0")
    idesc = instruction(kind, m, n, a, b, ue8m0=ue8m0, a_scale=ids[0], b_scale=ids[1])
    body = LEADER
    body += "mov.u32 %r32, 300; mov.u32 %r33, 320;\n"
    form = f"{kind}.block_scale.scale_vec::{per_row}X"
    more = "[%r32], [%r33], "
    body += mma(form, idesc, str(left.encode()), right.encode(), group=group, more=more)
    body += end(group)
    with tensor_memory(before) as seen:
        got = launch(body, image, ctas=group)
    assert got.rules == []
    images = np.split(image, group)
    name = "ue8m0" if scale == "ue8m0" else "e4m3"
    wide = [np.repeat(minifloat.decode(c, name), k // per_row, 1) for c in (a_codes, b_codes)]
    want_a = np.concatenate([matrix(x, a, left, rows, False, k) for x in images]) * wide[0]
    want_b = np.concatenate([matrix(x, b, right, columns, False, k) for x in images]) * wide[1]
    got_d = accumulators(seen[0], m, n, "f32", pair=group == 2)
    np.testing.assert_array_equal(got_d, (want_a @ want_b.T).astype(np.float32))


A1, B1 = tile(A_AT, 128, False, 128), tile(B_AT, 128, False, 64)
PLAIN = instruction("f16", 128, 64, "f16", "f16")


def product_of_ones(more: str = "", tail: str = "", **options: object) -> np.ndarray:
    """D of one f16 product that accumulates on 8.0; (128, 64), and the plain product."""
    image = image_of("f16", "f16")
    before = np.full((1, 512, 128), 0x41000000, np.uint32)
    idesc = options.pop("idesc", PLAIN)
    arguments = {"more": more, "tail": tail, "accumulate": True, **options}
    body = mma("f16", idesc, str(A1.encode()), B1.encode(), **arguments)  # type: ignore[arg-type]
    with tensor_memory(before) as seen:
        got = launch(body + commit() + WAIT, image)
    assert got.rules == []
    want = matrix(image, "f16", A1, 128, False, 16) @ matrix(image, "f16", B1, 64, False, 16).T
    return accumulators(seen[0], 128, 64, "f32"), want


def test_scale_input_d() -> None:
    got, want = product_of_ones(tail=", 2")
    np.testing.assert_array_equal(got, want + 2)


@pytest.mark.parametrize(("bits", "sign"), [((13,), -1), ((14,), -1), ((13, 14), 1)])
def test_negation(bits: tuple[int, ...], sign: int) -> None:
    idesc = PLAIN | sum(1 << bit for bit in bits)
    got, want = product_of_ones(idesc=idesc)
    np.testing.assert_array_equal(got, sign * want + 8)


def test_disabled_lanes_keep_their_values() -> None:
    lanes = np.array([0x80000001, 0, 0xFFFFFFFF, 0x10], np.uint32)
    setup = "".join(f"mov.u32 %r{40 + i}, {int(word)};\n" for i, word in enumerate(lanes))
    image = image_of("f16", "f16")
    before = np.full((1, 512, 128), 0x41000000, np.uint32)
    body = setup + mma(
        "f16", PLAIN, str(A1.encode()), B1.encode(), more="{%r40, %r41, %r42, %r43}, "
    )
    with tensor_memory(before) as seen:
        launch(body + commit() + WAIT, image)
    got = accumulators(seen[0], 128, 64, "f32")
    want = matrix(image, "f16", A1, 128, False, 16) @ matrix(image, "f16", B1, 64, False, 16).T
    disabled = np.unpackbits(lanes.view(np.uint8), bitorder="little").astype(bool)
    np.testing.assert_array_equal(got, np.where(disabled[:, None], 8.0, want))


def test_integers_wrap_around_or_saturate() -> None:
    image = image_of("s8", "s8")
    image[:B_AT] = 127
    image[B_AT:] = 127
    before = np.full((1, 512, 128), 0x7FFFFFFF, np.uint32)
    for saturate in (False, True):
        idesc = instruction("i8", 128, 32, "s8", "s8", "s32", **({"s": 3} if saturate else {}))
        body = mma("i8", idesc, str(A1.encode()), B1.encode(), accumulate=True)
        with tensor_memory(before) as seen:
            launch(body + commit() + WAIT, image)
        total = 0x7FFFFFFF + 32 * 127 * 127
        want = 0x7FFFFFFF if saturate else total - (1 << 32)
        assert (accumulators(seen[0], 128, 32, "s32") == want).all()


def test_a_shifted_by_one_row() -> None:
    image = image_of("bf16", "bf16")
    before = np.zeros((1, 512, 128), np.uint32)
    before[0, 200:208] = raw = random_words("bf16", (8, 128))
    idesc = instruction("f16", 128, 64, "bf16", "bf16")
    body = "mov.u32 %r31, 200;\n" + mma("f16.ashift", idesc, "%r31", B1.encode())
    with tensor_memory(before) as seen:
        got = launch(body + commit() + WAIT, image)
    assert got.rules == []
    rows = np.stack([lane_values("bf16", raw[:, lane]) for lane in range(128)])
    stored = [row if row % 32 == 31 else row + 1 for row in range(128)]
    want = rows[stored] @ matrix(image, "bf16", B1, 64, False, 16).T
    np.testing.assert_array_equal(accumulators(seen[0], 128, 64, "f32"), want)


@pytest.mark.parametrize(
    ("m", "fields", "runs"),
    [  # examples of PTX ISA 9.7.16.4.3, least significant column first
        (128, {"skip": 2, "use": 3}, ["0000111" * 10]),
        (64, {"skip": 2, "use": 3, "first": 1}, ["1110000" * 10, "0000111" * 10]),
        (
            32,
            {"skip": 2, "use": 3, "first": 3, "starts": (0, 1, 2, 1)},
            ["1110000" * 9, "110000" + "1110000" * 9, "00" + "1110000" * 9, "000" + "1110000" * 9],
        ),
    ],
)
def test_zero_column_masks(m: int, fields: dict[str, object], runs: list[str]) -> None:
    n = 64
    starts = fields.get("starts", (0, 0, 0, 0))
    mask = sum(start << 8 * i for i, start in enumerate(starts))  # type: ignore[arg-type]
    mask |= int(fields.get("first", 0)) << 32 | 1 << 39  # type: ignore[call-overload]
    mask |= fields["skip"] << 40 | fields["use"] << 48  # type: ignore[operator]
    image = image_of("f16", "f16")
    left = tile(A_AT, 128, False, m)
    idesc = instruction("f16", m, n, "f16", "f16")
    body = f"mov.u64 %rd30, {mask};\n"
    body += mma("f16", idesc, str(left.encode()), B1.encode(), form=".ws", tail=", %rd30")
    with tensor_memory() as seen:
        got = launch(body + commit() + WAIT, image)
    assert got.rules == []
    width = n * m // 128
    zero = np.array([bit == "1" for run in runs for bit in run[:width]])
    want_b = matrix(image, "f16", B1, n, False, 16) * ~zero[:, None]
    want = matrix(image, "f16", left, m, False, 16) @ want_b.T
    np.testing.assert_array_equal(accumulators(seen[0], m, n, "f32", ws=True), want)


def test_late_completion_waits_for_the_queue() -> None:
    """Two commits: a barrier is arrived on after what came before, and the order is kept."""
    image = image_of("f16", "f16")
    body = mma("f16", PLAIN, str(A1.encode()), B1.encode()) + commit()
    body += WAIT + mma("f16", PLAIN, str(A1.encode()), B1.encode(), accumulate=True) + commit()
    body += WAIT.replace("WAIT", "AGAIN").replace("], 0;", "], 1;")
    want = matrix(image, "f16", A1, 128, False, 16) @ matrix(image, "f16", B1, 64, False, 16).T
    for completion in ("eager", "late", "random"):
        with tensor_memory() as seen:
            got = launch(body, image, completion=completion)
        assert got.rules == []
        np.testing.assert_array_equal(accumulators(seen[0], 128, 64, "f32"), 2 * want)


@pytest.mark.parametrize(
    "form",
    [
        "tcgen05.mma.sp.cta_group::1.kind::f16 [%r1], %rd1, %rd2, [%r3], %r2, %p1;",
        "tcgen05.mma.cta_group::1.kind::f64 [%r1], %rd1, %rd2, %r2, %p1;",
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale [%r1], %rd1, %rd2, %r2, "
        "[%r3], [%r4], %p1;",
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r1], %rd1, %rd2, %r2, %p1, 3;",
        "tcgen05.mma.cta_group::1.kind::f16.collector::b0::fill [%r1], %rd1, %rd2, %r2, %p1;",
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd2, %r2, {%r3, %r4, %r5, %r6}, %p1;",
        "tcgen05.commit.cta_group::1.mbarrier::arrive::two.b64 [%r1];",
    ],
)
def test_forms_that_do_not_exist_are_refused(form: str) -> None:
    with pytest.raises(UnsupportedInstruction, match="tcgen05"):
        launch(form, np.zeros(SMEM, np.uint8))
