"""Comparisons and selections against Python's."""

import math
import operator

import numpy as np
import pytest

from tests.sim.isa.evaluate import F32_EDGES, combinations, evaluate

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
INTEGERS = {
    16: [0, 1, 0x7FFF, 0x8000, 0xFFFF],
    32: [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    64: [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
}
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def float_compare(op, a, b):
    """The ISA's table: ordered forms are false with NaN, forms in u are true."""
    nan = math.isnan(a) or math.isnan(b)
    if op == "num":
        return not nan
    if op == "nan":
        return nan
    if op.endswith("u"):
        return nan or ORDERED[op[:-1]](a, b)
    return not nan and ORDERED[op](a, b)


def setp(opcode, columns, width):
    inputs = {n: (f"b{width}", c) for n, c in zip("ab", columns, strict=True)}
    return evaluate(f"{opcode} %p, %a, %b;", inputs, {"p": "pred"})["p"]


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("op", sorted(ORDERED))
def test_integers(width, kind, op):
    a, b = combinations(INTEGERS[width], INTEGERS[width], dtype=DTYPES[width])
    got = setp(f"setp.{op}.{kind}{width}", (a, b), width)
    signed = np.dtype(f"i{width // 8}")
    x, y = (a.view(signed), b.view(signed)) if kind == "s" else (a, b)
    assert (got == ORDERED[op](x, y)).all()


@pytest.mark.parametrize("alias, op", [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")])
def test_unsigned_names(alias, op):
    a, b = combinations(INTEGERS[32], INTEGERS[32], dtype=np.uint32)
    assert (setp(f"setp.{alias}.u32", (a, b), 32) == ORDERED[op](a, b)).all()


FLOAT_OPS = [*ORDERED, *(f"{op}u" for op in ORDERED), "num", "nan"]


@pytest.mark.parametrize("op", FLOAT_OPS)
def test_floats(op):
    a, b = combinations(F32_EDGES, F32_EDGES, dtype=np.float32)
    got = setp(f"setp.{op}.f32", (a, b), 32)
    want = [float_compare(op, float(x), float(y)) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == want
    wide = setp(f"setp.{op}.f64", (a.astype(np.float64), b.astype(np.float64)), 64)
    assert wide.tolist() == want


@pytest.mark.parametrize("op", ["lt", "geu", "ne", "nan"])
@pytest.mark.parametrize("kind, edges", [
    ("f16", [0, 0x8000, 1, 0x3C00, 0xBC00, 0x7C00, 0x7E00]),
    ("bf16", [0, 0x8000, 1, 0x3F80, 0xBF80, 0x7F80, 0x7FC0]),
])  # fmt: skip
def test_halves(op, kind, edges):
    a, b = combinations(edges, edges, dtype=np.uint16)

    def value(pattern):
        if kind == "f16":
            return float(np.uint16(pattern).view(np.float16))
        return float((np.uint32(pattern) << 16).view(np.float32))

    got = setp(f"setp.{op}.{kind}", (a, b), 16)
    assert got.tolist() == [
        float_compare(op, value(x), value(y)) for x, y in zip(a, b, strict=True)
    ]


def test_packed_halves_give_two_predicates():
    a = np.array([0x3C000000, 0x00003C00, 0x3C003C00], np.uint32)
    body = "setp.gt.f16x2 %p|%q, %a, 0;"
    got = evaluate(body, {"a": ("b32", a)}, {"p": "pred", "q": "pred"})
    assert got["p"].tolist() == [0, 1, 1]
    assert got["q"].tolist() == [1, 0, 1]


def test_ftz_compares_subnormals_as_zero():
    a = np.array([1, 0x80000001], np.uint32).view(np.float32)
    zero = np.zeros(2, np.float32)
    assert setp("setp.eq.f32", (a, zero), 32).tolist() == [0, 0]
    assert setp("setp.eq.ftz.f32", (a, zero), 32).tolist() == [1, 1]


@pytest.mark.parametrize("join, function", [
    ("and", operator.and_), ("or", operator.or_), ("xor", operator.xor),
])  # fmt: skip
def test_boolean_combination_and_the_second_destination(join, function):
    a, c = combinations([1, 5], [0, 1], dtype=np.uint32)
    body = f"""
        setp.lt.{join}.u32 %p|%q, %a, 3, %c;
        setp.lt.{join}.u32 %u, %a, 3, !%c;
        setp.lt.u32 %v|%w, %a, 3;
    """
    outputs = dict.fromkeys("pquvw", "pred")
    got = evaluate(body, {"a": ("b32", a), "c": ("pred", c)}, outputs)
    less, other = a < 3, c.astype(bool)
    assert (got["p"] == function(less, other)).all()
    assert (got["q"] == function(~less, other)).all()
    assert (got["u"] == function(less, ~other)).all()
    assert (got["v"] == less).all()
    assert (got["w"] == ~less).all()


def test_a_destination_that_is_also_an_operand():
    a, p = combinations([1, 5], [0, 1], dtype=np.uint32)
    body = "mov.pred %x, %p; setp.lt.and.u32 %x|%q, %a, 3, %x;"
    got = evaluate(body, {"a": ("b32", a), "p": ("pred", p)}, {"x": "pred", "q": "pred"})
    assert (got["x"] == ((a < 3) & (p == 1))).all()
    assert (got["q"] == (~(a < 3) & (p == 1))).all()


def test_set_gives_all_ones_or_one():
    a = np.array([1, 5], np.uint32)
    body = """
        set.lt.u32.u32 %x, %a, 3; set.lt.f32.s32 %y, %a, 3; set.lt.and.u32.u32 %z, %a, 3, %c;
    """
    inputs = {"a": ("b32", a), "c": ("pred", np.zeros(2, np.uint32))}
    got = evaluate(body, inputs, dict.fromkeys("xyz", "b32"))
    assert got["x"].tolist() == [0xFFFFFFFF, 0]
    assert got["y"].tolist() == [0x3F800000, 0]
    assert got["z"].tolist() == [0, 0]


def test_set_on_packed_halves():
    a = np.array([0x3C000000], np.uint32)
    body = "set.gt.f16x2.f16x2 %x, %a, 0; set.gt.u32.f16 %y, %h, 0;"
    inputs = {"a": ("b32", a), "h": ("b16", np.array([0x3C00], np.uint16))}
    got = evaluate(body, inputs, {"x": "b32", "y": "b32"})
    assert got["x"].tolist() == [0x3C000000]
    assert got["y"].tolist() == [0xFFFFFFFF]


@pytest.mark.parametrize("kind, width", [
    ("b16", 16), ("b32", 32), ("b64", 64), ("f32", 32), ("s32", 32), ("f64", 64),
])  # fmt: skip
def test_selp(kind, width):
    p = np.array([0, 1, 1, 0], np.uint32)
    a = np.arange(4).astype(DTYPES[width])
    b = (a + 10).astype(DTYPES[width])
    inputs = {"a": (f"b{width}", a), "b": (f"b{width}", b), "p": ("pred", p)}
    got = evaluate(f"selp.{kind} %x, %a, %b, %p;", inputs, {"x": f"b{width}"})["x"]
    assert (got == np.where(p == 1, a, b)).all()


def test_selp_of_literals():
    p = np.array([0, 1], np.uint32)
    body = "selp.f32 %x, 0f3F800000, 0fFF800000, %p; selp.b32 %y, -1, 0, %p;"
    got = evaluate(body, {"p": ("pred", p)}, {"x": "b32", "y": "b32"})
    assert got["x"].tolist() == [0xFF800000, 0x3F800000]
    assert got["y"].tolist() == [0, 0xFFFFFFFF]


def test_slct_takes_the_second_for_negative_numbers_and_nan():
    c = np.array([0, 1, 0x80000000, 0xFFFFFFFF], np.uint32)
    f = np.array([0.0, -0.0, -1.0, np.nan], np.float32)
    body = "slct.u32.s32 %x, 1, 2, %c; slct.f32.f32 %y, 0f3F800000, 0f40000000, %f;"
    got = evaluate(body, {"c": ("b32", c), "f": ("b32", f)}, {"x": "b32", "y": "b32"})
    assert got["x"].tolist() == [1, 1, 2, 2]
    assert got["y"].view(np.float32).tolist() == [1, 1, 2, 2]
