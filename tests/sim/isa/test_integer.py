"""Integer instructions against Python's integers."""

import numpy as np
import pytest

from tests.sim.isa.evaluate import combinations, evaluate

EDGES = {
    16: [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x1234, 0xFF00],
    32: [0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678, 0xFFFF0000, 0x00FFFFFF],
    64: [0, 1, 3, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0, 0xFFFFFFFF00000000],
}
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def signed(value, width):
    return value - (1 << width) if value >> (width - 1) else value


def operands(count, width):
    return combinations(*[EDGES[width]] * count, dtype=DTYPES[width])


def check(opcode, width, function, count=2, out_width=None):
    """The instruction on all combinations of edge values; signed types get signed integers."""
    is_signed = opcode.rpartition(".")[2].startswith("s")
    columns = operands(count, width)
    names = "abcd"[:count]
    out_width = out_width or width
    got = evaluate(
        f"{opcode} %x, {', '.join('%' + n for n in names)};",
        {n: (f"b{width}", column) for n, column in zip(names, columns, strict=True)},
        {"x": f"b{out_width}"},
    )["x"]
    mask = (1 << out_width) - 1
    for row, values in enumerate(zip(*columns, strict=True)):
        numbers = [signed(int(v), width) if is_signed else int(v) for v in values]
        expected = function(*numbers) & mask
        assert int(got[row]) == expected, (opcode, numbers, hex(got[row]), hex(expected))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_add_sub_mul_min_max(kind, width):
    check(f"add.{kind}{width}", width, lambda a, b: a + b)
    check(f"sub.{kind}{width}", width, lambda a, b: a - b)
    check(f"mul.lo.{kind}{width}", width, lambda a, b: a * b)
    check(f"mul.hi.{kind}{width}", width, lambda a, b: a * b >> width)
    check(f"min.{kind}{width}", width, min)
    check(f"max.{kind}{width}", width, max)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_wide_products(kind, width):
    check(f"mul.wide.{kind}{width}", width, lambda a, b: a * b, out_width=2 * width)


def test_mad_wide_adds_in_the_double_width():
    a, b = operands(2, 32)
    c = np.resize(np.array(EDGES[64], np.uint64), len(a))
    for kind in "us":
        got = evaluate(
            f"mad.wide.{kind}32 %x, %a, %b, %c;",
            {"a": ("b32", a), "b": ("b32", b), "c": ("b64", c)},
            {"x": "b64"},
        )["x"]
        for row in range(len(a)):
            x, y = (signed(int(v[row]), 32) if kind == "s" else int(v[row]) for v in (a, b))
            assert int(got[row]) == (x * y + int(c[row])) & (1 << 64) - 1


@pytest.mark.parametrize("opcode", ["mad.lo.s32", "mad.lo.u64", "mad.hi.u32", "mad.hi.s64"])
def test_mad(opcode):
    width = int(opcode[-2:])
    shift = width if ".hi" in opcode else 0
    check(opcode, width, lambda a, b, c: (a * b >> shift) + c, count=3)


def clamp(value):
    return max(-(2**31), min(2**31 - 1, value))


def test_saturating_forms():
    check("add.sat.s32", 32, lambda a, b: clamp(a + b))
    check("sub.sat.s32", 32, lambda a, b: clamp(a - b))
    check("mad.hi.sat.s32", 32, lambda a, b, c: clamp((a * b >> 32) + c), count=3)
    check("max.relu.s32", 32, lambda a, b: max(a, b, 0))
    check("min.relu.s32", 32, lambda a, b: max(min(a, b), 0))


def low24(value, is_signed):
    value &= 0xFFFFFF
    return signed(value, 24) if is_signed else value


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_mul24(kind):
    s = kind == "s32"
    check(f"mul24.lo.{kind}", 32, lambda a, b: low24(a, s) * low24(b, s))
    check(f"mul24.hi.{kind}", 32, lambda a, b: low24(a, s) * low24(b, s) >> 16)
    check(f"mad24.lo.{kind}", 32, lambda a, b, c: low24(a, s) * low24(b, s) + c, count=3)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_sad(kind):
    check(f"sad.{kind}", int(kind[1:]), lambda a, b, c: c + abs(a - b), count=3)


def divide(a, b, width):
    if b == 0:
        return -1
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division_truncates_and_remainder_has_the_dividends_sign(kind):
    width = int(kind[1:])
    check(f"div.{kind}", width, lambda a, b: divide(a, b, width))
    check(f"rem.{kind}", width, lambda a, b: a - b * divide(a, b, width) if b else a)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_abs_and_neg(width):
    check(f"abs.s{width}", width, abs, count=1)
    check(f"neg.s{width}", width, lambda a: -a, count=1)


def halves(value, is_signed):
    parts = [value & 0xFFFF, value >> 16 & 0xFFFF]
    return [signed(part, 16) if is_signed else part for part in parts]


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_packed_halves(kind):
    def pairwise(function):
        def apply(a, b):
            pairs = zip(halves(a, kind[0] == "s"), halves(b, kind[0] == "s"), strict=True)
            low, high = (function(x, y) & 0xFFFF for x, y in pairs)
            return low | high << 16

        return apply

    check(f"add.{kind}", 32, pairwise(lambda x, y: x + y))
    check(f"min.{kind}", 32, pairwise(min))
    check(f"max.{kind}", 32, pairwise(max))
    if kind == "s16x2":
        check("max.relu.s16x2", 32, pairwise(lambda x, y: max(x, y, 0)))


def wide_pairs():
    rng = np.random.default_rng(3)
    edges = [0, 1, (1 << 96) - 1, (1 << 96) - 2, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1]
    numbers = [int.from_bytes(rng.bytes(12), "little") for _ in range(9)] + edges
    a, b = combinations(numbers, numbers, dtype=object)
    return list(a), list(b)


def limbs(numbers, prefix):
    return {
        f"{prefix}{i}": ("b32", np.array([n >> 32 * i & 0xFFFFFFFF for n in numbers], np.uint32))
        for i in range(3)
    }


def joined(got):
    rows = range(len(got["x0"]))
    return [sum(int(got[f"x{i}"][row]) << 32 * i for i in range(3)) for row in rows]


@pytest.mark.parametrize("op, sign", [("add", 1), ("sub", -1)])
def test_carry_chains_make_wide_sums_and_differences(op, sign):
    a, b = wide_pairs()
    got = evaluate(
        f"{op}.cc.u32 %x0, %a0, %b0; {op}c.cc.u32 %x1, %a1, %b1; {op}c.u32 %x2, %a2, %b2;",
        limbs(a, "a") | limbs(b, "b"),
        {"x0": "b32", "x1": "b32", "x2": "b32"},
    )
    expected = [(x + sign * y) % (1 << 96) for x, y in zip(a, b, strict=True)]
    assert joined(got) == expected


def test_madc_continues_a_product():
    a, b = wide_pairs()
    c = a[::-1]
    body = """
        mad.lo.cc.u32 %x0, %a0, %b0, %c0;
        madc.hi.cc.u32 %x1, %a0, %b0, %c1;
        addc.u32 %x2, %c2, 0;
    """
    inputs = limbs(a, "a") | limbs(b, "b") | limbs(c, "c")
    got = evaluate(body, inputs, {"x0": "b32", "x1": "b32", "x2": "b32"})
    low = (1 << 32) - 1
    expected = [((x & low) * (y & low) + z) % (1 << 96) for x, y, z in zip(a, b, c, strict=True)]
    assert joined(got) == expected


def test_carry_survives_a_block_boundary():
    a, b = wide_pairs()
    body = "add.cc.u32 %x0, %a0, %b0; bra NEXT; NEXT: addc.u32 %x1, %a1, %b1;"
    got = evaluate(body, limbs(a, "a") | limbs(b, "b"), {"x0": "b32", "x1": "b32"})
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        assert int(got["x0"][row]) | int(got["x1"][row]) << 32 == (x + y) % (1 << 64)


@pytest.mark.parametrize("kind_a", ["u32", "s32"])
@pytest.mark.parametrize("kind_b", ["u32", "s32"])
def test_byte_dot_products(kind_a, kind_b):
    a, b = operands(2, 32)
    c = np.resize(np.array(EDGES[32], np.uint32), len(a))
    names = {"a": ("b32", a), "b": ("b32", b), "c": ("b32", c)}
    body = f"""
        dp4a.{kind_a}.{kind_b} %x, %a, %b, %c;
        dp2a.lo.{kind_a}.{kind_b} %y, %a, %b, %c;
        dp2a.hi.{kind_a}.{kind_b} %z, %a, %b, %c;
    """
    got = evaluate(body, names, {"x": "b32", "y": "b32", "z": "b32"})

    def part(value, index, size, kind):
        piece = int(value) >> size * index & (1 << size) - 1
        return signed(piece, size) if kind == "s32" else piece

    for row in range(len(a)):
        bytes_b = [part(b[row], i, 8, kind_b) for i in range(4)]
        four = sum(part(a[row], i, 8, kind_a) * bytes_b[i] for i in range(4))
        low = sum(part(a[row], i, 16, kind_a) * bytes_b[i] for i in range(2))
        high = sum(part(a[row], i, 16, kind_a) * bytes_b[i + 2] for i in range(2))
        for name, dot in (("x", four), ("y", low), ("z", high)):
            assert int(got[name][row]) == (dot + int(c[row])) & 0xFFFFFFFF
