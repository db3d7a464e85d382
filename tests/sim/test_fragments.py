"""Fragment layouts against the formulas of PTX ISA 9.7.14.5, written out shape by shape."""

import numpy as np
import pytest

from cute_fa.sim import fragments
from cute_fa.sim.fragments import ELEMENTS_PER_REGISTER

SHAPE = (2, 3, 32)


def a_16x8_half(g, t, i):
    return (g if i < 2 else g + 8), 2 * t + (i & 1)


def a_16x16_half(g, t, i):
    return (g if i < 2 or 4 <= i < 6 else g + 8), 2 * t + (i & 1) + (0 if i < 4 else 8)


def a_16x4_word(g, t, i):
    return (g, g + 8)[i], t


def a_16x8_word(g, t, i):
    return (g if i in (0, 2) else g + 8), (t if i < 2 else t + 4)


def a_8x4_double(g, t, i):
    return g, t


def a_16x16_double(g, t, i):
    return (g, i * 2 + t) if i % 2 == 0 else (g + 8, i * 2 - 2 + t)


def a_8x16_byte(g, t, i):
    return g, 4 * t + i


def a_16x16_byte(g, t, i):
    return (g if i < 4 else g + 8), 4 * t + (i & 3)


def a_16x32_byte(g, t, i):
    row = g if i < 4 or 8 <= i < 12 else g + 8
    return row, 4 * t + (i & 3) + (0 if i < 8 else 16)


def b_half(g, t, i):
    return 2 * t + (i & 1) + (0 if i < 2 else 8), g


def b_word(g, t, i):
    return (t, t + 4)[i], g


def b_double(g, t, i):
    return i * 4 + t, g


def b_byte(g, t, i):
    return 4 * t + (i & 3) + (0 if i < 4 else 16), g


CASES = [
    ("f16", 16, 8, a_16x8_half, b_half),
    ("bf16", 16, 16, a_16x16_half, b_half),
    ("f16", 16, 16, a_16x16_half, b_half),
    ("tf32", 16, 4, a_16x4_word, b_word),
    ("tf32", 16, 8, a_16x8_word, b_word),
    ("f64", 8, 4, a_8x4_double, b_double),
    ("f64", 16, 4, a_16x4_word, b_double),
    ("f64", 16, 8, a_16x8_word, b_double),
    ("f64", 16, 16, a_16x16_double, b_double),
    ("s8", 8, 16, a_8x16_byte, b_byte),
    ("u8", 16, 16, a_16x16_byte, b_byte),
    ("e4m3", 16, 16, a_16x16_byte, b_byte),
    ("s8", 16, 32, a_16x32_byte, b_byte),
    ("e5m2", 16, 32, a_16x32_byte, b_byte),
]


@pytest.mark.parametrize(("kind", "m", "k", "a_formula", "b_formula"), CASES)
def test_operand_positions_are_the_isa_formulas(kind, m, k, a_formula, b_formula):
    per = ELEMENTS_PER_REGISTER[kind]
    a_count, b_count = m * k // 32, 8 * k // 32
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(a_count):
            got = fragments.operand_position(
                lane, i // per, i % per, row_blocks=m // 8, per_register=per
            )
            assert got == a_formula(g, t, i)
        for i in range(b_count):
            n, kk = fragments.operand_position(
                lane, i // per, i % per, row_blocks=1, per_register=per
            )
            assert (kk, n) == b_formula(g, t, i)


@pytest.mark.parametrize(("kind", "m", "k"), [case[:3] for case in CASES])
def test_decoding_puts_every_element_at_its_position(kind, m, k):
    rng = np.random.default_rng(m * k)
    per = ELEMENTS_PER_REGISTER[kind]
    word = np.uint64 if kind == "f64" else np.uint32
    registers = [
        rng.integers(0, np.iinfo(word).max, SHAPE, dtype=word) for _ in range(m * k // 32 // per)
    ]
    matrix = fragments.operand_matrix(fragments.operand_grid(registers, m // 8), kind)
    assert matrix.shape == (2, 3, m, k)
    width = (64 if kind == "f64" else 32) // per
    for j, register in enumerate(registers):
        for lane in range(32):
            for element in range(per):
                row, kk = fragments.operand_position(
                    lane, j, element, row_blocks=m // 8, per_register=per
                )
                raw = int(register[1, 2, lane]) >> (width * element) & ((1 << width) - 1)
                expected = decode_scalar(raw, kind)
                got = matrix[1, 2, row, kk]
                assert got == expected or (np.isnan(got) and np.isnan(expected))


def decode_scalar(raw, kind):
    """One element by arithmetic on its fields."""
    fields = {"f16": (5, 10), "bf16": (8, 7), "e4m3": (4, 3), "e5m2": (5, 2), "tf32": (8, 23)}
    if kind == "s8":
        return raw - 256 if raw & 128 else raw
    if kind == "u8":
        return raw
    if kind == "f64":
        return np.uint64(raw).view(np.float64)
    if kind == "tf32":
        raw &= ~0x1FFF
    exponent_bits, mantissa_bits = fields[kind]
    sign = -1.0 if raw >> (exponent_bits + mantissa_bits) else 1.0
    exponent = raw >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = raw & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if kind == "e4m3":
        if exponent == 15 and mantissa == 7:
            return float("nan")
    elif exponent == (1 << exponent_bits) - 1:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def test_accumulator_positions_are_the_isa_formula():
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            row = g if i < 2 else g + 8
            assert fragments.accumulator_position(lane, i) == (row, 2 * t + (i & 1))


@pytest.mark.parametrize(("m", "n"), [(8, 8), (16, 8), (16, 24)])
def test_splitting_accumulators_follows_their_positions(m, n):
    rng = np.random.default_rng(n)
    product = rng.standard_normal((2, 3, m, n)).astype(np.float32)
    registers = fragments.split_accumulators(product)
    assert len(registers) == m * n // 32
    per_instruction = m // 4
    for index, register in enumerate(registers):
        column_block, element = divmod(index, per_instruction)
        for lane in range(32):
            row, column = fragments.accumulator_position(lane, element)
            assert register[0, 1, lane] == product[0, 1, row, column + 8 * column_block]


def test_larger_grids_are_products_chained_over_k_and_n():
    rng = np.random.default_rng(5)
    a = [[rng.integers(0, 1 << 32, SHAPE, np.uint32) for _ in range(4)] for _ in range(2)]
    b = [[rng.integers(0, 1 << 32, SHAPE, np.uint32) for _ in range(2)] for _ in range(2)]
    steps = [fragments.operand_matrix(fragments.operand_grid(x, 2), "s8") for x in a]
    whole = fragments.operand_matrix(
        [[x for step in a for x in step[row::2]] for row in range(2)], "s8"
    )
    assert (whole == np.concatenate(steps, axis=-1)).all()
    columns = fragments.operand_matrix(b, "s8")
    parts = [fragments.operand_matrix(fragments.operand_grid(x, 1), "s8") for x in b]
    assert (columns == np.concatenate(parts, axis=-2)).all()


def test_halves_round_trip_and_round_to_nearest_even():
    rng = np.random.default_rng(6)
    values = [rng.standard_normal(SHAPE).astype(np.float16).astype(np.float32) for _ in range(4)]
    packed = fragments.pack_halves(values)
    assert len(packed) == 2
    assert (packed[1] & 0xFFFF == values[2].astype(np.float16).view(np.uint16)).all()
    for got, expected in zip(fragments.unpack_halves(packed), values, strict=True):
        assert (got == expected).all()
    tie = [np.full(SHAPE, 1 + 2**-11, np.float32), np.full(SHAPE, 1 + 3 * 2**-11, np.float32)]
    low, high = fragments.unpack_halves(fragments.pack_halves(tie))
    assert (low == 1).all() and (high == 1 + 2**-9).all()


def test_transposing_a_core_matrix():
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    register = matrix.reshape(1, 1, 64).view(np.uint32)
    turned = fragments.transpose_core(register)
    assert (turned.view(np.uint16).reshape(8, 8) == matrix.T).all()
