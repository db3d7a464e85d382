"""``mma.sync`` of floats of 4, 6 and 8 bits, with and without block scaling (9.7.14.5.14)."""

import itertools

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from cute_fa.sim import fragments
from cute_fa.sim.isa import minifloat
from tests.sim.tiny import run

FIELD = {"e4m3": (8, 0), "e5m2": (8, 0), "e3m2": (8, 0), "e2m3": (8, 0), "e2m1": (8, 2)}
"""Bits that an element takes in ``kind::f8f6f4``, and where in them it begins."""
BLOCK_SCALED = [
    ("mxf8f6f4", 1, "ue8m0", "e4m3", "e2m1"),
    ("mxf8f6f4", 1, "ue8m0", "e3m2", "e5m2"),
    ("mxf8f6f4", 1, "ue8m0", "e2m1", "e2m3"),
    ("mxf4", 2, "ue8m0", "e2m1", "e2m1"),
    ("mxf4nvf4", 2, "ue8m0", "e2m1", "e2m1"),
    ("mxf4nvf4", 4, "ue8m0", "e2m1", "e2m1"),
    ("mxf4nvf4", 4, "ue4m3", "e2m1", "e2m1"),
]


def pack(codes, bits, shift, row_blocks):
    """An operand's codes (rows x k) as registers ``[lane][register]``."""
    per = 32 // bits
    out = np.zeros((32, codes.size // 32 // per), np.uint32)
    for lane, register, element in itertools.product(range(32), range(out.shape[1]), range(per)):
        row, k = fragments.operand_position(
            lane, register, element, row_blocks=row_blocks, per_register=per
        )
        out[lane, register] |= np.uint32(int(codes[row, k]) << (bits * element + shift))
    return out


def random_codes(rng, name, shape):
    """Codes of finite numbers, and their values in float64."""
    form = minifloat.FORMATS[name]
    sign = rng.integers(0, 2, shape) << (form.bits - 1)
    codes = rng.integers(0, form.max_code + 1, shape) | sign
    return codes, minifloat.decode(codes, name).astype(np.float64)


def accumulators(matrix):
    """``(16, 8)`` float32 as ``[lane][element]`` words."""
    out = np.zeros((32, 4), np.float32)
    for lane, i in itertools.product(range(32), range(4)):
        out[lane, i] = matrix[fragments.accumulator_position(lane, i)]
    return out.view(np.uint32)


def registers(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def load(count):
    return "\n".join(f"ld.global.b32 %r{10 + i}, [%in+{4 * i}];" for i in range(count))


STORE = "st.global.v4.b32 [%out], {%r40, %r41, %r42, %r43};"


@pytest.mark.parametrize(("a", "b"), [("e4m3", "e2m1"), ("e3m2", "e2m3"), ("e2m1", "e5m2")])
def test_small_floats_of_two_types(a, b):
    rng = np.random.default_rng(1)
    codes_a, left = random_codes(rng, a, (16, 32))
    codes_b, right = random_codes(rng, b, (8, 32))
    words = np.concatenate([pack(codes_a, *FIELD[a], 2), pack(codes_b, *FIELD[b], 1)], axis=1)
    result = run(
        f"""{load(6)} mov.b32 %r20, 0;
        mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.{a}.{b}.f32 {registers(40, 4)},
            {registers(10, 4)}, {registers(14, 2)}, {{%r20, %r20, %r20, %r20}};
        {STORE}""",
        words,
        words=4,
        arch="sm_120a",
    )
    want = accumulators((left @ right.T).astype(np.float32)).view(np.float32)
    error = np.abs(result.out.view(np.float32) - want).max()
    assert error <= 1e-6 * (np.abs(left) @ np.abs(right).T).max()
    assert result.launch.counters[f"mma_flops.{a}.{b}"] == 2 * 16 * 8 * 32


@pytest.mark.parametrize(("kind", "chunks", "scale", "a", "b"), BLOCK_SCALED)
@pytest.mark.parametrize("selection", [0, 1])
def test_block_scaling(kind, chunks, scale, a, b, selection):
    rng = np.random.default_rng(chunks)
    k, (bits, shift_a), (_, shift_b) = 32, FIELD[a], FIELD[b]
    if kind != "mxf8f6f4":
        k, bits, shift_a, shift_b = 64, 4, 0, 0
    codes_a, left = random_codes(rng, a, (16, k))
    codes_b, right = random_codes(rng, b, (8, k))
    addend = rng.integers(-9, 9, (16, 8)).astype(np.float32)
    # Every lane has four factors; only the selected lane and bytes are those of a row or column.
    low, high = (1, 0x7E) if scale == "ue4m3" else (124, 131)
    factors = rng.integers(low, high, (2, 32, 4)).astype(np.uint8)
    thread_a, thread_b = (0, 1) if selection == 0 else (1, 3)
    byte = 0 if selection == 0 or chunks == 4 else 4 - chunks
    scale_a, scale_b = np.zeros((16, chunks), np.uint8), np.zeros((8, chunks), np.uint8)
    for g in range(8):
        scale_a[g] = factors[0, 4 * g + 2 * thread_a, byte : byte + chunks]
        scale_a[g + 8] = factors[0, 4 * g + 2 * thread_a + 1, byte : byte + chunks]
        scale_b[g] = factors[1, 4 * g + thread_b, byte : byte + chunks]
    words = [
        pack(codes_a, bits, shift_a, 2),
        pack(codes_b, bits, shift_b, 1),
        accumulators(addend),
        factors[0].view(np.uint32),
        factors[1].view(np.uint32),
    ]
    result = run(
        f"""{load(12)} mov.b16 %h1, {byte}; mov.b16 %h2, {thread_a}; mov.b16 %h3, {thread_b};
        mma.sync.aligned.kind::{kind}.block_scale.scale_vec::{chunks}X.m16n8k{k}.row.col.f32.{a}.{b}
            .f32.{scale} {registers(40, 4)}, {registers(10, 4)}, {registers(14, 2)},
            {registers(16, 4)}, {{%r20}}, {{%h1, %h2}}, {{%r21}}, {{%h1, %h3}};
        {STORE}""".replace(f"{b}\n            .f32", f"{b}.f32"),
        np.concatenate(words, axis=1),
        words=4,
        arch="sm_120a",
    )
    assert result.rules == []
    left *= np.repeat(minifloat.decode(scale_a, scale).astype(np.float64), k // chunks, axis=1)
    right *= np.repeat(minifloat.decode(scale_b, scale).astype(np.float64), k // chunks, axis=1)
    want = accumulators((left @ right.T + addend).astype(np.float32)).view(np.float32)
    error = np.abs(result.out.view(np.float32) - want).max()
    assert error <= 1e-6 * (np.abs(left) @ np.abs(right).T).max()


@pytest.mark.parametrize(
    ("selector", "rules"), [("0, 0", []), ("1, 0", ["mma-operands"]), ("0, 2", ["mma-operands"])]
)
def test_selectors_of_scale_factors_are_checked(selector, rules):
    result = run(
        f"""mov.b32 %r3, 0;
        mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.f32.e2m1.e2m1.f32.ue8m0
            {registers(40, 4)}, {{%r3, %r3, %r3, %r3}}, {{%r3, %r3}}, {{%r3, %r3, %r3, %r3}},
            %r3, {{{selector}}}, %r3, {{0, 0}};""",
        arch="sm_120a",
    )
    assert result.rules == rules


@pytest.mark.parametrize(
    "form",
    [
        "m16n8k64.row.col.kind::mxf4nvf4.block_scale.f32.e2m1.e2m1.f32.ue8m0",
        "m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue8m0",
        "m16n8k64.row.col.kind::mxf4.block_scale.f32.e4m3.e2m1.f32.ue8m0",
        "m16n8k32.row.col.kind::mxf8f6f4.block_scale.f32.e4m3.e4m3.f32.ue4m3",
    ],
)
def test_combinations_that_do_not_exist_are_refused(form):
    operands = ", ".join(registers(10, n) for n in (4, 4, 2, 4))
    with pytest.raises(UnsupportedError, match="line"):
        run(f"mma.sync.aligned.{form} {operands}, %r3, {{0, 0}}, %r3, {{0, 0}};")


@pytest.mark.parametrize("kind", ["s4", "u4"])
def test_integers_of_four_bits(kind):
    rng = np.random.default_rng(2)
    low, high = (-8, 8) if kind == "s4" else (0, 16)
    left, right = rng.integers(low, high, (16, 64)), rng.integers(low, high, (8, 64))
    words = np.concatenate([pack(left & 15, 4, 0, 2), pack(right & 15, 4, 0, 1)], axis=1)
    result = run(
        f"""{load(6)} mov.b32 %r20, 7;
        mma.sync.aligned.m16n8k64.row.col.s32.{kind}.{kind}.s32 {registers(40, 4)},
            {registers(10, 4)}, {registers(14, 2)}, {{%r20, %r20, %r20, %r20}};
        {STORE}""",
        words,
        words=4,
    )
    want = left @ right.T + 7
    for lane, i in itertools.product(range(32), range(4)):
        assert result.out.view(np.int32)[lane, i] == want[fragments.accumulator_position(lane, i)]
