"""f16, bf16 and their packed forms against exact arithmetic and torch's formats."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.sim.isa.evaluate import combinations, evaluate, round_exact

EDGES = {
    "f16": [0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00],
    "bf16": [0, 0x8000, 1, 0x807F, 0x0080, 0x3F80, 0xBF80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0x7FC0],
}
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def decode(patterns, kind):
    """float64 of 16-bit patterns, by torch."""
    signed = torch.from_numpy(np.asarray(patterns, np.uint16).view(np.int16).copy())
    return signed.view(TORCH[kind]).double().numpy()


def operands(kind, count):
    rng = np.random.default_rng(4)
    edges = EDGES[kind][:8] if count == 3 else EDGES[kind]
    columns = combinations(*[edges] * count, dtype=np.uint16)
    normal = torch.from_numpy(rng.normal(size=(count, 200))).to(TORCH[kind])
    more = normal.view(torch.int16).numpy().view(np.uint16)
    return [np.concatenate([c, m]) for c, m in zip(columns, more, strict=True)]


def run(opcode, *columns, **kwargs):
    names = "abc"[: len(columns)]
    body = f"{opcode} %x, {', '.join('%' + n for n in names)};"
    inputs = {n: ("b16", c) for n, c in zip(names, columns, strict=True)}
    return evaluate(body, inputs, {"x": "b16"}, **kwargs)["x"]


def exact(function, kind, columns):
    """Each result rounded once from the exact value, as float64."""
    out = []
    for values in zip(*[decode(c, kind) for c in columns], strict=True):
        if all(map(math.isfinite, values)):
            value = function(*map(Fraction, values))
            with np.errstate(all="ignore"):
                zero = function(*map(np.float64, values))
            out.append(round_exact(value, kind) if value else zero)
        else:
            with np.errstate(all="ignore"):
                out.append(function(*map(np.float64, values)))
    return np.array(out)


def assert_same(got, want, kind):
    actual = decode(got, kind)
    nan = np.isnan(want)
    assert (np.isnan(actual) == nan).all()
    assert (got[nan] == 0x7FFF).all()
    assert (actual[~nan] == want[~nan]).all()
    zero = ~nan & (want == 0)
    assert (np.signbit(actual[zero]) == np.signbit(want[zero])).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_arithmetic_is_rounded_once(kind, op):
    function = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}[op]
    columns = operands(kind, 2)
    assert_same(run(f"{op}.rn.{kind}", *columns), exact(function, kind, columns), kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fma_is_fused(kind):
    columns = operands(kind, 3)
    got = run(f"fma.rn.{kind}", *columns)
    assert_same(got, exact(lambda a, b, c: a * b + c, kind, columns), kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fma_relu(kind):
    columns = operands(kind, 3)
    want = exact(lambda a, b, c: a * b + c, kind, columns)
    want = np.where(np.isnan(want), want, np.maximum(want, 0) + 0.0)
    assert_same(run(f"fma.rn.relu.{kind}", *columns), want, kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_min_max(kind):
    columns = operands(kind, 2)
    a, b = (decode(c, kind) for c in columns)
    key = [(x, y) for x, y in zip(a, b, strict=True)]

    def choose(largest, nan):
        out = []
        for x, y in key:
            if math.isnan(x) or math.isnan(y):
                out.append(
                    math.nan
                    if nan or (math.isnan(x) and math.isnan(y))
                    else (y if math.isnan(x) else x)
                )
            else:
                pick = max if largest else min
                out.append(pick((x, y), key=lambda v: (v, math.copysign(1, v))))
        return np.array(out)

    assert_same(run(f"max.{kind}", *columns), choose(True, False), kind)
    assert_same(run(f"min.{kind}", *columns), choose(False, False), kind)
    assert_same(run(f"max.NaN.{kind}", *columns), choose(True, True), kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs(kind):
    (a,) = operands(kind, 1)
    assert (run(f"neg.{kind}", a) == a ^ 0x8000).all()
    assert (run(f"abs.{kind}", a) == a & 0x7FFF).all()


def test_f16_ftz_and_sat():
    a = np.array([0x0001, 0x8001, 0x3C00, 0x4000, 0xC000, 0x7E00], np.uint16)
    zero = np.zeros(len(a), np.uint16)
    assert run("add.ftz.f16", a, zero).tolist()[:4] == [0, 0, 0x3C00, 0x4000]
    assert run("add.sat.f16", a, zero).tolist() == [1, 0, 0x3C00, 0x3C00, 0, 0]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op, function", [("tanh.approx", np.tanh), ("ex2.approx", np.exp2)])
def test_functions(kind, op, function):
    opcode = f"{op}.ftz.bf16" if (op, kind) == ("ex2.approx", "bf16") else f"{op}.{kind}"
    values = torch.from_numpy(np.random.default_rng(6).uniform(-4, 4, 200)).to(TORCH[kind])
    patterns = values.view(torch.int16).numpy().view(np.uint16)
    got = decode(run(opcode, patterns, arch="sm_90a"), kind)
    want = function(values.double().numpy())
    step = {"f16": 2.0**-10, "bf16": 2.0**-7}[kind]
    assert (np.abs(got - want) <= step * np.abs(want)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_forms_are_two_halves(kind):
    low, high = operands(kind, 3), [c[::-1].copy() for c in operands(kind, 3)]
    pairs = zip(low, high, strict=True)
    packed = [x.astype(np.uint32) | y.astype(np.uint32) << 16 for x, y in pairs]
    names = dict(zip("abc", [("b32", p) for p in packed], strict=True))
    forms = {
        "x": ("add.rn", 2),
        "y": ("mul.rn", 2),
        "z": ("fma.rn", 3),
        "w": ("max.NaN", 2),
        "n": ("neg", 1),
        "m": ("abs", 1),
    }
    body = " ".join(
        f"{op}.{kind}x2 %{out}, {', '.join('%' + n for n in 'abc'[:count])};"
        for out, (op, count) in forms.items()
    )
    got = evaluate(body, names, dict.fromkeys(forms, "b32"))
    for out, (op, count) in forms.items():
        assert (got[out].astype(np.uint16) == run(f"{op}.{kind}", *low[:count])).all(), op
        assert (got[out] >> 16 == run(f"{op}.{kind}", *high[:count])).all(), op


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision_widens_exactly(kind):
    a, b, _ = operands(kind, 3)
    c = np.random.default_rng(8).normal(size=len(a)).astype(np.float32)
    finite = np.isfinite(decode(a, kind)) & np.isfinite(decode(b, kind))
    body = f"""
        add.rn.f32.{kind} %x, %a, %c; sub.rn.f32.{kind} %y, %a, %c;
        fma.rn.f32.{kind} %z, %a, %b, %c;
    """
    inputs = {"a": ("b16", a), "b": ("b16", b), "c": ("b32", c)}
    got = evaluate(body, inputs, dict.fromkeys("xyz", "b32"), arch="sm_100a")
    wide_a, wide_b = decode(a, kind), decode(b, kind)
    for row in np.flatnonzero(finite):
        x, y, z = Fraction(wide_a[row]), Fraction(wide_b[row]), Fraction(float(c[row]))
        for name, value in (("x", x + z), ("y", x - z), ("z", x * y + z)):
            assert float(got[name].view(np.float32)[row]) == round_exact(value, "f32")
