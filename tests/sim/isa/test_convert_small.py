"""``cvt`` to and from narrow floats: stochastic rounding, scales, s2f6 (PTX ISA 9.7.9.21)."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from cute_fa.errors import UnsupportedError
from cute_fa.sim.isa import minifloat
from tests.sim.isa.evaluate import F32_EDGES, evaluate

SMALL = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
RNG = np.random.default_rng(3)


def values_of(name):
    """Finite positive values of a small float in ascending order, from its fields (5.2.3)."""
    form = minifloat.FORMATS[name]
    values = []
    for code in range(form.max_code + 1):
        exponent, fraction = divmod(code, 1 << form.mantissa_bits)
        step = Fraction(fraction, 1 << form.mantissa_bits)
        scale = Fraction(2) ** (max(exponent, 1) - form.bias)
        values.append(scale * (step if exponent == 0 else 1 + step))
    return values


def stochastic(x, random, values, bits):
    """Index of the value that ``x`` is rounded to, given its random bits."""
    size = abs(Fraction(x))
    if size >= values[-1]:
        return len(values) - 1
    low = max(i for i, value in enumerate(values) if value <= size)
    discarded = (size - values[low]) / (values[low + 1] - values[low])
    return low + (math.floor(discarded * 2**bits) + random >= 2**bits)


@pytest.mark.parametrize("name", SMALL)
def test_four_small_floats_are_rounded_by_random_bits(name):
    values = values_of(name)
    top = float(values[-1])
    rows = RNG.uniform(-1.2 * top, 1.2 * top, (96, 4)).astype(np.float32)
    rows[:16] *= 2.0**-8
    rows[0] = [top, -top, 0.0, float(values[1]) / 2]
    random = RNG.integers(0, 1 << 32, 96, np.uint64).astype(np.uint32)
    random[:3] = [0xFFFFFFFF, 0, 0x00FF0000]
    inputs = {n: ("b32", rows[:, i]) for i, n in enumerate("abef")} | {"z": ("b32", random)}
    body = f"cvt.rs.satfinite.{name}x4.f32 %x, {{%a, %b, %e, %f}}, %z;"
    got = evaluate(body, inputs, {"x": "b16" if name == "e2m1" else "b32"}, arch="sm_100a")["x"]
    width = 4 if name == "e2m1" else 8
    sign = 1 << (minifloat.FORMATS[name].bits - 1)
    for row in range(len(rows)):
        word = int(random[row])
        first, second = word >> 16, word & 0xFFFF
        if name == "e2m1":
            first, second = first & 0xFF00 | second >> 8, (first & 0xFF) << 8 | second & 0xFF
        expected = 0
        for x, bits in zip(rows[row].tolist(), (first, first, second, second), strict=True):
            code = stochastic(x, bits, values, 16) | (sign if math.copysign(1, x) < 0 else 0)
            expected = expected << width | code
        assert int(got[row]) == expected, rows[row]


@pytest.mark.parametrize(("kind", "bits"), [("f16", 13), ("bf16", 16)])
def test_pairs_of_halves_are_rounded_by_random_bits(kind, bits):
    a = np.concatenate([RNG.normal(0, 10, 200), RNG.normal(0, 3e-6, 50), [65519.0, -65504.0, 2.0]])
    a = a.astype(np.float32)
    b = a[::-1].copy()
    random = RNG.integers(0, 1 << 32, len(a), np.uint64).astype(np.uint32)
    inputs = {"a": ("b32", a), "b": ("b32", b), "z": ("b32", random)}
    got = evaluate(f"cvt.rs.{kind}x2.f32 %x, %a, %b, %z;", inputs, {"x": "b32"}, arch="sm_100a")
    for row, word in enumerate(got["x"].tolist()):
        for x, pattern, noise in (
            (float(a[row]), word >> 16, int(random[row]) >> 16),
            (float(b[row]), word & 0xFFFF, int(random[row]) & 0xFFFF),
        ):
            below, above = _neighbours(abs(x), kind)
            discarded = (Fraction(abs(x)) - Fraction(below)) / (Fraction(above) - Fraction(below))
            up = math.floor(discarded * 2**bits) + (noise & (1 << bits) - 1) >= 2**bits
            expected = math.copysign(above if up else below, x)
            assert _half(pattern, kind) == expected, (x, noise)


def _half(pattern, kind):
    if kind == "f16":
        return float(np.uint16(pattern).view(np.float16))
    return float((np.uint32(pattern) << 16).view(np.float32))


def _neighbours(x, kind):
    """The largest half that is not above ``x``, and the next one (2**16 above the f16 ones)."""
    if kind == "bf16":
        raw = int(np.float32(x).view(np.uint32)) >> 16
        return _half(raw, kind), _half(raw + 1, kind)
    half = np.float16(x)
    if float(half) > x:
        half = np.nextafter(half, np.float16(0))
    with np.errstate(over="ignore"):
        above = float(np.nextafter(half, np.float16(np.inf)))
    return float(half), 65536.0 if math.isinf(above) else above


def test_stochastic_rounding_keeps_special_values():
    a = np.array([np.inf, -np.inf, np.nan, 3e38, 0.0, -0.0], np.float32)
    ones = np.full(len(a), 0xFFFFFFFF, np.uint32)
    inputs = {"a": ("b32", a), "z": ("b32", ones)}
    body = """
        cvt.rs.f16x2.f32 %x, %a, %a, %z; cvt.rs.relu.satfinite.bf16x2.f32 %y, %a, %a, %z;
        cvt.rs.satfinite.e4m3x4.f32 %w, {%a, %a, %a, %a}, %z;
        cvt.rs.satfinite.relu.e2m3x4.f32 %v, {%a, %a, %a, %a}, %z;
    """
    got = evaluate(body, inputs, dict.fromkeys("xywv", "b32"), arch="sm_100a")
    low = {name: (word & 0xFFFF).tolist() for name, word in got.items()}
    assert low["x"] == [0x7C00, 0xFC00, 0x7FFF, 0x7C00, 0, 0x8000]
    assert low["y"] == [0x7F7F, 0, 0x7FFF, 0x7F62, 0, 0]
    assert [x & 0xFF for x in low["w"]] == [0x7E, 0xFE, 0x7F, 0x7E, 0, 0x80]
    assert [x & 0xFF for x in low["v"]] == [0x1F, 0, 0x1F, 0x1F, 0, 0]


def test_scale_factors_round_down_or_up_to_powers_of_two():
    a = np.array([1.0, 1.5, 2.0, 2.0**-130, 0.0, 1.5 * 2.0**127, np.inf, np.nan], np.float32)
    body = """
        cvt.rz.satfinite.ue8m0x2.f32 %x, %a, %a; cvt.rp.satfinite.ue8m0x2.f32 %y, %a, %a;
        cvt.rp.ue8m0x2.f32 %z, %a, %a;
    """
    got = evaluate(body, {"a": ("b32", a)}, dict.fromkeys("xyz", "b16"), arch="sm_100a")
    assert (got["x"] & 0xFF).tolist() == [127, 127, 128, 0, 0, 254, 254, 255]
    assert (got["y"] & 0xFF).tolist() == [127, 128, 128, 0, 0, 254, 254, 255]
    assert (got["z"] & 0xFF).tolist() == [127, 128, 128, 0, 0, 255, 255, 255]
    back = evaluate("cvt.rn.bf16x2.ue8m0x2 %w, %x;", {"x": ("b16", got["x"])}, {"w": "b32"})["w"]
    assert [_half(word & 0xFFFF, "bf16") for word in back.tolist()[:4]] == [1, 1, 2, 2.0**-127]


def test_fixed_point_pairs():
    a = np.array([0.0, 1.0, -1.0, 1.99, -2.0, 5.0, -5.0, 1 / 128, 3 / 128, np.nan], np.float32)
    scale = np.full(len(a), 0x8180, np.uint16)  # 4 for the upper value, 2 for the lower
    inputs = {"a": ("b32", a), "s": ("b16", scale)}
    body = """
        cvt.rn.satfinite.s2f6x2.f32 %x, %a, %a;
        cvt.rn.satfinite.relu.scaled::n2::ue8m0.s2f6x2.f32 %y, %a, %a, %s;
        cvt.rn.scaled::n2::ue8m0.bf16x2.s2f6x2 %z, %x, %s;
    """
    outputs = {"x": "b16", "y": "b16", "z": "b32"}
    got = evaluate(body, inputs, outputs, arch="sm_100a")
    low = (got["x"] & 0xFF).astype(np.uint8).view(np.int8).tolist()
    assert low == [0, 64, -64, 127, -128, 127, -128, 0, 2, 127]
    assert (got["x"] >> 8).tolist() == (got["x"] & 0xFF).tolist()
    assert (got["y"] & 0xFF).tolist() == [0, 32, 0, 64, 0, 127, 0, 0, 1, 127]
    assert (got["y"] >> 8).tolist() == [0, 16, 0, 32, 0, 80, 0, 0, 0, 127]
    assert _half(int(got["z"][1]) >> 16, "bf16") == 4.0
    assert _half(int(got["z"][1]) & 0xFFFF, "bf16") == 2.0


def test_relu_of_tf32():
    a = np.array([-1.0, 1.0, -0.0, -np.inf, np.nan], np.float32)
    got = evaluate("cvt.rn.relu.tf32.f32 %x, %a;", {"a": ("b32", a)}, {"x": "b32"})["x"]
    assert got.tolist() == [0, 0x3F800000, 0, 0, 0x7FFFFFFF]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_bf16_pairs_to_small_floats_agree_with_torch(name, dtype):
    a = F32_EDGES[np.abs(F32_EDGES) < 400]
    words = torch.from_numpy(a.copy()).bfloat16()
    pattern = words.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    body = f"cvt.rn.satfinite.{name}x2.bf16x2 %x, %a;"
    got = evaluate(body, {"a": ("b32", pattern | pattern << 16)}, {"x": "b16"}, arch="sm_100a")
    expected = words.to(getattr(torch, dtype)).view(torch.uint8).numpy()
    assert (got["x"] & 0xFF == expected).all() and (got["x"] >> 8 == expected).all()


@pytest.mark.parametrize(
    "line",
    [
        "cvt.rz.satfinite.e4m3x2.f32 %h1, %r1, %r2;",
        "cvt.rn.satfinite.e4m3x4.f32 %r3, {%r1, %r2, %r1, %r2}, %r4;",
        "cvt.rn.satfinite.scaled::n2::ue8m0.e4m3x2.f32 %h1, %r1, %r2, %h2;",
        "cvt.rn.ue8m0x2.f32 %h1, %r1, %r2;",
    ],
)
def test_conversions_that_do_not_exist_are_refused(line):
    with pytest.raises(UnsupportedError, match="line"):
        evaluate(line, {}, {})


def test_pairs_of_4_bit_floats_live_in_8_bit_registers():
    a = np.array([0.0, 0.25, 0.75, -1.25, 2.5, -5.0, 100.0, -np.inf], np.float32)
    body = """
        { .reg .b8 b;
        cvt.rn.satfinite.e2m1x2.f32 b, %a, %z; cvt.rn.f16x2.e2m1x2 %x, b;
        cvt.rn.satfinite.e2m1x2.f16x2 b, %x; cvt.rn.relu.f16x2.e2m1x2 %y, b; }
    """
    inputs = {"a": ("b32", a), "z": ("b32", np.full(len(a), 1.5, np.float32))}
    got = evaluate(body, inputs, {"x": "b32", "y": "b32"}, arch="sm_100a")
    want = [0, 0, 1, -1, 2, -4, 6, -6]  # halfway cases go to the even code
    assert [_half(word >> 16, "f16") for word in got["x"].tolist()] == want
    assert [_half(word & 0xFFFF, "f16") for word in got["x"].tolist()] == [1.5] * len(a)
    assert [_half(word >> 16, "f16") for word in got["y"].tolist()] == [max(x, 0) for x in want]
