"""``cvt`` against exact arithmetic, Python's integers and torch's narrow floats."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.sim.isa.evaluate import F32_EDGES, evaluate, round_exact, same_floats

MODES = ["rn", "rz", "rm", "rp"]
INT_WIDTHS = {"u8": 8, "s8": 8, "u16": 16, "s16": 16, "u32": 32, "s32": 32, "u64": 64, "s64": 64}
DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
WORDS = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000]
WORDS += [0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF1]


def container(kind):
    """Width of the register that holds a type: 8-bit ones live in 16 bits."""
    return max(INT_WIDTHS[kind], 16)


def number(value, kind):
    width = INT_WIDTHS[kind]
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> (width - 1) else value


def limits(kind):
    width = INT_WIDTHS[kind]
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


@pytest.mark.parametrize("source", sorted(INT_WIDTHS))
@pytest.mark.parametrize("target", sorted(INT_WIDTHS))
def test_integers_wrap_extend_and_saturate(source, target):
    wide_in, wide_out = container(source), container(target)
    words = [w for w in WORDS if w < 1 << wide_in]
    a = np.array(words, DTYPES[wide_in])
    body = f"cvt.{target}.{source} %x, %a;"
    outputs = {"x": f"b{wide_out}"}
    if source != target:
        body += f" cvt.sat.{target}.{source} %y, %a;"
        outputs["y"] = f"b{wide_out}"
    got = evaluate(body, {"a": (f"b{wide_in}", a)}, outputs)
    mask = (1 << wide_out) - 1
    low, high = limits(target)
    for row, word in enumerate(words):
        value = number(word, source)
        assert int(got["x"][row]) == number(value, target) & mask, (word, value)
        if "y" in outputs:
            assert int(got["y"][row]) == min(max(value, low), high) & mask, (word, value)


def test_narrow_types_in_wider_registers():
    a = np.array([0x12345680, 0x0000007F, 0xFFFFFFFF], np.uint32)
    body = "cvt.s32.s8 %x, %a; cvt.u32.u8 %y, %a; cvt.s8.s32 %z, %a; cvt.u32.u16 %w, %a;"
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32", "y": "b32", "z": "b32", "w": "b32"})
    assert got["x"].tolist() == [0xFFFFFF80, 0x7F, 0xFFFFFFFF]
    assert got["y"].tolist() == [0x80, 0x7F, 0xFF]
    assert got["z"].tolist() == [0xFFFFFF80, 0x7F, 0xFFFFFFFF]
    assert got["w"].tolist() == [0x5680, 0x7F, 0xFFFF]


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("mode", MODES)
def test_integers_to_f32_are_rounded_once(source, mode):
    width = INT_WIDTHS[source]
    rng = np.random.default_rng(1)
    words = [w for w in WORDS if w < 1 << width]
    words += [0x1000001, 0x1000003, 0x7FFFFF41][: 0 if width == 16 else 3]
    words += [0x100000100000001, 0xFFFFFF8000000001][: 2 if width == 64 else 0]
    words += [int(w) for w in rng.integers(0, (1 << width) - 1, 60, dtype=np.uint64)]
    a = np.array(words, DTYPES[width])
    body = f"cvt.{mode}.f32.{source} %x, %a;"
    got = evaluate(body, {"a": (f"b{width}", a)}, {"x": "b32"})["x"].view(np.float32)
    for row, word in enumerate(words):
        exact = Fraction(number(word, source))
        assert float(got[row]) == round_exact(exact, "f32", mode), word


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_integers_to_halves(target):
    words = [0, 1, 2049, 2051, 65504, 65519, 65520, 100001, (1 << 31) + 1, 257, 383, 385]
    a = np.array(words, np.uint32)
    got = evaluate(f"cvt.rn.{target}.u32 %x, %a;", {"a": ("b32", a)}, {"x": "b16"})["x"]
    for row, word in enumerate(words):
        assert half(got[row], target) == round_exact(Fraction(word), target)


def half(pattern, kind):
    if kind == "f16":
        return float(np.uint16(pattern).view(np.float16))
    return float((np.uint32(pattern) << 16).view(np.float32))


def test_u64_to_f64_rounds():
    words = [(1 << 64) - 1, (1 << 53) + 1, (1 << 63) + 1024, (1 << 63) + 1025]
    a = np.array(words, np.uint64)
    got = evaluate("cvt.rn.f64.u64 %x, %a;", {"a": ("b64", a)}, {"x": "b64"})["x"]
    assert got.view(np.float64).tolist() == [float(w) for w in words]
    down = evaluate("cvt.rz.f64.u64 %x, %a;", {"a": ("b64", a)}, {"x": "b64"})["x"]
    for word, value in zip(words, down.view(np.float64), strict=True):
        assert value <= word < math.nextafter(value, math.inf)


ROUND = {
    "rni": lambda x: round(x),
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


@pytest.mark.parametrize("target", sorted(INT_WIDTHS))
@pytest.mark.parametrize("mode", sorted(ROUND))
def test_floats_to_integers_round_and_clamp(target, mode):
    values = [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -1.5,
        127.5,
        -128.5,
        255.49,
        65535.6,
        2.0**31,
        -(2.0**31),
    ]
    values += [2.0**31 - 128, 2.0**32, 2.0**62, 2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30]
    values += [math.inf, -math.inf]
    a = np.array(values, np.float32)
    wide = container(target)
    body = f"cvt.{mode}.{target}.f32 %x, %a; cvt.{mode}.{target}.f64 %y, %b;"
    inputs = {"a": ("b32", a), "b": ("b64", a.astype(np.float64))}
    got = evaluate(body, inputs, {"x": f"b{wide}", "y": f"b{wide}"})
    low, high = limits(target)
    for row, value in enumerate(a.tolist()):
        if math.isinf(value):
            expected = high if value > 0 else low
        else:
            expected = min(max(ROUND[mode](value), low), high)
        for name in "xy":
            assert int(got[name][row]) == expected & (1 << wide) - 1, value


def test_nan_to_integers():
    a = np.full(1, np.nan, np.float32)
    inputs = {"a": ("b32", a), "b": ("b64", a.astype(np.float64))}
    body = """
        cvt.rni.s32.f32 %x, %a; cvt.rni.u32.f32 %y, %a;
        cvt.rni.s64.f32 %z, %a; cvt.rni.s32.f64 %w, %b;
    """
    got = evaluate(body, inputs, {"x": "b32", "y": "b32", "z": "b64", "w": "b32"})
    assert [int(got[n][0]) for n in "xyzw"] == [0, 0, 1 << 63, 1 << 31]


def float_values():
    rng = np.random.default_rng(2)
    wide = rng.integers(0, 1 << 32, 300, dtype=np.uint32).view(np.float32)
    usual = rng.normal(size=200).astype(np.float32)
    ties = (np.arange(1, 60, dtype=np.float32) * 2 + 1) * np.float32(2.0**-12) + 1
    small = rng.integers(0x33000000, 0x39000000, 200, dtype=np.uint32).view(np.float32)
    return np.concatenate([F32_EDGES, wide, usual, ties, -ties, small])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_f32_to_halves_is_rounded_once(kind, mode):
    a = float_values()
    got = evaluate(f"cvt.{mode}.{kind}.f32 %x, %a;", {"a": ("b32", a)}, {"x": "b16"})["x"]
    for row, value in enumerate(a.tolist()):
        actual = half(got[row], kind)
        if math.isnan(value):
            assert got[row] == 0x7FFF or math.isnan(actual)
        elif math.isinf(value):
            assert actual == value
        else:
            want = round_exact(Fraction(value), kind, mode) if value else value
            assert actual == want and math.copysign(1, actual) == math.copysign(1, value), value


def test_halves_to_f32_are_exact():
    patterns = np.arange(0, 65536, 67, dtype=np.uint32).astype(np.uint16)[:1000]
    body = "cvt.f32.f16 %x, %a; cvt.f32.bf16 %y, %a;"
    got = evaluate(body, {"a": ("b16", patterns)}, {"x": "b32", "y": "b32"})
    x, y = (got[name].view(np.float32) for name in "xy")
    assert same_floats(x, patterns.view(np.float16).astype(np.float32)).all()
    assert same_floats(y, (patterns.astype(np.uint32) << 16).view(np.float32)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_put_the_first_operand_on_top(kind):
    a = float_values()
    b = a[::-1].copy()
    inputs = {"a": ("b32", a), "b": ("b32", b)}
    body = f"""
        cvt.rn.{kind}x2.f32 %x, %a, %b; cvt.rz.{kind}x2.f32 %z, %a, %b;
        cvt.rn.relu.{kind}x2.f32 %r, %a, %b;
        cvt.rn.{kind}.f32 %h, %a; cvt.rn.{kind}.f32 %l, %b; cvt.rz.{kind}.f32 %k, %b;
    """
    outputs = {"x": "b32", "z": "b32", "r": "b32", "h": "b16", "l": "b16", "k": "b16"}
    got = evaluate(body, inputs, outputs)
    assert (got["x"] >> 16 == got["h"]).all()
    assert ((got["x"] & 0xFFFF) == got["l"]).all()
    assert ((got["z"] & 0xFFFF) == got["k"]).all()
    low = (got["r"] & 0xFFFF).astype(np.uint16)
    negative = (got["l"] & 0x8000 != 0) & ~np.isnan(b)
    assert (low == np.where(negative, 0, got["l"])).all()


def test_f64_conversions():
    a = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e300, -1e-300, np.pi], np.float64)
    for mode in MODES:
        got = evaluate(f"cvt.{mode}.f32.f64 %x, %a;", {"a": ("b64", a)}, {"x": "b32"})["x"]
        want = [round_exact(Fraction(v), "f32", mode) for v in a.tolist()]
        assert got.view(np.float32).tolist() == want, mode
    b = np.array([0.1, -2.5], np.float32)
    wide = evaluate("cvt.f64.f32 %x, %a;", {"a": ("b32", b)}, {"x": "b64"})["x"]
    assert wide.view(np.float64).tolist() == b.astype(np.float64).tolist()


@pytest.mark.parametrize("mode", sorted(ROUND))
def test_rounding_to_integral_floats(mode):
    a = np.array([0.5, 1.5, -0.5, -1.5, 2.0**30, 0.0, -0.0, 7.25], np.float32)
    got = evaluate(f"cvt.{mode}.f32.f32 %x, %a;", {"a": ("b32", a)}, {"x": "b32"})["x"]
    want = [math.copysign(ROUND[mode](v), v) for v in a.tolist()]
    assert same_floats(got.view(np.float32), np.array(want, np.float32)).all()


def test_sat_and_ftz():
    a = np.array([-1, 0.5, 2, np.nan, 1e-40], np.float32)
    body = "cvt.sat.f32.f32 %x, %a; cvt.ftz.f32.f32 %y, %a; cvt.rn.sat.f16.f32 %z, %a;"
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b32", "y": "b32", "z": "b16"})
    x = got["x"].view(np.float32)
    assert same_floats(x, np.array([0, 0.5, 1, 0, 1e-40], np.float32)).all()
    assert got["y"].view(np.float32)[4] == 0
    assert got["z"].view(np.float16).tolist() == [0, 0.5, 1, 0, 0]


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32_keeps_ten_fraction_bits(mode):
    rng = np.random.default_rng(3)
    a = rng.normal(size=300).astype(np.float32)
    ties = np.float32(1) + (2 * np.arange(40, dtype=np.float32) + 1) * np.float32(2.0**-11)
    a = np.concatenate([a, ties, -ties])
    got = evaluate(f"cvt.{mode}.tf32.f32 %x, %a;", {"a": ("b32", a)}, {"x": "b32"}, arch="sm_100a")
    x = got["x"].view(np.float32).astype(np.float64)
    quantum = 2.0 ** (np.floor(np.log2(np.abs(a.astype(np.float64)))) - 10)
    units = np.abs(a.astype(np.float64)) / quantum
    rounded = {"rna": np.floor(units + 0.5), "rn": np.rint(units), "rz": np.floor(units)}[mode]
    assert (x == np.copysign(rounded * quantum, a)).all()


def test_tf32_specials():
    a = np.array([np.inf, -np.inf, np.nan], np.float32)
    got = evaluate("cvt.rna.tf32.f32 %x, %a;", {"a": ("b32", a)}, {"x": "b32"})["x"]
    assert got.tolist() == [0x7F800000, 0xFF800000, 0x7FFFFFFF]


TORCH8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


@pytest.mark.parametrize("kind", sorted(TORCH8))
def test_fp8_pairs_match_torch_where_torch_is_in_range(kind):
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.normal(size=400) * 30, rng.normal(size=200) * 0.01])
    a = np.clip(values, -LARGEST[kind], LARGEST[kind]).astype(np.float32)
    b = a[::-1].copy()
    body = f"cvt.rn.satfinite.{kind}x2.f32 %x, %a, %b;"
    got = evaluate(body, {"a": ("b32", a), "b": ("b32", b)}, {"x": "b16"}, arch="sm_90a")["x"]
    want = torch.from_numpy(a).to(TORCH8[kind]).view(torch.uint8).numpy()
    assert (got >> 8 == want).all()
    assert ((got & 0xFF) == want[::-1]).all()


@pytest.mark.parametrize("kind", sorted(TORCH8))
def test_fp8_saturates_to_the_largest_number(kind):
    a = np.array([1e9, -1e9, np.inf, -np.inf, LARGEST[kind] * 1.2, np.nan], np.float32)
    body = (
        f"cvt.rn.satfinite.{kind}x2.f32 %x, %a, %a; cvt.rn.satfinite.relu.{kind}x2.f32 %y, %a, %a;"
    )
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b16", "y": "b16"}, arch="sm_90a")
    top = {"e4m3": 0x7E, "e5m2": 0x7B}[kind]
    low = (got["x"] & 0xFF).tolist()
    assert low == [top, top | 0x80, top, top | 0x80, top, 0x7F]
    assert (got["y"] & 0xFF).tolist() == [top, 0, top, 0, top, 0x7F]


@pytest.mark.parametrize("kind", sorted(TORCH8))
def test_fp8_to_halves_is_exact_for_every_code(kind):
    codes = np.arange(256, dtype=np.uint16)
    packed = codes | codes[::-1] << 8
    got = evaluate(
        f"cvt.rn.f16x2.{kind}x2 %x, %a;", {"a": ("b16", packed)}, {"x": "b32"}, arch="sm_90a"
    )
    want = torch.arange(256, dtype=torch.uint8).view(TORCH8[kind]).half().numpy()
    low = (got["x"] & 0xFFFF).astype(np.uint16).view(np.float16)
    high = (got["x"] >> 16).astype(np.uint16).view(np.float16)
    assert same_floats(low, want).all()
    assert same_floats(high, want[::-1]).all()


def test_f16x2_to_fp8():
    a = np.array([0x3C00C000, 0x7BFF0001], np.uint32)  # (1, -2), (65504, 2**-24)
    got = evaluate(
        "cvt.rn.satfinite.e4m3x2.f16x2 %x, %a;", {"a": ("b32", a)}, {"x": "b16"}, arch="sm_90a"
    )
    assert got["x"].tolist() == [0x38C0, 0x7E00]


SMALL = {"e2m1": (2, 1, 1, 6.0), "e2m3": (2, 3, 1, 7.5), "e3m2": (3, 2, 3, 28.0)}


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_formats_below_eight_bits(kind):
    exponent_bits, mantissa_bits, bias, largest = SMALL[kind]
    magnitudes = []
    for code in range(1 << exponent_bits + mantissa_bits):
        e, m = code >> mantissa_bits, code & (1 << mantissa_bits) - 1
        scale = 2.0 ** (max(e, 1) - bias)
        magnitudes.append(scale * ((e > 0) + m / 2.0**mantissa_bits))
    assert magnitudes[-1] == largest
    a = np.array([*magnitudes, *(-m for m in magnitudes), 1e6, -1e6], np.float32)
    zero = np.zeros(len(a), np.float32)
    body = f"cvt.rn.satfinite.{kind}x2.f32 %x, %z, %a;"
    got = evaluate(body, {"a": ("b32", a), "z": ("b32", zero)}, {"x": "b16"}, arch="sm_100a")["x"]
    sign = 1 << exponent_bits + mantissa_bits
    codes = list(range(sign))
    assert got.tolist() == [*codes, *(c | sign for c in codes), sign - 1, 2 * sign - 1]


def test_ue8m0_rounds_up_or_toward_zero():
    a = np.array([1.0, 1.5, 2.0, 3.0, 0.3], np.float32)
    body = """
        cvt.rz.satfinite.ue8m0x2.f32 %x, %a, %a; cvt.rp.satfinite.ue8m0x2.f32 %y, %a, %a;
    """
    got = evaluate(body, {"a": ("b32", a)}, {"x": "b16", "y": "b16"}, arch="sm_100a")
    assert (got["x"] & 0xFF).tolist() == [127, 127, 128, 128, 125]
    assert (got["y"] & 0xFF).tolist() == [127, 128, 128, 129, 126]


def test_cvt_pack_saturates_and_packs():
    a = np.array([-5, 70000, 300, -40000], np.int32)
    b = a[::-1].copy()
    c = np.full(4, 0xABCD, np.uint32)
    body = """
        cvt.pack.sat.u16.s32 %x, %a, %b; cvt.pack.sat.s16.s32 %y, %a, %b;
        cvt.pack.sat.u8.s32.b32 %z, %a, %b, %c; cvt.pack.sat.s8.s32.b32 %w, %a, %b, %c;
    """
    inputs = {"a": ("b32", a), "b": ("b32", b), "c": ("b32", c)}
    got = evaluate(body, inputs, dict.fromkeys("xyzw", "b32"))
    for row in range(4):
        high, low = int(a[row]), int(b[row])
        for name, kind in (("x", "u16"), ("y", "s16"), ("z", "u8"), ("w", "s8")):
            width = int(kind[1:])
            bottom, top = limits(kind)
            parts = [min(max(v, bottom), top) & (1 << width) - 1 for v in (low, high)]
            word = parts[0] | parts[1] << width
            if width == 8:
                word |= 0xABCD << 16
            assert int(got[name][row]) == word & 0xFFFFFFFF
