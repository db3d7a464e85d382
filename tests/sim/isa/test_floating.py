"""f32, f64 and packed f32x2 arithmetic against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cute_fa.errors import UnsupportedError
from tests.sim.isa.evaluate import (
    F32_EDGES,
    combinations,
    evaluate,
    round_exact,
    same_floats,
)

MODES = ["rn", "rz", "rm", "rp"]


def f32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def pairs():
    rng = np.random.default_rng(1)
    a, b = combinations(F32_EDGES, F32_EDGES, dtype=np.float32)
    near = rng.integers(0x3F000000, 0x40800000, 200, dtype=np.uint32).view(np.float32)
    far = rng.integers(0x20000000, 0x60000000, 200, dtype=np.uint32).view(np.float32)
    return np.concatenate([a, near]), np.concatenate([b, far * np.float32(-1)])


def expected(function, mode, *columns):
    """The exact result rounded once; IEEE's own rules where an operand is not finite or zero."""
    out = []
    for values in zip(*columns, strict=True):
        numbers = [float(v) for v in values]
        if all(map(math.isfinite, numbers)):
            exact = function(*map(Fraction, numbers))
            if exact == 0:
                out.append(zero_of(function, mode, *map(np.float64, numbers)))
            else:
                out.append(round_exact(exact, "f32", mode))
        else:
            with np.errstate(all="ignore"):
                out.append(function(*map(np.float64, numbers)))
    return np.array(out, np.float64).astype(np.float32)


def zero_of(function, mode, a, b, c=None):
    """An exact zero's sign: a product's, or a sum's, which is - under rm unless both are +."""
    if function is MUL:
        return a * b
    left, right = (a, b) if c is None else (a * b, c)
    if mode == "rm":
        return -0.0 if np.signbit(left) or np.signbit(right) else 0.0
    return left + right


def ADD(a, b):
    return a + b


def MUL(a, b):
    return a * b


def FMA(a, b, c):
    return a * b + c


def run(opcode, *columns):
    names = "abcd"[: len(columns)]
    body = f"{opcode} %x, {', '.join('%' + n for n in names)};"
    inputs = {n: ("b32", column) for n, column in zip(names, columns, strict=True)}
    return evaluate(body, inputs, {"x": "b32"})["x"].view(np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_addition_is_rounded_once(mode):
    a, b = pairs()
    got, want = run(f"add.{mode}.f32", a, b), expected(ADD, mode, a, b)
    wrong = ~same_floats(got, want)
    assert not wrong.any(), (a[wrong][:3], b[wrong][:3], got[wrong][:3], want[wrong][:3])
    assert same_floats(run(f"sub.{mode}.f32", a, -b), got).all()


@pytest.mark.parametrize("mode", MODES)
def test_multiplication_is_rounded_once(mode):
    a, b = pairs()
    got, want = run(f"mul.{mode}.f32", a, b), expected(MUL, mode, a, b)
    wrong = ~same_floats(got, want)
    assert not wrong.any(), (a[wrong][:3], b[wrong][:3], got[wrong][:3], want[wrong][:3])


def fma_operands():
    rng = np.random.default_rng(2)
    edges = F32_EDGES[[0, 1, 2, 5, 7, 8, 9, 10, 14, 15]]
    a, b, c = combinations(edges, edges[:9], edges, dtype=np.float32)
    return tuple(np.concatenate([x, rng.normal(size=100).astype(np.float32)]) for x in (a, b, c))


@pytest.mark.parametrize("mode", MODES)
def test_fma_is_fused(mode):
    a, b, c = fma_operands()
    got, want = run(f"fma.{mode}.f32", a, b, c), expected(FMA, mode, a, b, c)
    wrong = ~same_floats(got, want)
    assert not wrong.any(), (a[wrong][:3], b[wrong][:3], c[wrong][:3], got[wrong], want[wrong])


def test_fma_next_to_a_tie():
    ties = np.array([1.0 + 2.0**-23], np.float32)
    half_ulp, one = np.array([2.0**-24], np.float32), np.ones(1, np.float32)
    assert run("fma.rn.f32", half_ulp, one, ties)[0] == np.float32(1 + 2.0**-22)
    below, scale = np.array([2.0**-12 - 2.0**-36], np.float32), np.array([2.0**-12], np.float32)
    assert run("fma.rn.f32", below, scale, ties)[0] == ties[0]


def test_fma_with_a_residue_below_float64_resolution():
    """The product is a tie of the sum's float32 grid; a far smaller c decides."""
    a = np.array([1 + 2.0**-12, 1 + 2.0**-12, 1 + 2.0**-12], np.float32)
    b = np.array([1 - 2.0**-12 + 2.0**-23, 1 + 2.0**-12, 1 + 2.0**-12], np.float32)
    c = np.array([2.0**-100, 2.0**-100, -(2.0**-100)], np.float32)
    got = run("fma.rn.f32", a, b, c)
    for row in range(3):
        exact = Fraction(float(a[row])) * Fraction(float(b[row])) + Fraction(float(c[row]))
        assert float(got[row]) == round_exact(exact, "f32")
    tie = Fraction(1) + Fraction(2) ** -11 + Fraction(2) ** -24
    assert Fraction(float(a[1])) ** 2 == tie  # so c alone decides rows 1 and 2
    assert got[1] > got[2]


@pytest.mark.parametrize("mode", MODES)
def test_division_reciprocal_and_root_are_rounded_once(mode):
    rng = np.random.default_rng(3)
    a = rng.integers(0x20000000, 0x5F000000, 300, dtype=np.uint32).view(np.float32)
    b = rng.integers(0x30000000, 0x4F000000, 300, dtype=np.uint32).view(np.float32)
    b = b * rng.choice([-1, 1], 300).astype(np.float32)
    quotient = run(f"div.{mode}.f32", a, b)
    reciprocal = run(f"rcp.{mode}.f32", b)
    root = run(f"sqrt.{mode}.f32", a)
    for row in range(len(a)):
        x, y = Fraction(float(a[row])), Fraction(float(b[row]))
        assert float(quotient[row]) == round_exact(x / y, "f32", mode)
        assert float(reciprocal[row]) == round_exact(1 / y, "f32", mode)
        # sqrt is monotonic: the rounded root is right if its neighbours' squares bracket a
        close = Fraction(math.isqrt(int(x * 2**400)), 2**200)
        exact = close if close * close == x else close + Fraction(1, 2**201)
        assert float(root[row]) == round_exact(exact, "f32", mode)


def test_special_values_of_division_and_roots():
    inf, nan = math.inf, math.nan
    a = np.array([1, -1, 0, inf, inf, 1, nan], np.float32)
    b = np.array([0, 0, 0, inf, 2, inf, 1], np.float32)
    want = np.array([inf, -inf, nan, nan, inf, 0, nan], np.float32)
    for opcode in ("div.rn.f32", "div.full.f32", "div.approx.f32"):
        assert same_floats(run(opcode, a, b), want).all()
    x = np.array([0.0, -0.0, inf, -inf, -1.0, 4.0, nan], np.float32)
    assert same_floats(run("rcp.approx.f32", x), [inf, -inf, 0, -0.0, -1, 0.25, nan]).all()
    assert same_floats(run("sqrt.approx.f32", x), [0, -0.0, inf, nan, nan, 2, nan]).all()
    assert same_floats(run("rsqrt.approx.f32", x), [inf, -inf, 0, nan, nan, 0.5, nan]).all()


def test_div_approx_loses_quotients_of_huge_divisors():
    a = np.array([2.0**100, -(2.0**100), np.inf], np.float32)
    b = np.full(3, 2.0**127, np.float32)
    got = run("div.approx.f32", a, b)
    assert same_floats(got, np.array([0.0, -0.0, np.nan], np.float32)).all()
    assert run("div.full.f32", a, b)[0] == np.float32(2.0**-27)


@pytest.mark.parametrize(
    "opcode, function, ulps",
    [
        ("ex2.approx.f32", np.exp2, 2),
        ("lg2.approx.f32", np.log2, 2),
        ("tanh.approx.f32", np.tanh, 2),
        ("sin.approx.f32", np.sin, 2),
        ("cos.approx.f32", np.cos, 2),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 1),
        ("rcp.approx.f32", lambda x: 1 / x, 1),
        ("sqrt.approx.f32", np.sqrt, 1),
    ],
)
def test_approximations_are_float32_accurate(opcode, function, ulps):
    x = np.random.default_rng(5).uniform(0.01, 30, 500).astype(np.float32)
    got = run(opcode, x).astype(np.float64)
    want = function(x.astype(np.float64))
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    assert (np.abs(got - want) <= ulps * spacing).all()


def test_ex2_specials():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 128, -149, -150, 1e-40], np.float32)
    want = np.array([1, 1, np.inf, 0, np.nan, np.inf, 2.0**-149, 0, 1], np.float32)
    assert same_floats(run("ex2.approx.f32", x), want)[[0, 1, 2, 3, 4, 5, 6, 8]].all()
    flushed = np.array([1, 1, np.inf, 0, np.nan, np.inf, 0, 0, 1], np.float32)
    assert same_floats(run("ex2.approx.ftz.f32", x), flushed).all()


def test_lg2_specials():
    x = np.array([0.0, -0.0, np.inf, -1, 1, 2, np.nan], np.float32)
    want = np.array([-np.inf, -np.inf, np.inf, np.nan, 0, 1, np.nan], np.float32)
    assert same_floats(run("lg2.approx.ftz.f32", x), want).all()
    tiny = f32([0x00400000])  # 2**-127
    assert run("lg2.approx.f32", tiny)[0] == -127
    assert run("lg2.approx.ftz.f32", tiny)[0] == -np.inf


def flushed(x):
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def test_ftz_flushes_operands_and_results():
    a, b = pairs()
    with np.errstate(all="ignore"):
        assert same_floats(run("add.ftz.f32", a, b), flushed(flushed(a) + flushed(b))).all()
        assert same_floats(run("mul.ftz.f32", a, b), flushed(flushed(a) * flushed(b))).all()
    assert same_floats(run("abs.ftz.f32", a), flushed(np.abs(a))).all()
    assert same_floats(run("neg.ftz.f32", a), flushed(-a)).all()


def test_sat_clamps_and_turns_nan_into_zero():
    a = np.array([-1, -0.0, 0.25, 1, 2, np.inf, -np.inf, np.nan], np.float32)
    zero = np.zeros(len(a), np.float32)
    want = np.array([0, 0, 0.25, 1, 1, 1, 0, 0], np.float32)
    assert same_floats(run("add.sat.f32", a, zero), want).all()
    assert same_floats(run("fma.rn.sat.f32", a, zero + 1, zero), want).all()


def test_min_and_max_order_zeros_and_prefer_numbers():
    a, b = combinations(F32_EDGES, F32_EDGES, dtype=np.float32)

    def choose(x, y, largest, nan):
        if math.isnan(x) or math.isnan(y):
            return math.nan if nan else (y if math.isnan(x) else x)
        return (max if largest else min)((x, y), key=lambda v: (v, math.copysign(1, v)))

    for opcode, largest, nan in (
        ("max.f32", True, False),
        ("min.f32", False, False),
        ("max.NaN.f32", True, True),
        ("min.NaN.f32", False, True),
    ):
        want = [choose(float(x), float(y), largest, nan) for x, y in zip(a, b, strict=True)]
        assert same_floats(run(opcode, a, b), np.array(want, np.float32)).all(), opcode


def test_nan_results_of_min_and_max_are_canonical():
    a = f32([0x7FC12345, 0xFF812345])
    got = run("max.NaN.f32", a, np.zeros(2, np.float32))
    assert got.view(np.uint32).tolist() == [0x7FFFFFFF] * 2


def test_three_operand_and_xorsign_forms():
    rng = np.random.default_rng(7)
    a, b, c = rng.normal(size=(3, 64)).astype(np.float32)
    assert (run("max.f32", a, b, c) == np.maximum(np.maximum(a, b), c)).all()
    assert (run("min.f32", a, b, c) == np.minimum(np.minimum(a, b), c)).all()
    got = run("max.xorsign.abs.f32", a, b)
    assert (got == np.maximum(np.abs(a), np.abs(b)) * np.sign(a) * np.sign(b)).all()


def test_signs():
    a = F32_EDGES
    b = a[::-1].copy()
    assert (run("neg.f32", a).view(np.uint32) == a.view(np.uint32) ^ 0x80000000).all()
    assert (run("abs.f32", a).view(np.uint32) == a.view(np.uint32) & 0x7FFFFFFF).all()
    got = run("copysign.f32", a, b).view(np.uint32)
    want = a.view(np.uint32) & 0x80000000 | b.view(np.uint32) & 0x7FFFFFFF
    assert (got == want).all()


def test_testp():
    x = F32_EDGES
    kinds = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
    body = " ".join(f"testp.{kind}.f32 %{kind}, %a;" for kind in kinds)
    got = evaluate(body, {"a": ("b32", x)}, dict.fromkeys(kinds, "pred"))
    size = np.abs(x)
    tiny = np.finfo(np.float32).tiny
    assert (got["finite"] == np.isfinite(x)).all()
    assert (got["infinite"] == np.isinf(x)).all()
    assert (got["number"] == ~np.isnan(x)).all()
    assert (got["notanumber"] == np.isnan(x)).all()
    assert (got["normal"] == (np.isfinite(x) & (size >= tiny))).all()
    assert (got["subnormal"] == ((size > 0) & (size < tiny))).all()


def packed(low, high):
    return np.stack([low, high], axis=1).astype(np.float32).view(np.uint64)[:, 0]


@pytest.mark.parametrize("mode", MODES)
def test_f32x2_is_two_f32(mode):
    rng = np.random.default_rng(8)
    columns = rng.normal(size=(6, 96)).astype(np.float32)
    a, b, c = (packed(columns[i], columns[i + 3]) for i in range(3))
    inputs = {"a": ("b64", a), "b": ("b64", b), "c": ("b64", c)}
    body = f"""
        add.{mode}.f32x2 %x, %a, %b; sub.{mode}.f32x2 %y, %a, %b;
        mul.{mode}.f32x2 %z, %a, %b; fma.{mode}.f32x2 %w, %a, %b, %c;
    """
    got = evaluate(body, inputs, dict.fromkeys("xyzw", "b64"), arch="sm_100a")
    for half, offset in ((0, 0), (1, 3)):
        x, y, z = columns[offset : offset + 3]
        for name, want in (
            ("x", run(f"add.{mode}.f32", x, y)),
            ("y", run(f"sub.{mode}.f32", x, y)),
            ("z", run(f"mul.{mode}.f32", x, y)),
            ("w", run(f"fma.{mode}.f32", x, y, z)),
        ):
            part = np.ascontiguousarray(got[name]).view(np.float32).reshape(-1, 2)[:, half]
            assert same_floats(part, want).all(), (name, half)


def test_f32x2_with_an_operand_that_is_the_same_for_all_lanes():
    a = packed(np.arange(40), -np.arange(40))
    body = "mov.b64 %c, 0x4000000040800000; mul.rn.f32x2 %x, %a, %c; add.rn.f32x2 %y, %c, %c;"
    declared = {"x": "b64", "y": "b64", "c": "b64"}
    got = evaluate(body, {"a": ("b64", a)}, declared, arch="sm_100a")
    x = np.ascontiguousarray(got["x"]).view(np.float32).reshape(-1, 2)
    assert (x == np.stack([np.arange(40) * 4.0, np.arange(40) * -2.0], axis=1)).all()
    assert (got["y"] == 0x4080000041000000).all()


def run64(opcode, *columns):
    names = "abcd"[: len(columns)]
    inputs = {n: ("b64", np.asarray(c, np.float64)) for n, c in zip(names, columns, strict=True)}
    body = f"{opcode} %x, {', '.join('%' + n for n in names)};"
    return evaluate(body, inputs, {"x": "b64"})["x"].view(np.float64)


def test_f64_arithmetic():
    rng = np.random.default_rng(9)
    a, b, c = rng.normal(size=(3, 200))
    assert (run64("add.f64", a, b) == a + b).all()
    assert (run64("mul.rn.f64", a, b) == a * b).all()
    assert (run64("div.rn.f64", a, b) == a / b).all()
    assert (run64("sqrt.rn.f64", np.abs(a)) == np.sqrt(np.abs(a))).all()
    assert (run64("max.f64", a, b) == np.maximum(a, b)).all()
    fused = run64("fma.rn.f64", a, b, c)
    for row in range(len(a)):
        exact = Fraction(a[row]) * Fraction(b[row]) + Fraction(c[row])
        assert fused[row] == float(exact)  # Fraction to float rounds to nearest even


@pytest.mark.parametrize("mode, toward", [("rm", -math.inf), ("rp", math.inf)])
def test_f64_directed_sums_and_products(mode, toward):
    a, b = np.random.default_rng(10).normal(size=(2, 100))
    for opcode, function in (("add", ADD), ("mul", MUL)):
        got = run64(f"{opcode}.{mode}.f64", a, b)
        for row in range(len(a)):
            exact = function(Fraction(a[row]), Fraction(b[row]))
            value = Fraction(got[row])
            assert value <= exact if mode == "rm" else value >= exact
            beyond = Fraction(math.nextafter(got[row], -toward))
            assert value == exact or (beyond > exact if mode == "rm" else beyond < exact)


def test_the_greatest_magnitude_of_three():
    a, b, c = combinations([-3.0, 2.0, np.nan], [1.0, -4.0], [-0.5, np.nan], dtype=np.float32)
    inputs = {"a": ("b32", a), "b": ("b32", b), "c": ("b32", c)}
    body = """
        max.abs.f32 %x, %a, %b, %c; max.NaN.abs.f32 %y, %a, %b, %c; min.abs.f32 %z, %a, %b, %c;
    """
    got = evaluate(body, inputs, dict.fromkeys("xyz", "b32"), arch="sm_100a")
    sizes = np.abs(np.stack([a, b, c]))
    assert same_floats(got["x"].view(np.float32), np.nanmax(sizes, axis=0)).all()
    assert same_floats(got["y"].view(np.float32), sizes.max(axis=0)).all()
    assert same_floats(got["z"].view(np.float32), np.nanmin(sizes, axis=0)).all()


@pytest.mark.parametrize(
    "line",
    [
        "add.rn.oob.f32 %r1, %r2, %r3;",
        "ex2.full.f32 %r1, %r2;",
        "max.xorsign.abs.f32 %r1, %r2, %r3, %r4;",
        "max.s32 %r1, %r2, %r3, %r4;",
        "fma.rn.oob.bf16x2 %r1, %r2, %r3, %r4;",
        "fma.rn.sat.f32x2 %rd1, %rd2, %rd3, %rd4;",
    ],
)
def test_modifiers_that_would_be_ignored_are_refused(line):
    with pytest.raises(UnsupportedError, match="line"):
        evaluate(line, {}, {})
